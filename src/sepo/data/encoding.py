"""Text pairs -> token ids with a firm prompt boundary.

    rows (loading.py) --normalise_row--> TextPair --tokenize_pairs--> table of pairs --split_pairs--> train, held out
                               prompt, chosen, rejected           *_ids, int32

The boundary between prompt and response is decided once, here, and never moves again: `prompt_ids` are what
generation would see, both responses of a pair share them, and a response starts with the first token that the
model would have to write. A row that cannot be used raises `DropRow` inside and is counted in the
`DataReport` under one of the fixed `DROP_REASONS`; nothing is dropped silently, and bad data never ends in a
traceback.

Text from the dataset cannot become structure. A control token typed in a message ("<|im_end|>") is cut in
two by a separator before the chat template sees it. The separator is an extra token of a private copy of the
tokenizer, so that the whole text is still tokenised in one pass, and its id is removed afterwards.

Cost: tokenising is three encodings a pair (prompt, prompt + chosen, prompt + rejected), in batches through
the Rust tokenizer: 4,538 AlpacaEval pairs (2.3 M tokens) take about 4 s on two cores.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm

from sepo.data.fingerprints import short_digest, tokenizer_fingerprint, update_digest
from sepo.data.loading import ROWS_AT_ONCE, read_rows, relevant_columns
from sepo.data.ragged import ragged
from sepo.data.rows import DataReport, DropRow, Message, TextPair, normalise_row, transcript_text
from sepo.data.tables import make_table, with_provenance
from sepo.data.templates import control_tokens, probe_template
from sepo.errors import UserError


class _Item(NamedTuple):
    """A pair as guarded text (see `_Encoder.guard`), ready to be tokenised."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool


@dataclass
class _Encoder:
    """A tokenizer with everything that text -> ids needs, found out once by probing it.

    Attributes:
        backend: private copy of the fast tokenizer with one more token, the separator.
        separator: text of that token, random, so that no dataset can contain it.
        control: matches every control token: the special ones, and those the chat template writes around a
            turn.
        control_ids: their ids, without the unknown token's, which ordinary text may produce.
        head: ids that the tokenizer puts before any text (its BOS), usually one or none.
        tail: ids after a plain-text response: the EOS.
        dummy_prefix: the tokenizer puts a space before text that follows a special token (some
            SentencePiece).
        turn_end: what the chat template writes after a response, as text (None: no usable template).
        kept_end: the part of it that a model generates: up to the end-of-turn token.
        chat_tail: ids after that: the EOS where the template has no end-of-turn token.
        trims: the template strips whitespace around the response.
    """

    tokenizer: Any
    backend: Tokenizer
    separator: str
    separator_id: int
    control: re.Pattern
    control_ids: frozenset[int]
    head: list[int]
    tail: list[int]
    dummy_prefix: bool
    turn_end: str | None = None
    kept_end: str = ""
    chat_tail: list[int] = field(default_factory=list)
    trims: bool = False

    def guard(self, text: str) -> str:
        """Cut every control token typed in `text` in two, so that it stays ordinary text."""
        pieces, start = [], 0
        while match := self.control.search(text, start):
            if len(match[0]) == 1:
                raise DropRow("control token in text")
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return self.separator.join([*pieces, text[start:]])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise guarded texts without adding a BOS or EOS."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            [i for i in encoding.ids if i != self.separator_id] if self.separator in text else encoding.ids
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def encode_alone(self, text: str) -> list[int]:
        """Tokenise a response by itself, without the space some tokenizers put before every text."""
        (ids,) = self.encode([self.separator + text])
        if not self.dummy_prefix:
            return ids
        newline, anchored = self.encode(["\n", "\n" + text])
        if anchored[: len(newline)] == newline:
            return anchored[len(newline) :]
        is_bare_space = bool(ids) and self.backend.id_to_token(ids[0]) == "▁"
        return ids[1:] if is_bare_space and not text.startswith(" ") else ids

    def item(self, pair: TextPair) -> _Item:
        """Render a pair: text of the prompt, and of each response up to its end of turn."""
        if isinstance(pair.prompt, str):
            return _Item(self.guard(pair.prompt), self.guard(pair.chosen), self.guard(pair.rejected), False)
        if self.turn_end is None:
            if not pair.transcript:
                raise UserError(
                    "the dataset holds conversations, but the tokenizer has no chat template: use an "
                    "instruct model, give the tokenizer a chat template, or use a dataset of plain texts"
                )
            prompt = transcript_text(pair.prompt)
            return _Item(self.guard(prompt), self.guard(" " + pair.chosen), self.guard(" " + pair.rejected), False)
        messages = [{"role": m["role"], "content": self.guard(m["content"])} for m in pair.prompt]
        try:
            prompt = self.render(messages, add_generation_prompt=True)
            chosen, rejected = (
                self._rendered_response(messages, prompt, self.guard(text)) for text in (pair.chosen, pair.rejected)
            )
        except DropRow:
            raise
        except Exception:  # the template is foreign code: whatever it raises, it refuses this conversation
            raise DropRow("refused by the chat template") from None
        return _Item(prompt, chosen, rejected, True)

    def _rendered_response(self, messages: list[Message], prompt: str, content: str) -> str:
        assert self.turn_end is not None
        full = self.render([*messages, {"role": "assistant", "content": content}])
        if full.startswith(prompt) and full.endswith(self.turn_end) and len(full) > len(prompt) + len(self.turn_end):
            response = full[len(prompt) : len(full) - len(self.turn_end)]
        else:  # the template opens the turn in another way than its generation prompt: place the text itself
            response = content.strip() if self.trims else content
        if not response.strip():
            raise DropRow("no response")
        return response + self.kept_end

    def ids_of(self, item: _Item, prompt: list[int], chosen: list[int], rejected: list[int]) -> list[list[int]]:
        """Turn tokens of (prompt, prompt + chosen, prompt + rejected) into prompt, chosen, rejected ids."""
        responses = []
        for joint, text in ((chosen, item.chosen), (rejected, item.rejected)):
            keeps_prompt = joint[: len(prompt)] == prompt
            responses.append(joint[len(prompt) :] if keeps_prompt else self.encode_alone(text))
        for ids, text in zip((prompt, *responses), (item.prompt, item.chosen, item.rejected), strict=True):
            # The promise about typed control tokens, checked on every text: a normaliser might make one.
            if sum(i in self.control_ids for i in ids) != len(self.control.findall(text)):
                raise DropRow("control token in text")
        if not all(responses):
            raise DropRow("no response")
        if item.is_chat:
            return [prompt, *(ids + self.chat_tail for ids in responses)]
        return [self.plain_prompt(prompt), *(ids + self.tail for ids in responses)]

    def plain_prompt(self, ids: list[int]) -> list[int]:
        if self.head or ids:
            return self.head + ids
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if start is not None:
                return [start]
        raise DropRow("empty prompt")

    def kept_head(self, prompt: list[int]) -> int:
        """Count the leading ids that truncation keeps: the BOS, if the first id is one and no turn marker."""
        if not prompt:
            return 0
        if self.head and prompt[: len(self.head)] == self.head:
            return len(self.head)
        return int(prompt[0] == self.tokenizer.bos_token_id and prompt[0] not in prompt[1:])


def _make_encoder(tokenizer: Any) -> _Encoder:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} has no fast (tokenizers) backend: use a model "
            "whose folder holds a tokenizer.json"
        )
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    bare, full = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    head = full[: starts[0]] if starts and bare else []
    separator = f"\ue000{secrets.token_hex(8)}\ue001"
    backend.add_special_tokens([AddedToken(separator, special=True, normalized=False)])
    encoder = _Encoder(
        tokenizer=tokenizer,
        backend=backend,
        separator=separator,
        separator_id=backend.token_to_id(separator) or 0,
        control=control_tokens(tokenizer),
        control_ids=frozenset(),
        head=head,
        tail=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        dummy_prefix=False,
    )
    after, newline, anchored = encoder.encode([separator + "a", "\n", "\na"])
    encoder.dummy_prefix = after != anchored[len(newline) :]
    if (template := probe_template(tokenizer)) is not None:
        encoder.control = template.control
        encoder.turn_end, encoder.kept_end, encoder.trims = template.turn_end, template.kept_end, template.trims
        encoder.chat_tail = [] if template.end_token else encoder.tail
    encoder.control_ids = frozenset(
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if encoder.control.fullmatch(token.content) and index != tokenizer.unk_token_id
    )
    return encoder


def tokenize_pairs(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    as_chat: bool = False,
    progress: bool = True,
) -> tuple[pa.Table, DataReport]:
    """Turn the rows of a preference dataset into a table of token ids.

    Conversations go through the chat template: the prompt ends with its generation prompt, a response with
    its end-of-turn token. Plain text gets the BOS if the tokenizer puts one by default, and an EOS after each
    response. HH-RLHF transcripts become conversations, or stay transcripts for a tokenizer without template.
    A response's ids are the rest of the joint tokenisation of prompt and response where that begins with the
    prompt's ids, and the response tokenised on its own elsewhere.

    Args:
        dataset: rows as `load_preferences` gives them (`pair_id` is the row number if there is none).
        tokenizer: a fast Transformers tokenizer.
        max_length: most tokens of a prompt with one response. What does not fit is cut from the right of the
            response, at least one token of which stays.
        max_prompt_length: most tokens of a prompt; longer ones are cut from the left, behind the BOS. None: a
            prompt is cut only if the pair does not fit, and then to what the longer response leaves, but to
            no less than half of `max_length`.
        as_chat: wrap plain-text prompts as one user turn.
        progress: show a progress bar.

    Returns:
        A table of kind "pairs" whose provenance holds the fingerprints of tokenizer, chat template and
        dataset and the settings above, and the report of what was dropped and truncated.

    Raises:
        UserError: no row is usable; impossible lengths; a tokenizer that has no fast backend; conversations
            (or `as_chat`) with a tokenizer that has no chat template.
    """
    _check_lengths(max_length, max_prompt_length)
    encoder = _make_encoder(tokenizer)
    if as_chat and encoder.turn_end is None:
        raise UserError("`as_chat` needs a chat template, but the tokenizer has none: use an instruct model")
    report = DataReport(rows=len(dataset))
    digest = hashlib.sha256()
    dataset = relevant_columns(dataset)
    tables = []
    bar = tqdm(total=len(dataset), desc="tokenise", unit="row", disable=not progress)
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        rows = read_rows(dataset, start, min(start + ROWS_AT_ONCE, len(dataset)))
        update_digest(digest, rows)
        items = list(_items(rows, start, encoder, as_chat, report))
        tables.append(_tokenize_batch(items, encoder, max_length, max_prompt_length, report))
        bar.update(len(rows))
    bar.close()
    report.kept = sum(len(table) for table in tables)
    if not report.kept:
        drops = report.reasons() or "there is no row"
        raise UserError(f"the dataset has no usable pair in {report.rows:,} rows: {drops}; check columns and format")
    provenance = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": short_digest(str(tokenizer.chat_template or "")),
        "dataset": digest.hexdigest()[:16],
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "as_chat": as_chat,
        "end_ids": _end_ids(encoder),
    }
    return with_provenance(pa.concat_tables(tables), "pairs", provenance), report


def _end_ids(encoder: _Encoder) -> list[int]:
    """Ids that end a response: the EOS, and the end of turn of the chat template."""
    ids = {encoder.tokenizer.eos_token_id}
    if encoder.turn_end is not None:
        ids.update([*encoder.encode([encoder.kept_end])[0], *encoder.chat_tail][-1:])
    return sorted(ids - {None})


def _check_lengths(max_length: int, max_prompt_length: int | None) -> None:
    if max_length < 2:
        raise UserError(f"max_length is {max_length}: expected at least 2, one token of prompt and one of response")
    if max_prompt_length is not None and not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"max_prompt_length is {max_prompt_length}: expected 1 to {max_length - 1}, so that max_length "
            f"{max_length} leaves room for a response"
        )


def _items(
    rows: Sequence[dict[str, Any] | None], start: int, encoder: _Encoder, as_chat: bool, report: DataReport
) -> Iterable[tuple[int, _Item]]:
    for index, row in enumerate(rows, start):
        pair_id = index if row is None else row.get("pair_id", index)
        try:
            if row is None:
                raise DropRow("invalid Unicode")
            yield pair_id, encoder.item(normalise_row(row, as_chat=as_chat))
        except DropRow as drop:
            report.drop(drop.reason, pair_id)


def _tokenize_batch(
    items: Sequence[tuple[int, _Item]],
    encoder: _Encoder,
    max_length: int,
    max_prompt_length: int | None,
    report: DataReport,
) -> pa.Table:
    texts = [
        text for _, item in items for text in (item.prompt, item.prompt + item.chosen, item.prompt + item.rejected)
    ]
    encoded = encoder.encode(texts) if texts else []
    pair_ids: list[int] = []
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for (pair_id, item), *ids in zip(items, encoded[::3], encoded[1::3], encoded[2::3], strict=True):
        try:
            parts = encoder.ids_of(item, *ids)
            fitted = truncate_pair(
                *parts,
                max_length=max_length,
                max_prompt_length=max_prompt_length,
                keep=encoder.kept_head(parts[0]),
            )
            if fitted[1] == fitted[2]:
                raise DropRow("identical responses" if parts[1] == parts[2] else "identical after truncation")
        except DropRow as drop:
            report.drop(drop.reason, pair_id)
            continue
        report.truncated_prompts += len(fitted[0]) < len(parts[0])
        report.truncated_responses += sum(len(fitted[i]) < len(parts[i]) for i in (1, 2))
        pair_ids.append(pair_id)
        for column, values in zip(columns.values(), fitted, strict=True):
            column.append(values)
    return make_table("pairs", {"pair_id": pair_ids, **{name: _list_column(ids) for name, ids in columns.items()}})


def _list_column(ids: list[list[int]]) -> pa.Array:
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    values = np.fromiter((i for row in ids for i in row), dtype=np.int32, count=int(lengths.sum()))
    return ragged(values, lengths)


def truncate_pair(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    keep: int = 0,
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair to `max_length` tokens of prompt and response: the prompt on the left, responses on the
    right.

    >>> truncate_pair([1, 2, 3, 4], [5, 6, 7], [8], max_length=4, keep=1)
    ([1, 4], [5, 6], [8])

    Args:
        prompt: ids of the prompt.
        chosen: ids of the chosen response.
        rejected: ids of the rejected response.
        max_length: most tokens of the prompt with one response, at least 2.
        max_prompt_length: most tokens of the prompt; None: see `tokenize_pairs`.
        keep: leading ids of the prompt that stay (the BOS).
    """
    longest = max(len(chosen), len(rejected))
    limit = max(max_length // 2, max_length - longest) if max_prompt_length is None else max_prompt_length
    if len(prompt) > limit:
        keep = min(keep, limit)
        prompt = prompt[:keep] + prompt[len(prompt) - (limit - keep) :]
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]
