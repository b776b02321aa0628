"""Preference rows: any format -> validated pairs -> token ids with a firm prompt boundary.

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
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm

from sepo.errors import UserError, nearest, one_line
from sepo.loading import COLUMNS
from sepo.tables import flat, make_table, provenance_of, ragged, with_provenance

ROLES = frozenset({"system", "user", "assistant", "tool"})

DROP_REASONS: dict[str, str] = {
    "missing value": "the prompt, the chosen or the rejected response is null",
    "wrong type": "a value is neither text nor a list of messages, or text and messages are mixed",
    "unknown role": "a message has a role other than system, user, assistant or tool",
    "invalid Unicode": "a text cannot be encoded as UTF-8, for example an unpaired surrogate",
    "no response": "a response is blank, or a conversation does not end with an assistant turn",
    "identical responses": "chosen and rejected are the same",
    "no shared prompt": "there is no prompt, and chosen and rejected do not share one",
    "empty prompt": "there is no message, or no text and neither a BOS nor an EOS token to start from",
    "refused by the chat template": "the chat template cannot render the conversation",
    "control token in text": "a control token typed in the text cannot be told apart from a real one",
    "identical after truncation": "chosen and rejected differ only beyond the maximum length",
}

_BATCH = 1000  # rows tokenised at once: enough to keep the Rust tokenizer busy, little memory

Message = dict[str, str]


class DropRow(Exception):
    """A row that gives no pair; `reason` is a key of `DROP_REASONS`. Counted, never shown to the user."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TextPair(NamedTuple):
    """One validated preference.

    Attributes:
        prompt: plain text, or the messages before the response (`[{"role": ..., "content": ...}, ...]`).
        chosen: text of the preferred response (for messages: the content of the assistant's last turn).
        rejected: text of the dispreferred response.
        transcript: the messages were read from an HH-RLHF transcript, so a model without a chat template
            can be given the transcript as plain text.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str
    transcript: bool = False


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def normalise_row(row: Mapping[str, Any], *, as_chat: bool = False) -> TextPair:
    """Turn one row of any preference format into a `TextPair`.

    Formats: three texts; two texts that share their beginning (the prompt then ends at the last shared
    whitespace); three message lists; two message lists that share their leading messages; a text prompt with
    message lists that repeat it (UltraFeedback-binarized); HH-RLHF transcripts, whole or split in prompt and
    responses. Messages are `{"role", "content"}` or `{"from", "value"}`.

    >>> normalise_row({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    TextPair(prompt='The sky is', chosen=' blue.', rejected=' green.', transcript=False)

    Args:
        row: values by column name; columns other than prompt, chosen and rejected are ignored.
        as_chat: wrap a plain-text prompt as one user turn.

    Raises:
        DropRow: the row gives no pair (see `DROP_REASONS`).
    """
    chosen, rejected = _value(row.get("chosen")), _value(row.get("rejected"))
    prompt = _value(row.get("prompt"))
    if chosen is None or rejected is None:
        raise DropRow("missing value")
    if isinstance(chosen, list) and isinstance(rejected, list):
        pair = _pair_from_messages(prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        pair = _pair_from_text(prompt, chosen, rejected, "prompt" in row, as_chat)
    else:
        raise DropRow("wrong type")
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise DropRow("no response")
    if pair.chosen == pair.rejected:
        raise DropRow("identical responses")
    return pair


def _value(value: Any) -> str | list[Message] | None:
    """Check one cell: text, messages or nothing."""
    if isinstance(value, Mapping) and set(value) == {"json"}:  # see `_column`
        try:
            value = json.loads(value["json"])
        except (ValueError, TypeError, RecursionError):
            raise DropRow("wrong type") from None
    if value is None:
        return None
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        value = _unzip(value)
    if not isinstance(value, list | tuple):
        raise DropRow("wrong type")
    return [_message(message) for message in value]


def _unzip(value: Mapping[str, Any]) -> list:
    """One message, or a struct of lists (how older releases of `datasets` store a list of messages)."""
    role, content = value.get("role"), value.get("content")
    if isinstance(role, list) and isinstance(content, list) and len(role) == len(content):
        return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]
    return [value]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DropRow("wrong type")
    role, content = message.get("role"), message.get("content")
    if role is None and content is None:
        role, content = message.get("from"), message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or not isinstance(content, str):
        raise DropRow("wrong type")
    if role not in ROLES:
        raise DropRow("unknown role")
    return {"role": role, "content": _text(content)}


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DropRow("invalid Unicode") from None
    return str(value)


def _pair_from_messages(prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]) -> TextPair:
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant":
            raise DropRow("no response")
    context = prompt if isinstance(prompt, list) else []
    # Some datasets repeat the prompt's messages in the responses.
    chosen, rejected = (
        side[len(context) :] if len(side) > len(context) and side[: len(context)] == context else side
        for side in (chosen, rejected)
    )
    if chosen[:-1] != rejected[:-1]:
        raise DropRow("no shared prompt")  # a response is one turn; these part earlier
    context = context + chosen[:-1]
    if isinstance(prompt, str) and prompt.strip() and not any(m["role"] == "user" for m in context):
        context = [*context, {"role": "user", "content": prompt}]
    if not context:
        raise DropRow("no shared prompt" if prompt is None else "empty prompt")
    return TextPair(context, chosen[-1]["content"], rejected[-1]["content"])


def _pair_from_text(
    prompt: str | list[Message] | None, chosen: str, rejected: str, has_prompt_column: bool, as_chat: bool
) -> TextPair:
    if isinstance(prompt, list):
        if not prompt:
            raise DropRow("empty prompt")
        return TextPair(prompt, chosen, rejected)
    if prompt is None or not prompt.strip():
        if _is_transcript(chosen) and _is_transcript(rejected):
            return _pair_from_transcripts(chosen, rejected)
        if prompt is None and has_prompt_column:
            raise DropRow("missing value")
    elif _is_transcript(prompt, chosen):
        return _pair_from_split_transcript(prompt, chosen, rejected)
    if prompt is None:
        prompt, chosen, rejected = _split_shared_prefix(chosen, rejected)
    if as_chat:
        if not prompt.strip():
            raise DropRow("empty prompt")
        return TextPair([{"role": "user", "content": prompt}], chosen.strip(), rejected.strip())
    return TextPair(prompt, chosen, rejected)


def _split_shared_prefix(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts after their shared beginning, at whitespace, which goes to the responses."""
    if chosen == rejected:
        raise DropRow("identical responses")
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end > 0:
        if (
            chosen[end : end + 1].isspace()
            and rejected[end : end + 1].isspace()
            and chosen[end:].strip()
            and rejected[end:].strip()
        ):
            break
        end -= 1
    if not chosen[:end].strip():
        raise DropRow("no shared prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def _is_transcript(text: str, response: str = "") -> bool:
    first = _TURN.match(text)
    if first is None or first[1] != "Human":
        return False
    if response:  # a prompt alone: the assistant's turn is opened by the prompt or by the response
        return text.rstrip().endswith("\n\nAssistant:") or response.startswith(("\n\nAssistant:", text))
    return "\n\nAssistant:" in text


def _turns(transcript: str) -> list[Message]:
    """Split an HH-RLHF transcript into messages; surrounding whitespace is layout, not content.

    >>> _turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    _, *parts = _TURN.split(transcript)
    return [
        {"role": _TRANSCRIPT_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _pair_from_transcripts(chosen: str, rejected: str) -> TextPair:
    return _pair_from_messages(None, _turns(chosen), _turns(rejected))._replace(transcript=True)


def _pair_from_split_transcript(prompt: str, chosen: str, rejected: str) -> TextPair:
    context = _turns(prompt)
    if context[-1] == {"role": "assistant", "content": ""}:  # the opened turn
        context.pop()
    chosen, rejected = (
        side.removeprefix(prompt).strip().removeprefix("Assistant:").strip() for side in (chosen, rejected)
    )
    return TextPair(context, chosen, rejected, transcript=True)


def _transcript_text(messages: Sequence[Message]) -> str:
    speakers = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{speakers[message['role']]}: {message['content']}" for message in messages)
    return text + "\n\nAssistant:"


# ------------------------------------------------------------------------------------------------------------
# Tokens
# ------------------------------------------------------------------------------------------------------------


@dataclass
class DataReport:
    """What became of the rows of a dataset.

    Attributes:
        rows: rows read.
        kept: pairs in the table.
        dropped: number of dropped rows by reason (a key of `DROP_REASONS`).
        first_dropped: the `pair_id` of the first row dropped for each reason.
        truncated_prompts: pairs whose prompt was cut on the left.
        truncated_responses: responses (not pairs) that were cut on the right, and so end without an end of
            turn.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0

    def drop(self, reason: str, pair_id: int) -> None:
        """Count one dropped row; `reason` must be a key of `DROP_REASONS`."""
        if reason not in DROP_REASONS:
            raise KeyError(reason)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, pair_id)

    def reasons(self) -> str:
        """Return the drops in one phrase, most frequent first: `no response 3 (first: row 17), ...`."""
        ordered = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count:,} (first: row {self.first_dropped[reason]})" for reason, count in ordered)

    def summary(self) -> str:
        """Return one line a person can read: rows, kept, dropped by reason, truncated."""
        dropped = f"{self.rows - self.kept:,} dropped" + (f": {self.reasons()}" if self.dropped else "")
        return (
            f"{self.rows:,} rows, {self.kept:,} pairs kept, {dropped}; "
            f"{self.truncated_prompts:,} prompts and {self.truncated_responses:,} responses truncated"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
            prompt = _transcript_text(pair.prompt)
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
    added = tokenizer.added_tokens_decoder.values()
    encoder = _Encoder(
        tokenizer=tokenizer,
        backend=backend,
        separator=separator,
        separator_id=backend.token_to_id(separator) or 0,
        control=_any_of(token.content for token in added if token.special),
        control_ids=frozenset(),
        head=head,
        tail=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        dummy_prefix=False,
    )
    after, newline, anchored = encoder.encode([separator + "a", "\n", "\na"])
    encoder.dummy_prefix = after != anchored[len(newline) :]
    if tokenizer.chat_template:
        _probe_template(encoder)
    encoder.control_ids = frozenset(
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if encoder.control.fullmatch(token.content) and index != tokenizer.unk_token_id
    )
    return encoder


def _any_of(strings: Iterable[str]) -> re.Pattern:
    longest_first = sorted({s for s in strings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) never matches


def _probe_template(encoder: _Encoder) -> None:
    """Find out what the chat template writes around a response, by rendering two probes."""
    question, answer = "Sepo probe question", "Sepo probe answer"
    user = {"role": "user", "content": question}
    try:
        prompt = encoder.render([user], add_generation_prompt=True)
        full = encoder.render([user, {"role": "assistant", "content": answer}])
        spaced = encoder.render([user, {"role": "assistant", "content": f"  {answer}  "}])
    except Exception as error:  # the template is foreign code
        raise UserError(
            f"the tokenizer's chat template cannot render a user and an assistant turn ({one_line(error)}): "
            "use another model, or repair the template"
        ) from error
    if question not in prompt or answer not in full:
        raise UserError(
            "the tokenizer's chat template does not write the messages it is given: expected the content of "
            "the user and the assistant turn in its output; repair the template"
        )
    around = prompt.replace(question, "\0")
    # Added tokens that are not declared special are structure nevertheless if the template writes them.
    encoder.control = _any_of(
        token.content
        for token in encoder.tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in around and not token.content.isspace())
    )
    encoder.turn_end = full[full.rindex(answer) + len(answer) :]
    end = encoder.control.search(encoder.turn_end)
    encoder.kept_end = encoder.turn_end[: end.end()] if end else encoder.turn_end.rstrip()
    encoder.chat_tail = [] if end else encoder.tail
    encoder.trims = f"  {answer}  " not in spaced


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
    dataset = _relevant(dataset)
    tables = []
    bar = tqdm(total=len(dataset), desc="tokenise", unit="row", disable=not progress)
    for start in range(0, len(dataset), _BATCH):
        rows = _rows(dataset, start, min(start + _BATCH, len(dataset)))
        _update_digest(digest, rows)
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
        "chat_template": _sha(str(tokenizer.chat_template or "")),
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


def _relevant(dataset: datasets.Dataset) -> datasets.Dataset:
    for name in ("chosen", "rejected"):
        if name not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            raise UserError(f"the dataset has no column '{name}'{nearest(name, dataset.column_names)}: found {found}")
    names = [name for name in (*COLUMNS, "pair_id") if name in dataset.column_names]
    return dataset.select_columns(names).with_format(None)


def _rows(dataset: datasets.Dataset, start: int, stop: int) -> list[dict[str, Any] | None]:
    """Read rows as dicts; None for a row whose text is not UTF-8."""
    try:
        batch = dataset[start:stop]
    except UnicodeDecodeError:
        if stop - start == 1:
            return [None]
        middle = (start + stop) // 2
        return _rows(dataset, start, middle) + _rows(dataset, middle, stop)
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


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


# ------------------------------------------------------------------------------------------------------------
# Fingerprints
# ------------------------------------------------------------------------------------------------------------

_PROBE = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs; naïve café, ÀÉ, 3.14 × 10⁻²!\n\n"
    "\tdef f(x):  return x\n  Müller straße 东京的天气很好。Привет, мир! مرحبا שלום नमस्ते 👩\u200d👧 "
    "\u200b<b>&amp;</b> https://a.b/c?d=e#f \r\n   end "
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits that identify what a tokenizer does: two tokenizers with one fingerprint agree on
    ids.

    Made of the vocabulary, the ids of BOS, EOS and the unknown token, and the ids of a fixed text in many
    scripts (which depend on merges, normaliser and the BOS that is put by default). The padding token and
    the chat template do not count: neither changes what an id means.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return _sha(json.dumps([vocabulary, special, list(tokenizer(_PROBE)["input_ids"])]))


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """Return 16 hex digits that identify the prompts, responses and pair ids of a dataset.

    It depends on content and order alone: not on the file format, the column order, other columns or the
    process.
    """
    digest = hashlib.sha256()
    dataset = _relevant(dataset)
    for start in range(0, len(dataset), _BATCH):
        _update_digest(digest, _rows(dataset, start, min(start + _BATCH, len(dataset))))
    return digest.hexdigest()[:16]


def _update_digest(digest: Any, rows: Sequence[dict[str, Any] | None]) -> None:
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\n")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------------------


def split_pairs(
    table: pa.Table, *, held_out: int | float, sample: float = 1.0, seed: int = 0
) -> tuple[pa.Table, pa.Table]:
    """Split a table of pairs by prompt, so that no held-out prompt occurs in training.

    Prompts are ordered by a hash of the seed and their token ids, and held out in that order until the
    number of pairs is as near to `held_out` as whole prompts allow. The result depends on nothing but table
    and seed, and a prompt keeps its place in the order when the table grows. Rows keep their order.

    Args:
        table: pairs, or any table with `pair_id` and `prompt_ids`.
        held_out: number of pairs (int), or their share in [0, 1) (float).
        sample: share of the remaining pairs to train on, in (0, 1].
        seed: another seed, another split.

    Returns:
        The training pairs and the held-out pairs.

    Raises:
        UserError: a number out of range, or too few prompts for both sides.
    """
    target = _held_out_pairs(held_out, len(table))
    keys = _prompt_keys(table)
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    prompts = sorted(counts, key=lambda key: _order("held_out", seed, key))
    totals = np.cumsum([0] + [counts[key] for key in prompts])
    number = int(np.argmin(np.abs(totals - target)))
    if target and number == 0:
        number = 1
    if number >= len(prompts):
        raise UserError(
            f"cannot hold out {target} of {len(table)} pairs: they share {len(prompts)} prompts, and at "
            "least one must stay for training; hold out fewer"
        )
    held = set(prompts[:number])
    mask = np.array([key in held for key in keys], dtype=bool)
    settings = {"held_out": held_out, "sample": sample, "seed": seed}
    train = sample_pairs(table.filter(pa.array(~mask)), sample, seed=seed)
    return _with_split(train, "train", settings), _with_split(table.filter(pa.array(mask)), "held_out", settings)


def group_by_prompt(table: pa.Table) -> pa.Table:
    """Bring the pairs of each prompt together, prompts in the order of their first pair; else the order stays."""
    first: dict[bytes, int] = {}
    order = np.argsort([first.setdefault(key, len(first)) for key in _prompt_keys(table)], kind="stable")
    return table.take(pa.array(order, type=pa.int64()))


def _prompt_keys(table: pa.Table) -> list[bytes]:
    values, lengths = flat(table.column("prompt_ids"))
    ends = np.cumsum([0, *lengths])
    values = values.astype("<i4")
    return [values[start:stop].tobytes() for start, stop in pairwise(ends)]


def _held_out_pairs(held_out: int | float, rows: int) -> int:
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not held_out >= 0:
        raise UserError(f"held_out is {held_out!r}: expected a number of pairs, or a share in [0, 1)")
    if isinstance(held_out, float):
        if held_out >= 1:
            raise UserError(f"held_out is {held_out}: expected a share in [0, 1), or a whole number of pairs")
        return round(held_out * rows)
    if held_out >= rows:
        raise UserError(f"held_out is {held_out}, but there are {rows} pairs: hold out fewer")
    return held_out


def _with_split(table: pa.Table, side: str, settings: Mapping[str, Any]) -> pa.Table:
    provenance = provenance_of(table)
    provenance.pop("version", None)
    kind = provenance.pop("format", "pairs")
    return with_provenance(table, kind, {**provenance, "split": {"side": side, **settings}})


def sample_pairs(table: pa.Table, fraction: float, *, seed: int = 0) -> pa.Table:
    """Return a random share of the pairs, in the table's order: what an oracle on part of the data is
    trained on.

    Pairs are picked by a hash of the seed and their `pair_id`, so a smaller share is a part of a larger one.

    Args:
        table: any table with `pair_id`.
        fraction: share in (0, 1]; at least one pair is returned.
        seed: another seed, another sample.

    Raises:
        UserError: `fraction` is not in (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise UserError(f"the sample fraction is {fraction!r}: expected a number in (0, 1]")
    number = min(len(table), max(1, round(fraction * len(table))))
    ids = table.column("pair_id").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: (_order("sample", seed, str(ids[row]).encode()), row))
    return table.take(pa.array(sorted(order[:number]), type=pa.int64()))


def _order(purpose: str, seed: int, key: bytes) -> bytes:
    """A hash to sort by: random in effect, and the same on every platform and release."""
    return hashlib.sha256(f"{purpose}:{seed}:".encode() + key).digest()
