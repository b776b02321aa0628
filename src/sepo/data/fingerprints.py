"""Fingerprints of tokenizers and datasets: 16 hex digits, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sepo.data.tables import provenance_of
from sepo.errors import UserError
from sepo.processes import log_once

_PROBE = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs; naïve café, ÀÉ, 3.14 × 10⁻²!\n\n"
    "\tdef f(x):  return x\n  Müller straße 东京的天气很好。Привет, мир! مرحبا שלום नमस्ते 👩\u200d👧 "
    "\u200b<b>&amp;</b> https://a.b/c?d=e#f \r\n   end "
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits of a tokenizer: tokenizers with the same fingerprint give the same ids.

    Hashes the vocabulary, the ids of BOS, EOS and the unknown token, and the ids of a fixed text in many scripts (which
    depend on merges, normaliser and the default BOS). Padding token and chat template are left out, because they do not
    change the meaning of an id.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return short_digest(json.dumps([vocabulary, special, list(tokenizer(_PROBE)["input_ids"])]))


def rows_as_bytes(rows: Sequence[dict[str, Any] | None]) -> bytes:
    return b"".join(json.dumps(row, sort_keys=True, default=str).encode() + b"\n" for row in rows)


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def check_same_tokenizer(role: str, tokenizer: Any, other_role: str, other: Any) -> None:
    """Raise a UserError unless both tokenizers give the same ids: token rewards belong to ids.

    Logs a line if the chat templates differ.
    """
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise UserError(
            f"{role} and {other_role} have different tokenizers, but token rewards belong to token ids: "
            "choose models that share a tokenizer"
        )
    log_if_templates_differ(role, tokenizer, other_role, other)


def log_if_templates_differ(role: str, tokenizer: Any, other_role: str, other: Any) -> None:
    """Log a line if two models have different chat templates: the pairs are rendered with the second one's."""
    if tokenizer.chat_template and other.chat_template and tokenizer.chat_template != other.chat_template:
        log_once(
            f"  {role} and {other_role} have different chat templates: training uses the template of the {other_role}; "
            "use it with the trained model, too"
        )


def check_table_tokenizer(table: pa.Table, tokenizer: Any, path: str, model: str) -> None:
    """Raise a UserError unless a table was made with this tokenizer."""
    made_with = provenance_of(table).get("tokenizer")
    if made_with is not None and made_with != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"'{path}' was made with another tokenizer than that of '{model}': name a model that shares the table's "
            "tokenizer, or carry the scores over to this one (sepo transfer)"
        )
