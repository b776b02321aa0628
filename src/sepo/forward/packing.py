"""Packed rows of pairs: every prompt once, no padding, nothing after the last target.

A *document* is one prompt and the responses that continue it. A row holds whole documents, one after the other, up to a
token budget:

    tokens     | p p p p c c c c r r r | p p c c c r |        p prompt, c chosen, r rejected
    positions  | 0 1 2 3 4 5 6 7 4 5 6 | 0 1 2 3 4 2 |
    document   | 0 0 0 0 0 0 0 0 0 0 0 | 1 1 1 1 1 1 |
    branch     | - - - - 0 0 0 0 1 1 1 | - - 0 0 0 1 |

A token attends to the earlier tokens of its branch and to its document's prompt, so a row gives exactly the results of
its sequences one by one. Pairs with the same prompt share one document; a response of several pairs is one branch.
Compared with one unpadded sequence per response, rows of 1,024 tokens read 77 % of the tokens on the 4,538 AlpacaEval
pairs (88 % if only the two responses of a pair share a prompt) and 61 % on the HH transcripts.

A *target* is one token whose log-probability is requested: the row position whose hidden state predicts it (the last
prompt token for the first response token), the token, its pair and side, and its weight. Inputs after the last target
of a branch have no effect and are cut.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepo.errors import UserError, wrong_type
from sepo.kernels.layout import Document, Layout

CHOSEN, REJECTED = 0, 1


Ids = Sequence[int] | np.ndarray
Weights = Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """One pair as token ids, and the positions in each response whose log-probability is requested.

    Positions are ascending indices into `chosen_ids` / `rejected_ids`; None means every token. Weights are aligned with
    the positions; None means 1. `weight` multiplies the pair's loss. Context ids are read between the response's tokens
    and are never targets (`data.turns`): id `i` stands before token `context_at[i]` of the response. The fields are
    sequences of numbers or arrays: the pairs of a table are views of its buffers.
    """

    pair_id: int
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    chosen_positions: Ids | None = None
    rejected_positions: Ids | None = None
    chosen_weights: Weights | None = None
    rejected_weights: Weights | None = None
    weight: float = 1.0
    chosen_context_ids: Ids = ()
    chosen_context_at: Ids = ()
    rejected_context_ids: Ids = ()
    rejected_context_at: Ids = ()

    def side(self, side: int) -> tuple[Ids, Ids | None, Weights | None]:
        """Return (ids, positions, weights) of `CHOSEN` or `REJECTED`: ids with their context, positions among these."""
        if side == CHOSEN:
            ids, positions, weights = self.chosen_ids, self.chosen_positions, self.chosen_weights
            context_ids, context_at = self.chosen_context_ids, self.chosen_context_at
        else:
            ids, positions, weights = self.rejected_ids, self.rejected_positions, self.rejected_weights
            context_ids, context_at = self.rejected_context_ids, self.rejected_context_at
        if not len(context_ids):
            return ids, positions, weights
        at = np.asarray(context_at, np.int64)
        targets = np.arange(len(ids)) if positions is None else np.asarray(positions, np.int64)
        return np.insert(ids, at, context_ids), targets + np.searchsorted(at, targets, side="right"), weights


@dataclass
class PackedBatch:
    """Model inputs and targets of a set of pairs. Shapes: `T` tokens per row, `N` targets, `B` pairs.

    Attributes:
        input_ids: `[rows, T]`.
        position_ids: `[rows, T]`.
        layout: the documents of the single packed row; None for the padded layout.
        attention_mask: `[rows, T]` of the padded layout; None for a packed row.
        unbatched: the model reads the rows of the padded layout one at a time, without their padding.
        target_positions: `[N]`, indices into the flattened `[rows * T]` hidden states.
        target_ids: `[N]`, the token predicted there.
        target_rows: the unique `target_positions`, ascending: the only hidden states that are used.
        segments: `[N]`, `2 * pair + side`, sorted: chosen targets of pair 0, rejected of pair 0, chosen of pair 1...
        weights: `[N]` float32.
        pair_weights: `[B]` float32, of the pairs' losses.
        pair_ids: the `B` pair ids, in the order of the segments.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout | None
    attention_mask: Tensor | None
    target_positions: Tensor
    target_ids: Tensor
    target_rows: Tensor
    segments: Tensor
    weights: Tensor
    pair_weights: Tensor
    pair_ids: list[int]
    unbatched: bool = False

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on `device` (the layout stays on the host)."""
        return self._with(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in pinned memory, for a DataLoader."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt and one of its responses (of the padded layout: of a row)."""
        if self.layout is None:
            return self.input_ids.shape[1]
        return max(doc.prompt + max(doc.branches, default=0) for doc in self.layout.documents)


def _last_target(ids: Ids, positions: Ids | None) -> int:
    """Number of response tokens that the model must read: all before the last target."""
    if positions is None:
        return len(ids) - 1
    return int(np.max(positions)) if len(positions) else 0


def _key(ids: Ids) -> bytes:
    """A dictionary key: equal ids have equal keys."""
    return np.asarray(ids, np.int32).tobytes()


class _OpenDocument:
    """A document under construction: its prompt, its distinct responses and how many tokens of each to read."""

    def __init__(self, prompt_ids: Ids):
        self.prompt_ids = prompt_ids
        self.responses: dict[bytes, Ids] = {}
        self.reads: dict[bytes, int] = {}  # response -> tokens to read; insertion order is branch order
        self.pairs: list[int] = []

    def added_length(self, pair: Pair) -> int:
        added = 0
        grown: dict[bytes, int] = {}
        for side in (CHOSEN, REJECTED):
            ids, positions, _ = pair.side(side)
            key = _key(ids)
            have = grown.get(key, self.reads.get(key, 0))
            need = _last_target(ids, positions)
            added += max(0, need - have)
            grown[key] = max(have, need)
        return added

    def add(self, index: int, pair: Pair) -> None:
        self.pairs.append(index)
        for side in (CHOSEN, REJECTED):
            ids, positions, _ = pair.side(side)
            key = _key(ids)
            self.responses[key] = ids
            self.reads[key] = max(self.reads.get(key, 0), _last_target(ids, positions))


def pack(pairs: Sequence[Pair]) -> PackedBatch:
    """Lay out pairs as one packed row (see the drawing at the top of this file).

    Raises:
        UserError: `pairs` is empty or holds something else than `Pair`s; a prompt or a response is empty; a position
            lies outside its response.
    """
    if not isinstance(pairs, Sequence) or not len(pairs) or not all(isinstance(pair, Pair) for pair in pairs):
        raise wrong_type("pairs", pairs, "a list of Pair, at least one")
    documents: dict[bytes, _OpenDocument] = {}
    for index, pair in enumerate(pairs):
        _check(pair)
        documents.setdefault(_key(pair.prompt_ids), _OpenDocument(pair.prompt_ids)).add(index, pair)

    parts: list[Ids] = []
    length = 0
    layout: list[Document] = []
    branch_starts: dict[tuple[int, bytes], tuple[int, int]] = {}  # (doc, response) -> (first, predictor)
    document_of: dict[int, int] = {}
    for number, document in enumerate(documents.values()):
        layout.append(Document(length, len(document.prompt_ids), tuple(document.reads.values())))
        parts.append(document.prompt_ids)
        length += len(document.prompt_ids)
        last_prompt_token = length - 1
        for response, read in document.reads.items():
            branch_starts[number, response] = (length, last_prompt_token)
            parts.append(document.responses[response][:read])
            length += read
        document_of.update(dict.fromkeys(document.pairs, number))

    packed = Layout(layout, length)
    position_ids = torch.from_numpy(packed.token_coordinates()[2])

    def locate(index: int, ids: Ids, positions: np.ndarray) -> np.ndarray:
        first, predictor = branch_starts[document_of[index], _key(ids)]
        return np.where(positions == 0, predictor, first + positions - 1)

    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(parts).astype(np.int64))[None],
        position_ids=position_ids[None],
        layout=packed,
        attention_mask=None,
        unbatched=False,
        pair_ids=[pair.pair_id for pair in pairs],
        **_targets(pairs, locate),
    )


def pad(pairs: Sequence[Pair], pad_token_id: int = 0, unbatched: bool = False) -> PackedBatch:
    """Lay out pairs as right-padded sequences, two rows per pair: the layout that any causal model reads.

    For models that do not take packed rows; the tests use it as the reference.

    Args:
        unbatched: the model reads one row at a time, complete and without padding. For models whose results depend on
            the length of the input.
    """
    for pair in pairs:
        _check(pair)
    lengths = np.array([length for pair in pairs for length in _row_lengths(pair, unbatched)])
    width = int(lengths.max())
    input_ids = np.full((len(lengths), width), pad_token_id, np.int64)
    for index, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        for side in (CHOSEN, REJECTED):
            row = 2 * index + side
            input_ids[row, :prompt] = pair.prompt_ids
            input_ids[row, prompt : lengths[row]] = pair.side(side)[0][: lengths[row] - prompt]

    side_of = iter(range(len(lengths)))

    def locate(index: int, ids: Ids, positions: np.ndarray) -> np.ndarray:
        return next(side_of) * width + len(pairs[index].prompt_ids) - 1 + positions

    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).expand(len(lengths), width).contiguous(),
        layout=None,
        attention_mask=torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        unbatched=unbatched,
        pair_ids=[pair.pair_id for pair in pairs],
        **_targets(pairs, locate),
    )


def _check(pair: Pair) -> None:
    if not len(pair.prompt_ids) or not len(pair.chosen_ids) or not len(pair.rejected_ids):
        raise UserError(f"pair {pair.pair_id}: prompt and responses need at least one token each")
    for name in ("chosen", "rejected"):
        size, positions = len(getattr(pair, f"{name}_ids")), getattr(pair, f"{name}_positions")
        for places, what in ((positions, "target position"), (getattr(pair, f"{name}_context_at"), "context token")):
            if places is not None and len(places) and not (np.min(places) >= 0 and np.max(places) < size):
                raise UserError(f"pair {pair.pair_id}: a {what} lies outside the response of {size} tokens")


def _targets(pairs: Sequence[Pair], locate) -> dict[str, Tensor]:
    """Flat target tensors, segment by segment; `locate(pair index, response, positions)` returns row positions."""
    where, tokens, segments, weights = [], [], [], []
    for index, pair in enumerate(pairs):
        for side in (CHOSEN, REJECTED):
            ids, positions, side_weights = pair.side(side)
            at = np.arange(len(ids)) if positions is None else np.asarray(positions, dtype=np.int64)
            where.append(locate(index, ids, at))
            tokens.append(np.asarray(ids)[at])
            segments.append(np.full(len(at), 2 * index + side, dtype=np.int64))
            weights.append(
                np.ones(len(at), np.float32) if side_weights is None else np.asarray(side_weights, np.float32)
            )
    target_positions = np.concatenate(where)
    return {
        "target_positions": torch.from_numpy(target_positions),
        "target_rows": torch.from_numpy(np.unique(target_positions)),
        "target_ids": torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        "segments": torch.from_numpy(np.concatenate(segments)),
        "weights": torch.from_numpy(np.concatenate(weights)),
        "pair_weights": torch.tensor([float(pair.weight) for pair in pairs], dtype=torch.float32),
    }


def read_length(pair: Pair) -> int:
    """Number of tokens of a packed row that holds only this pair."""
    sides = [pair.side(side)[:2] for side in (CHOSEN, REJECTED)]
    chosen, rejected = (_last_target(*side) for side in sides)
    if np.array_equal(sides[0][0], sides[1][0]):
        return len(pair.prompt_ids) + max(chosen, rejected)
    return len(pair.prompt_ids) + chosen + rejected


def _row_lengths(pair: Pair, whole: bool = False) -> tuple[int, int]:
    """Tokens to read of the prompt with the chosen response, and of the prompt with the rejected one."""
    chosen, rejected = (pair.side(side)[:2] for side in (CHOSEN, REJECTED))
    prompt = len(pair.prompt_ids)
    if whole:
        return prompt + len(chosen[0]), prompt + len(rejected[0])
    return prompt + _last_target(*chosen), prompt + _last_target(*rejected)


def fill_padded_rows(pairs: Sequence[Pair], tokens_per_row: int) -> list[list[Pair]]:
    """Divide pairs into padded batches of at most `tokens_per_row` tokens with padding; a longer pair is its own batch.

    Batches hold pairs of similar length, the longest first. A pair takes two rows, as wide as the batch's longest row.
    """
    widths = np.array([max(1, *_row_lengths(pair)) for pair in pairs], np.int64)
    order = np.argsort(-widths, kind="stable")
    rows: list[list[Pair]] = []
    at = 0
    while at < len(order):
        number = max(1, tokens_per_row // (2 * int(widths[order[at]])))
        rows.append([pairs[index] for index in order[at : at + number].tolist()])
        at += number
    return rows


def fill_rows(pairs: Sequence[Pair], tokens_per_row: int) -> list[list[Pair]]:
    """Divide a batch into rows of at most `tokens_per_row` tokens; a longer pair gets its own row.

    Pairs that share a prompt stay together while they fit. The rows are as few as possible and about equally long,
    because each row has a fixed cost. Every pair of the batch is in exactly one row, so a mean over the batch is the
    sum over rows divided by the number of pairs.
    """
    groups: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_key(pair.prompt_ids), []).append(pair)
    documents: list[tuple[int, list[Pair]]] = []
    for members in groups.values():
        documents.extend(_split_group(members, tokens_per_row))
    documents.sort(key=lambda document: -document[0])
    longer = [members for length, members in documents if length > tokens_per_row]
    documents = documents[len(longer) :]
    number = -(-sum(length for length, _ in documents) // tokens_per_row)
    while (rows := _balanced_rows(documents, number, tokens_per_row)) is None:
        number = min(number + 1 + number // 50, len(documents))  # one row each always fits
    return [*longer, *rows]


def _balanced_rows(documents: list[tuple[int, list[Pair]]], number: int, most: int) -> list[list[Pair]] | None:
    """Give each document, the longest first, to the shortest of `number` rows; None if a row exceeds `most` tokens."""
    rows: list[list[Pair]] = [[] for _ in range(number)]
    lengths = [(0, index) for index in range(number)]
    for length, members in documents:
        shortest, index = lengths[0]
        if shortest + length > most:
            return None
        rows[index].extend(members)
        heapq.heapreplace(lengths, (shortest + length, index))
    return rows


def _split_group(members: Iterable[Pair], tokens_per_row: int) -> Iterator[tuple[int, list[Pair]]]:
    """Divide the pairs of one prompt into documents of at most `tokens_per_row` tokens: (length, pairs)."""
    document: _OpenDocument | None = None
    held: list[Pair] = []
    length = 0
    for pair in members:
        if document is not None:
            added = document.added_length(pair)
            if length + added > tokens_per_row:
                yield length, held
                document = None
        if document is None:
            document, held, length = _OpenDocument(pair.prompt_ids), [], len(pair.prompt_ids)
            added = document.added_length(pair)
        document.add(len(held), pair)
        held.append(pair)
        length += added
    if held:
        yield length, held
