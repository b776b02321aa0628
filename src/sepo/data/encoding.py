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

Cost: three encodings a pair (prompt, prompt + chosen, prompt + rejected), in batches through the Rust tokenizer, and
three renderings: 4,538 AlpacaEval pairs (2.3 M tokens) take 10 to 12 s of CPU time, 40 % of it in the tokenizer.
Processes share the rows in parts of 1,000 (`workers.py`); only the hash of the rows, and truncation, are done in this
one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import AddedToken, Tokenizer

from sepo.bars import progress_bar
from sepo.data.chat import ChatWriter, Guard
from sepo.data.conversation import CONVERSATION, PROMPT_KEY, conversation_text, prompt_key
from sepo.data.fingerprints import rows_as_bytes, short_digest, tokenizer_fingerprint
from sepo.data.loading import note_unread_columns, read_rows, relevant_columns, require_dataset
from sepo.data.messages import DropRow
from sepo.data.ragged import SIDES, Ragged, flat, read_lengths
from sepo.data.rows import ROWS_AT_ONCE, DataReport, TextPair, normalise_row, transcript_text
from sepo.data.tables import CONTEXT_COLUMNS, CONTEXT_FIELDS, PLAIN_TEXT, SEVERAL_TURNS, make_table
from sepo.data.templates import any_of, probe_template, special_tokens
from sepo.data.thinking import THINKING
from sepo.errors import UserError, check_number, wrong_type

# Starting a worker costs as much as tokenising some 3,000 rows.
ROWS_OF_A_WORKER = 10_000


class _Item(NamedTuple):
    """A pair as guarded text (see `chat.Guard`), ready to be tokenised."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool
    segments: tuple[list[str], list[str]] | None = None  # as in `chat.Written`


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

    def item(self, pair: TextPair, notes: list[str]) -> _Item:
        """Write the text of the prompt, and of each response up to its end of turn. Remarks are added to `notes`."""
        if isinstance(pair.prompt, str):
            if self.writer is not None:
                notes.append(PLAIN_NOTE)
            return _Item(self.guard(pair.prompt), self.guard(pair.chosen), self.guard(pair.rejected), False)
        if self.writer is None:
            if pair.turns is not None and pair.transcript:
                raise DropRow("several turns", "the tokenizer has no chat template")
            if not pair.transcript:
                raise UserError(
                    "the dataset holds conversations, but the tokenizer has no chat template: use an "
                    "instruct model, add a chat template to the tokenizer, or use a dataset of plain texts"
                )
            prompt = transcript_text(pair.prompt)
            return _Item(self.guard(prompt), self.guard(" " + pair.chosen), self.guard(" " + pair.rejected), False)
        written = self.writer.write(pair)
        notes += written.notes
        return _Item(*written[:3], True, written.segments)

    def ids_of(self, item: _Item, prompt: list[int], chosen: list[int], rejected: list[int]) -> list[list[int]]:
        """Turn the ids of (prompt, prompt + chosen, prompt + rejected) into those of prompt, chosen and rejected."""
        responses = []
        for joint, text in ((chosen, item.chosen), (rejected, item.rejected)):
            keeps_prompt = joint[: len(prompt)] == prompt
            responses.append(joint[len(prompt) :] if keeps_prompt else self.encode_alone(text))
        for ids, text in zip((prompt, *responses), (item.prompt, item.chosen, item.rejected), strict=True):
            # Checked on every text, because a normaliser might create a control token.
            self.check_control_ids(ids, text)
        if not all(responses):
            raise DropRow("no response")
        if item.is_chat:
            return [prompt, *(ids + self.chat_tail for ids in responses)]
        return [self.plain_prompt(prompt), *(ids + self.tail for ids in responses)]

    def row_of(self, item: _Item, *ids: list[int]) -> tuple[list[int], ...]:
        """The columns `_PARTS` and `CONTEXT_COLUMNS` of a pair; arguments as in `ids_of`."""
        prompt, chosen, rejected = self.ids_of(item, *ids)
        if item.segments is None:
            return prompt, chosen, rejected, [], [], [], []
        from sepo.data.turns import ids_of_turns

        sides = [ids_of_turns(self, item.prompt, segments) for segments in item.segments]
        return prompt, sides[0].ids, sides[1].ids, *sides[0][1:], *sides[1][1:]

    def check_control_ids(self, ids: list[int], text: str) -> None:
        """Raise DropRow unless the control tokens among the ids are those that the text spells out."""
        if sum(map(self.control_ids.__contains__, ids)) != sum(1 for _ in self.guard.control.finditer(text)):
            raise DropRow("control token in text")

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
    workers: int | Literal["auto"] | PartsOf = "auto",
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
        workers: processes that tokenise; 1: this one alone. "auto": one for every 10,000 rows, at most one a core. The
            result is the same. Or a function that yields the encoded parts (`stages.encode`).

    Returns:
        A table of kind "pairs" and the report of dropped and truncated rows. The provenance of the table holds the
        settings above and the fingerprints of tokenizer, chat template and dataset.

    Raises:
        UserError: no row is usable; impossible lengths; a tokenizer without a fast backend; conversations (or
            `as_chat`) with a tokenizer without a chat template.
    """
    options = Options(max_length, max_prompt_length, as_chat, chat_template_kwargs, progress, workers)
    parts, provenance, report = tokenize_into(list[pa.Table], dataset, tokenizer, options)
    return pairs_of(pa.concat_tables(parts), provenance), report


class Options(NamedTuple):
    """The settings of `tokenize_pairs`."""

    max_length: int = 2048
    max_prompt_length: int | None = None
    as_chat: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    progress: bool = True
    workers: int | Literal["auto"] | PartsOf = "auto"


class Parts(Protocol):
    """Keeps the parts of a table: a list, or `spool.Spool` for a table larger than memory."""

    def append(self, table: pa.Table, /) -> None: ...

    def __iter__(self) -> Iterator[pa.Table]: ...


P = TypeVar("P", bound=Parts)
T = TypeVar("T")


def tokenize_into(
    make_parts: Callable[[], P], dataset: datasets.Dataset, tokenizer: Any, options: Options
) -> tuple[P, dict[str, Any], DataReport]:
    """`tokenize_pairs` for a dataset whose pairs may be larger than memory.

    Args:
        make_parts: makes an empty `Parts` for tables of the schema `ENCODED`.

    Returns:
        the pairs in parts of the schema `ENCODED` (`pairs_of` makes tables of pairs of them), the provenance of a
        table of them, and the report.
    """
    dataset = require_dataset("dataset", dataset)
    encoder = _checked_encoder(tokenizer, options)
    report = DataReport(rows=len(dataset))
    note_unread_columns(dataset, report)
    dataset = relevant_columns(dataset)
    if "pair_id" in dataset.column_names and _repeats(dataset):
        dataset = dataset.remove_columns("pair_id")
        report.note("numbered again, because pair_ids occur twice (were several datasets joined?)", len(dataset))
    digest = hashlib.sha256()
    parts = make_parts()
    too_long = _TooLong(options.max_length, options.max_prompt_length)
    markup = chats = 0
    several = False
    with (
        closing(_encoded(dataset, encoder, options.as_chat, options.workers)) as encoded,
        progress_bar(options.progress, total=len(dataset), desc="tokenise", unit="row") as bar,
    ):
        for part in encoded:
            digest.update(part.digested)
            for drop in part.drops:
                report.drop(*drop)
            for note in part.notes:
                report.note(note)
            markup += part.markup
            chats += part.chats
            several |= has_context(part.table)
            report.kept += len(part.table)
            too_long.add(part.table)
            parts.append(part.table)
            bar.update(part.rows)
    _check_markup(markup, report)
    if too_long.any:
        whole, parts = parts, make_parts()
        for table in whole:
            parts.append(too_long.truncated(table, report))
    if not report.kept:
        drops = report.reasons() or "there is no row"
        raise UserError(f"the dataset has no usable pair in {report.rows:,} rows: {drops}; check columns and format")
    provenance = _provenance(encoder, options, digest.hexdigest()[:16])
    # Recorded only where they hold, so that other tables keep their digests.
    facts = {SEVERAL_TURNS: several, PLAIN_TEXT: not chats and encoder.writer is not None}
    return parts, {**provenance, **{name: True for name, holds in facts.items() if holds}}, report


def has_context(table: pa.Table) -> bool:
    """Whether a response of a table has several assistant turns, with tokens between them."""
    names = [name for name in CONTEXT_COLUMNS if name.endswith("_ids") and name in table.column_names]
    return any(flat(table.column(name))[0].size for name in names)


def _repeats(dataset: datasets.Dataset) -> bool:
    """Whether a `pair_id` occurs twice."""
    ids = dataset.with_format("arrow")["pair_id"][:]
    # Counting distinct ids takes 400 bytes an id.
    if not ids.null_count and pc.all(pc.greater(ids[1:], ids[:-1])).as_py():
        return False
    return pc.count_distinct(ids, mode="all").as_py() < len(ids)


def _provenance(encoder: Encoder, options: Options, dataset: str) -> dict[str, Any]:
    provenance = {
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "chat_template": short_digest(str(encoder.tokenizer.chat_template or "")),
        "dataset": dataset,
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "as_chat": options.as_chat,
        "end_ids": end_ids_of(encoder),
    }
    if options.chat_template_kwargs:  # older tables without options keep their digests
        provenance["chat_template_kwargs"] = dict(options.chat_template_kwargs)
    return provenance


def _checked_encoder(tokenizer: Any, options: Options) -> Encoder:
    """The encoder of `tokenize_pairs`, after a check of its arguments."""
    max_length, max_prompt_length, as_chat, keywords, *_ = options
    check_number("max_length", max_length, whole=True, least=2)
    if max_prompt_length is not None:
        check_number("max_prompt_length", max_prompt_length, whole=True)
        if not 1 <= max_prompt_length < max_length:
            raise UserError(
                f"max_prompt_length is {max_prompt_length}: expected 1 to {max_length - 1}, so that max_length "
                f"{max_length} leaves room for a response"
            )
    if not isinstance(keywords, Mapping | None):
        raise wrong_type("chat_template_kwargs", keywords, "keywords, such as {'enable_thinking': False}")
    encoder = make_encoder(tokenizer, dict(keywords or {}))
    if as_chat and encoder.writer is None:
        raise UserError("`as_chat` needs a chat template, but the tokenizer has none: use an instruct model")
    return encoder


PLAIN_NOTE = (
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


# Yields the parts of a dataset in order, encoded elsewhere, for an encoder and `as_chat`.
PartsOf = Callable[[datasets.Dataset, Encoder, bool], Generator["Encoded"]]


class Encoded(NamedTuple):
    """Consecutive rows of a dataset as token ids, before truncation.

    Attributes:
        table: the columns of a table of pairs, and `kept_head`, the leading ids of the prompt that truncation keeps.
        drops, notes: arguments for `DataReport`, in order.
        markup: rows that hold markup of a chat template as text.
        chats: pairs that the chat template rendered.
        digested: the rows as bytes, for the fingerprint of the dataset.
    """

    rows: int
    table: pa.Table
    drops: list[tuple[str, int, str]]
    notes: list[str]
    markup: int
    chats: int
    digested: bytes


def end_ids_of(encoder: Encoder) -> list[int]:
    """Ids that end a response: the EOS and the chat template's end of turn."""
    ids = {encoder.tokenizer.eos_token_id}
    if encoder.writer is not None:
        ids.update([*encoder.encode([encoder.writer.template.kept_end])[0], *encoder.chat_tail][-1:])
    return sorted(ids - {None})


def _encoded(
    dataset: datasets.Dataset, encoder: Encoder, as_chat: bool, workers: int | Literal["auto"] | PartsOf
) -> Generator[Encoded]:
    """The rows of a dataset as token ids, in parts of `ROWS_AT_ONCE`."""
    if callable(workers):
        yield from workers(dataset, encoder, as_chat)
        return
    starts = range(0, len(dataset), ROWS_AT_ONCE)
    number = _workers(workers, len(dataset), encoder)
    if number == 1:
        for start in starts:
            rows = read_rows(dataset, start, min(start + ROWS_AT_ONCE, len(dataset)))
            yield encode_rows(encoder, as_chat, start, rows)
        return
    from sepo.data.workers import in_workers

    arrow = dataset.with_format("arrow")
    parts = ((start, _to_bytes(arrow[start : start + ROWS_AT_ONCE])) for start in starts)
    with closing(in_workers(_encode_part, (encoder, as_chat), parts, number)) as results:
        yield from results


def _workers(workers: int | Literal["auto"], rows: int, encoder: Encoder) -> int:
    if workers != "auto":
        check_number("workers", workers, whole=True, least=1)
        return min(workers, -(-rows // ROWS_AT_ONCE))
    if rows < 2 * ROWS_OF_A_WORKER:
        return 1
    from sepo.data.workers import cores

    # A worker imports the tokenizer's class, but not a script or notebook that defines one.
    of_library = type(encoder.tokenizer).__module__.startswith("transformers.")
    return max(1, min(cores(), rows // ROWS_OF_A_WORKER)) if of_library else 1


def _encode_part(common: tuple[Encoder, bool], part: tuple[int, bytes]) -> Encoded:
    """`encode_rows` in a worker."""
    (encoder, as_chat), (start, content) = common, part
    rows = datasets.Dataset(pa.ipc.open_stream(content).read_all())
    return encode_rows(encoder, as_chat, start, read_rows(rows, 0, len(rows)))


def _to_bytes(table: pa.Table) -> bytes:
    """A table without the rest of its buffers, which pickle would keep."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def encode_rows(encoder: Encoder, as_chat: bool, start: int, rows: Sequence[dict[str, Any] | None]) -> Encoded:
    """Tokenise rows from number `start` on. The result depends on these rows alone, whatever was encoded before."""
    if encoder.writer is not None:
        encoder.writer.forget()
    drops: list[tuple[str, int, str]] = []
    notes: list[str] = []
    markup = 0
    items: list[tuple[int, TextPair, _Item]] = []
    for index, row in enumerate(rows, start):
        pair_id = index if row is None else row.get("pair_id", index)
        try:
            if row is None:
                raise DropRow("invalid Unicode")
            pair = normalise_row(row, as_chat=as_chat)
            notes += pair.notes
            markup += _is_rendered(pair, encoder.guard.control)
            items.append((pair_id, pair, encoder.item(pair, notes)))
        except DropRow as drop:
            drops.append((drop.reason, pair_id, drop.detail))
    kept = []
    chats = 0
    texts = [item.prompt + side for *_, item in items for side in ("", item.chosen, item.rejected)]
    encoded = encoder.encode(texts) if texts else []
    for (pair_id, pair, item), *ids in zip(items, encoded[::3], encoded[1::3], encoded[2::3], strict=True):
        try:
            prompt, chosen, rejected, *context = encoder.row_of(item, *ids)
            if chosen == rejected:
                raise DropRow("identical responses")
        except DropRow as drop:
            drops.append((drop.reason, pair_id, drop.detail))
            continue
        chats += item.is_chat
        talk = conversation_text(pair.messages, pair.tools), prompt_key(pair.messages)
        kept.append((pair_id, prompt, chosen, rejected, *talk, encoder.kept_head(prompt), *context))
    columns = zip(*kept, strict=True) if kept else [()] * len(ENCODED)
    table = pa.table(dict(zip(ENCODED.names, columns, strict=True)), ENCODED)
    return Encoded(len(rows), table, drops, notes, markup, chats, rows_as_bytes(rows))


_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
ENCODED = pa.schema(
    [
        ("pair_id", pa.int64()),
        *((name, pa.list_(pa.int32())) for name in _PARTS),
        (CONVERSATION, pa.string()),
        (PROMPT_KEY, pa.string()),
        ("kept_head", pa.int64()),
        *CONTEXT_FIELDS,
    ]
)


def pairs_of(table: pa.Table, provenance: Mapping[str, Any]) -> pa.Table:
    """A table of pairs with its provenance, of rows in the schema `ENCODED`.

    Only a dataset with responses of several turns has the columns of their context.
    """
    left_out = () if provenance.get(SEVERAL_TURNS) else CONTEXT_COLUMNS
    columns = {name: table.column(name) for name in table.column_names if name not in left_out}
    return make_table("pairs", columns, provenance)


class _TooLong:
    """Truncates pairs. All pairs of a prompt truncate it to the same length, so that it stays one prompt.

    Of the prompts of pairs that are too long, 12 bytes are kept: a hash, which two of a million prompts share with a
    chance of 3e-8, and the tokens of the longest response.
    """

    def __init__(self, max_length: int, max_prompt_length: int | None):
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self._keys: list[np.ndarray] = []
        self._longest: list[np.ndarray] = []

    @property
    def any(self) -> bool:
        """Whether there are such pairs."""
        return bool(self._keys)

    def add(self, table: pa.Table) -> None:
        """Look at a part; all of them before the first is truncated."""
        prompts = Ragged(table.column("prompt_ids"))
        responses = np.maximum(*(read_lengths(table, side) for side in SIDES))
        limit = self.max_prompt_length or self.max_length
        rows = np.flatnonzero((prompts.lengths + responses > self.max_length) | (prompts.lengths > limit))
        if len(rows):
            self._keys.append(_keys(prompts, rows))
            self._longest.append(responses[rows].astype(np.int32))

    @cached_property
    def _prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes in ascending order, each once, and the tokens of the longest response to each."""
        keys, inverse = np.unique(np.concatenate(self._keys), return_inverse=True)
        longest = np.zeros(len(keys), np.int32)
        np.maximum.at(longest, inverse, np.concatenate(self._longest))
        return keys, longest

    def truncated(self, table: pa.Table, report: DataReport) -> pa.Table:
        """A part, truncated; counts in the report what was."""
        known, lengths = self._prompts
        prompts = Ragged(table.column("prompt_ids"))
        keys = _keys(prompts, np.arange(len(table)))
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        cut_rows = known[places] == keys
        if not cut_rows.any():
            return table
        kept = []
        for row, is_cut, longest in zip(table.to_pylist(), cut_rows, lengths[places].tolist(), strict=True):
            if is_cut:
                chosen, rejected = (_as_read(row, side) for side in SIDES)
                parts = (row["prompt_ids"], chosen, rejected)
                cut = truncate_pair(
                    *parts,
                    max_length=self.max_length,
                    max_prompt_length=self.max_prompt_length,
                    keep=row["kept_head"],
                    longest_response=longest,
                )
                row.update(prompt_ids=cut[0], **_from_read("chosen", cut[1]), **_from_read("rejected", cut[2]))
                if row["chosen_ids"] == row["rejected_ids"] or not (row["chosen_ids"] and row["rejected_ids"]):
                    report.drop("identical after truncation", row["pair_id"])
                    report.kept -= 1
                    continue
                report.truncated_prompts += len(cut[0]) < len(parts[0])
                report.truncated_responses += sum(len(cut[i]) < len(parts[i]) for i in (1, 2))
            kept.append(row)
        return pa.Table.from_pylist(kept, ENCODED)


def _as_read(row: Mapping[str, Any], side: str) -> list[tuple[int, bool]]:
    """The tokens of a response in the order in which a model reads them, and whether each is the assistant's."""
    tokens = [(token, True) for token in row[f"{side}_ids"]]
    context = zip(row[f"{side}_context_at"], row[f"{side}_context_ids"], strict=True)
    for inserted, (place, token) in enumerate(context):
        tokens.insert(place + inserted, (token, False))
    return tokens


def _from_read(side: str, tokens: Sequence[tuple[int, bool]]) -> dict[str, list[int]]:
    """The columns of `_as_read`, without context that no token of the assistant follows."""
    counts = np.cumsum([is_own for _, is_own in tokens])
    context = [i for i, (_, is_own) in enumerate(tokens) if not is_own and counts[i] < counts[-1]]
    return {
        f"{side}_ids": [token for token, is_own in tokens if is_own],
        f"{side}_context_ids": [tokens[i][0] for i in context],
        f"{side}_context_at": counts[context].tolist(),
    }


def _keys(prompts: Ragged, rows: np.ndarray) -> np.ndarray:
    digests = (hashlib.blake2b(prompts[row].tobytes(), digest_size=8).digest() for row in rows.tolist())
    return np.frombuffer(b"".join(digests), np.uint64)


def truncate_pair(
    prompt: list[int],
    chosen: list[T],
    rejected: list[T],
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    keep: int = 0,
    longest_response: int | None = None,
) -> tuple[list[int], list[T], list[T]]:
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
