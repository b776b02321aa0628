"""Text pairs -> token ids with a fixed prompt boundary.

    rows (loading.py) --normalise_row--> TextPair --tokenize_pairs--> table of pairs --split_pairs--> train, held out
                               prompt, chosen, rejected           *_ids, int32

The boundary between prompt and response is set once, here. `prompt_ids` are the input of generation, both responses
of a pair share them, and a response starts with the first token that the model would generate. A row that cannot be
used raises `DropRow` internally and is counted in the `DataReport` under one of the `DROP_REASONS`. No row is dropped
silently, and bad data never ends in a traceback.

Text of a dataset cannot become structure. A separator splits a control token typed in a message ("<|im_end|>") before
the chat template is rendered (chat.py). The separator is an extra token of a private copy of the tokenizer: the whole
text is still tokenised in one pass, and the id of the separator is removed afterwards.

Cost: three encodings a pair (prompt, prompt + chosen, prompt + rejected), in batches through the Rust tokenizer.
4,538 AlpacaEval pairs (2.3 M tokens) take about 4 s on two cores.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer

from sepo.bars import progress_bar
from sepo.data.chat import ChatWriter, Guard
from sepo.data.conversation import CONVERSATION, PROMPT_KEY, conversation_text, prompt_key
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint, update_digest
from sepo.data.loading import note_unread_columns, read_rows, relevant_columns, require_dataset
from sepo.data.messages import DropRow
from sepo.data.ragged import ragged
from sepo.data.rows import ROWS_AT_ONCE, DataReport, TextPair, normalise_row, transcript_text
from sepo.data.tables import make_table, with_provenance
from sepo.data.templates import any_of, probe_template, special_tokens
from sepo.data.thinking import THINKING
from sepo.errors import UserError, check_number, wrong_type


class _Item(NamedTuple):
    """A pair as guarded text (see `chat.Guard`), ready to be tokenised."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool


@dataclass
class Encoder:
    """A tokenizer with the properties needed to encode pairs, found once by probing.

    Attributes:
        backend: private copy of the fast tokenizer with one extra token, the separator.
        guard: splits control tokens typed in a text. Control tokens are the special tokens and those that the chat
            template writes around a turn.
        separator_id: id of the separator.
        control_ids: ids of the control tokens except the unknown token, which ordinary text may produce.
        head: ids that the tokenizer puts before any text (its BOS), usually one or none.
        tail: ids after a plain-text response: the EOS.
        dummy_prefix: the tokenizer puts a space before text that follows a special token (some SentencePiece).
        writer: renders conversations (None: no chat template).
        chat_tail: ids after a rendered response: the EOS if the template has no end-of-turn token.
    """

    tokenizer: Any
    backend: Tokenizer
    guard: Guard
    separator_id: int
    control_ids: frozenset[int]
    head: list[int]
    tail: list[int]
    dummy_prefix: bool
    writer: ChatWriter | None = None
    chat_tail: list[int] = field(default_factory=list)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise guarded texts without BOS and EOS."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            [i for i in encoding.ids if i != self.separator_id] if self.guard.separator in text else encoding.ids
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def encode_alone(self, text: str) -> list[int]:
        """Tokenise a response by itself, without the space that some tokenizers put before every text."""
        (ids,) = self.encode([self.guard.separator + text])
        if not self.dummy_prefix:
            return ids
        newline, anchored = self.encode(["\n", "\n" + text])
        if anchored[: len(newline)] == newline:
            return anchored[len(newline) :]
        is_bare_space = bool(ids) and self.backend.id_to_token(ids[0]) == "▁"
        return ids[1:] if is_bare_space and not text.startswith(" ") else ids

    def item(self, pair: TextPair, report: DataReport) -> _Item:
        """Write the text of the prompt, and of each response up to its end of turn."""
        if isinstance(pair.prompt, str):
            if self.writer is not None:
                report.note(PLAIN_TEXT)
            return _Item(self.guard(pair.prompt), self.guard(pair.chosen), self.guard(pair.rejected), False)
        if self.writer is None:
            if not pair.transcript:
                raise UserError(
                    "the dataset holds conversations, but the tokenizer has no chat template: use an "
                    "instruct model, add a chat template to the tokenizer, or use a dataset of plain texts"
                )
            prompt = transcript_text(pair.prompt)
            return _Item(self.guard(prompt), self.guard(" " + pair.chosen), self.guard(" " + pair.rejected), False)
        written = self.writer.write(pair)
        for note in written.notes:
            report.note(note)
        return _Item(*written[:3], True)

    def ids_of(self, item: _Item, prompt: list[int], chosen: list[int], rejected: list[int]) -> list[list[int]]:
        """Turn the ids of (prompt, prompt + chosen, prompt + rejected) into those of prompt, chosen and rejected."""
        responses = []
        for joint, text in ((chosen, item.chosen), (rejected, item.rejected)):
            keeps_prompt = joint[: len(prompt)] == prompt
            responses.append(joint[len(prompt) :] if keeps_prompt else self.encode_alone(text))
        for ids, text in zip((prompt, *responses), (item.prompt, item.chosen, item.rejected), strict=True):
            # Checked on every text, because a normaliser might create a control token.
            if sum(i in self.control_ids for i in ids) != count_matches(self.guard.control, text):
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
        """Number of leading ids that truncation keeps: the BOS, unless it also marks later turns."""
        if not prompt:
            return 0
        if self.head and prompt[: len(self.head)] == self.head:
            return len(self.head)
        return int(prompt[0] == self.tokenizer.bos_token_id and prompt[0] not in prompt[1:])


def count_matches(pattern: re.Pattern, text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def make_encoder(tokenizer: Any, options: Mapping[str, Any]) -> Encoder:
    """Probe a tokenizer; `options` are keywords for its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        if not hasattr(tokenizer, "get_vocab"):
            raise wrong_type("tokenizer", tokenizer, "a fast tokenizer in memory (load_tokenizer gives one)")
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
    template = probe_template(tokenizer, options)
    guard = Guard(
        any_of(special_tokens(tokenizer)) if template is None else template.control,
        any_of(()) if template is None else template.in_response,
        separator,
    )
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoder = Encoder(
        tokenizer=tokenizer,
        backend=backend,
        guard=guard,
        separator_id=backend.token_to_id(separator) or 0,
        control_ids=frozenset(
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if guard.control.fullmatch(token.content) and index != tokenizer.unk_token_id
        ),
        head=head,
        tail=tail,
        dummy_prefix=False,
        writer=None if template is None else ChatWriter(tokenizer, template, guard, options),
        chat_tail=[] if template is None or template.end_token else tail,
    )
    after, newline, anchored = encoder.encode([separator + "a", "\n", "\na"])
    encoder.dummy_prefix = after != anchored[len(newline) :]
    return encoder


def tokenize_pairs(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    as_chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[pa.Table, DataReport]:
    """Turn the rows of a preference dataset into a table of token ids.

    The chat template renders conversations: the prompt ends with its generation prompt, a response with its
    end-of-turn token. Plain text gets the BOS if the tokenizer adds it by default, and an EOS after each response.
    HH-RLHF transcripts become conversations, or stay transcripts for a tokenizer without a chat template.

    Prompt and response are tokenised together. If the result begins with the prompt's ids, the rest are the response's
    ids; otherwise the response is tokenised by itself.

    Args:
        dataset: rows from `load_preferences`. Without a column `pair_id` the row number is the id.
        tokenizer: a fast Transformers tokenizer.
        max_length: most tokens of a prompt with one response. Longer responses are cut on the right, to at least one
            token.
        max_prompt_length: most tokens of a prompt. Longer prompts are cut on the left, after the BOS. None: a prompt is
            cut only if a pair does not fit. It is then cut to the length that the longest response to it leaves, but
            not below half of `max_length`, in all pairs of the prompt alike.
        as_chat: wrap plain-text prompts as one user turn.
        chat_template_kwargs: keywords for the chat template, such as `{"enable_thinking": False}`.
        progress: show a progress bar.

    Returns:
        A table of kind "pairs" and the report of dropped and truncated rows. The provenance of the table holds the
        settings above and the fingerprints of tokenizer, chat template and dataset.

    Raises:
        UserError: no row is usable; impossible lengths; a tokenizer without a fast backend; conversations (or
            `as_chat`) with a tokenizer without a chat template.
    """
    dataset = require_dataset("dataset", dataset)
    _check_lengths(max_length, max_prompt_length)
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise wrong_type("chat_template_kwargs", chat_template_kwargs, "keywords, such as {'enable_thinking': False}")
    options = dict(chat_template_kwargs or {})
    encoder = make_encoder(tokenizer, options)
    if as_chat and encoder.writer is None:
        raise UserError("`as_chat` needs a chat template, but the tokenizer has none: use an instruct model")
    report = DataReport(rows=len(dataset))
    note_unread_columns(dataset, report)
    digest = hashlib.sha256()
    dataset = relevant_columns(dataset)
    if "pair_id" in dataset.column_names and len(set(ids := dataset["pair_id"][:])) < len(ids):
        dataset = dataset.remove_columns("pair_id")
        report.note("numbered again, because pair_ids occur twice (were several datasets joined?)", len(dataset))
    encoded: list[_Encoded] = []
    markup = 0
    bar = progress_bar(progress, total=len(dataset), desc="tokenise", unit="row")
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        rows = read_rows(dataset, start, min(start + ROWS_AT_ONCE, len(dataset)))
        update_digest(digest, rows)
        items = []
        for pair_id, pair in _pairs(rows, start, as_chat, report):
            markup += _is_rendered(pair, encoder.guard.control)
            try:
                items.append((pair_id, pair, encoder.item(pair, report)))
            except DropRow as drop:
                report.drop(drop.reason, pair_id, drop.detail)
        encoded += _encode(items, encoder, report)
        bar.update(len(rows))
    bar.close()
    _check_markup(markup, report)
    table = _fitted(encoded, max_length, max_prompt_length, report)
    report.kept = len(table)
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
    if options:  # older tables without options keep their digests
        provenance["chat_template_kwargs"] = options
    return with_provenance(table, "pairs", provenance), report


PLAIN_TEXT = (
    "the prompt is plain text and stays plain text, though the tokenizer has a chat template: as_chat would wrap it as "
    "a user turn"
)
# Markup of chat templates of other model families, unknown to this tokenizer.
_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|end_of_text|endoftext|user|assistant"
    r"|system|end|start|return)\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<｜(?:User|Assistant)｜>"
)


def _is_rendered(pair: TextPair, control: re.Pattern) -> bool:
    """Does a pair hold markup of a chat template as text, where a template would write it?"""
    prompts = [pair.prompt] if isinstance(pair.prompt, str) else [message["content"] for message in pair.prompt]
    return any(
        _begins_with_markup(text, control) or _ends_with_markup(text, control) for text in prompts if text
    ) or any(_ends_with_markup(text, control) for text in (pair.chosen, pair.rejected))


def _begins_with_markup(text: str, control: re.Pattern) -> bool:
    text = text.lstrip()[:40]
    match = control.match(text) or _MARKUP.match(text)
    return match is not None and len(match[0]) > 2 and THINKING.fullmatch(match[0]) is None


def _ends_with_markup(text: str, control: re.Pattern) -> bool:
    text = text.rstrip()[-40:]
    return any(
        match.end() == len(text) and len(match[0]) > 2 and THINKING.fullmatch(match[0]) is None
        for pattern in (control, _MARKUP)
        for match in pattern.finditer(text)
    )


def _check_markup(rows: int, report: DataReport) -> None:
    if rows:
        report.note("the text holds markup of a chat template, read as text (was it rendered before?)", rows)
    if rows > _FEW_ROWS and rows > report.rows / 2:
        raise UserError(
            f"{rows:,} of {report.rows:,} rows hold a chat template's markup as text, such as a token that ends a "
            "turn, and a model would learn to type it: give the conversations as messages, not rendered"
        )


_FEW_ROWS = 2  # a dataset this small is a trial, so no error


class _Encoded(NamedTuple):
    """A pair as token ids, before truncation."""

    pair_id: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    kept_head: int
    conversation: str
    prompt_key: str


def _end_ids(encoder: Encoder) -> list[int]:
    """Ids that end a response: the EOS and the chat template's end of turn."""
    ids = {encoder.tokenizer.eos_token_id}
    if encoder.writer is not None:
        ids.update([*encoder.encode([encoder.writer.template.kept_end])[0], *encoder.chat_tail][-1:])
    return sorted(ids - {None})


def _check_lengths(max_length: int, max_prompt_length: int | None) -> None:
    check_number("max_length", max_length, whole=True, least=2)
    if max_prompt_length is not None:
        check_number("max_prompt_length", max_prompt_length, whole=True)
        if not 1 <= max_prompt_length < max_length:
            raise UserError(
                f"max_prompt_length is {max_prompt_length}: expected 1 to {max_length - 1}, so that max_length "
                f"{max_length} leaves room for a response"
            )


def _pairs(
    rows: Sequence[dict[str, Any] | None], start: int, as_chat: bool, report: DataReport
) -> Iterable[tuple[int, TextPair]]:
    for index, row in enumerate(rows, start):
        pair_id = index if row is None else row.get("pair_id", index)
        try:
            if row is None:
                raise DropRow("invalid Unicode")
            pair = normalise_row(row, as_chat=as_chat)
        except DropRow as drop:
            report.drop(drop.reason, pair_id, drop.detail)
            continue
        for note in pair.notes:
            report.note(note)
        yield pair_id, pair


def _encode(items: Sequence[tuple[int, TextPair, _Item]], encoder: Encoder, report: DataReport) -> Iterable[_Encoded]:
    texts = [
        text for *_, item in items for text in (item.prompt, item.prompt + item.chosen, item.prompt + item.rejected)
    ]
    encoded = encoder.encode(texts) if texts else []
    for (pair_id, pair, item), *ids in zip(items, encoded[::3], encoded[1::3], encoded[2::3], strict=True):
        try:
            prompt, chosen, rejected = encoder.ids_of(item, *ids)
            if chosen == rejected:
                raise DropRow("identical responses")
        except DropRow as drop:
            report.drop(drop.reason, pair_id, drop.detail)
            continue
        yield _Encoded(
            pair_id,
            _ids(prompt),
            _ids(chosen),
            _ids(rejected),
            encoder.kept_head(prompt),
            conversation_text(pair.messages, pair.tools),
            prompt_key(pair.messages),
        )


def _ids(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def _fitted(pairs: Sequence[_Encoded], max_length: int, max_prompt_length: int | None, report: DataReport) -> pa.Table:
    """Truncate the pairs and make their table.

    All pairs of a prompt truncate it to the same length, so that it stays one prompt.
    """
    longest: dict[bytes, int] = {}
    for pair in pairs:
        key = pair.prompt.tobytes()
        longest[key] = max(longest.get(key, 0), len(pair.chosen), len(pair.rejected))
    kept: list[_Encoded] = []
    columns: dict[str, list[np.ndarray]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for pair in pairs:
        parts = pair.prompt, pair.chosen, pair.rejected
        longest_response = longest[pair.prompt.tobytes()]
        if len(pair.prompt) + longest_response > max_length or len(pair.prompt) > (max_prompt_length or max_length):
            cut = truncate_pair(
                *(part.tolist() for part in parts),
                max_length=max_length,
                max_prompt_length=max_prompt_length,
                keep=pair.kept_head,
                longest_response=longest_response,
            )
            if cut[1] == cut[2]:
                report.drop("identical after truncation", pair.pair_id)
                continue
            report.truncated_prompts += len(cut[0]) < len(pair.prompt)
            report.truncated_responses += sum(len(cut[i]) < len(parts[i]) for i in (1, 2))
            parts = _ids(cut[0]), _ids(cut[1]), _ids(cut[2])
        kept.append(pair)
        for column, values in zip(columns.values(), parts, strict=True):
            column.append(values)
    talk = {
        "pair_id": [pair.pair_id for pair in kept],
        CONVERSATION: [pair.conversation for pair in kept],
        PROMPT_KEY: [pair.prompt_key for pair in kept],
    }
    return make_table("pairs", talk | {name: _list_column(ids) for name, ids in columns.items()})


def _list_column(ids: list[np.ndarray]) -> pa.Array:
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    return ragged(np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32, copy=False), lengths)


def truncate_pair(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    keep: int = 0,
    longest_response: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair to `max_length` tokens of prompt and response: the prompt on the left, responses on the right.

    >>> truncate_pair([1, 2, 3, 4], [5, 6, 7], [8], max_length=4, keep=1)
    ([1, 4], [5, 6], [8])

    Args:
        prompt: ids of the prompt.
        chosen: ids of the chosen response.
        rejected: ids of the rejected response.
        max_length: most tokens of the prompt with one response, at least 2.
        max_prompt_length: most tokens of the prompt; None: see `tokenize_pairs`.
        keep: leading ids of the prompt that stay (the BOS).
        longest_response: tokens of the longest response to this prompt in any pair; None: in this pair.
    """
    longest = max(len(chosen), len(rejected), longest_response or 0)
    limit = max(max_length // 2, max_length - longest) if max_prompt_length is None else max_prompt_length
    if len(prompt) > limit:
        keep = min(keep, limit)
        prompt = prompt[:keep] + prompt[len(prompt) - (limit - keep) :]
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]
