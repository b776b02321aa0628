"""Attention over packed rows on a GPU: one variable-length flash call per layer, no mask.

The kernel takes sequences of queries and of keys whose lengths may differ, and aligns a causal mask to their ends. So
one call handles a packed row: the queries are the row itself, the keys and values are gathered so that every later
branch has its document's prompt before it,

    queries | p p p c c c | r r r | p p c c | r |
    keys    | p p p c c c | p p p r r r | p p c c | p p r |

This costs a copy of the keys and values (a thousandth of a layer's work) instead of the CPU path's second call and
merge by log-sum-exp, and sliding windows work across the seam. Nothing is compiled, no mask is read.

The kernel takes half precision only and has no soft-capping. Float32 (scoring) uses the memory-efficient kernels on the
same sequences. Other cases (Gemma 2, windows in float32, old cards) use FlexAttention: one compiled kernel for each
kind of call, with a block mask made from the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.kernels.layout import Layout

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None  # type: ignore[assignment]


# The widest head of the flash kernels; head widths are padded to multiples of the other two (flash, FlexAttention).
_WIDEST_HEAD, _HEAD_MULTIPLE, _FLEX_HEAD_MULTIPLE = 256, 8, 16
# FlexAttention's tile: the block mask's resolution.
_TILE = 128


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one packed row: `query` `[1, heads, T, dim]`, `key`/`value` `[1, kv_heads, T, dim]`.

    Args:
        window: a token attends to itself and the `window - 1` tokens before it; None for all.
        softcap: scores become `softcap * tanh(score / softcap)`; None for none.

    Returns:
        `[1, heads, T, dim]`.
    """
    if softcap is None and flash_takes(query):
        return _flash(query, key, value, layout, scaling, window)
    if softcap is None and window is None and query.dtype == torch.float32:
        return _efficient(query, key, value, layout, scaling)
    return flex_packed_attention(query, key, value, layout, scaling, window, softcap)


def flash_takes(query: Tensor) -> bool:
    """Whether the variable-length flash kernels take queries of this type on this card."""
    return (
        varlen_attn is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= _WIDEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@dataclass
class Sequences:
    """A packed row as sequences of queries and keys, in the order of the row.

    Attributes:
        keys: `[K]` row positions of the keys; a document's prompt is repeated before each later branch.
        own: `[T]` indices into `keys` of each row position's first occurrence.
        again: `[K - T]` indices into `keys` of the repeated prompts; `again_rows` are their row positions.
        query_starts, key_starts: `[S + 1]` int32, cumulative lengths.
        longest_query, longest_key: tokens of the longest sequence.
    """

    keys: Tensor
    own: Tensor
    again: Tensor
    again_rows: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


def sequences(layout: Layout, device: torch.device | str) -> Sequences:
    """The sequences of a layout, cached in it."""
    cache_key = ("sequences", str(device))
    if cache_key not in layout.cache:
        layout.cache[cache_key] = _make_sequences(layout, device)
    return layout.cache[cache_key]


def _make_sequences(layout: Layout, device: torch.device | str) -> Sequences:
    keys: list[np.ndarray] = []
    is_own: list[np.ndarray] = []
    queries: list[int] = []
    totals: list[int] = []

    def add(prompt: tuple[int, int] | None, own: tuple[int, int]) -> None:
        parts = [np.arange(start, start + size) for start, size in (*([prompt] if prompt else []), own)]
        keys.extend(parts)
        is_own.extend(np.full(len(part), part is parts[-1]) for part in parts)
        queries.append(own[1])
        totals.append(sum(map(len, parts)))

    for doc in layout.documents:
        first = doc.branches[0] if doc.branches else 0
        add(None, (doc.start, doc.prompt + first))
        at = doc.start + doc.prompt + first
        for size in doc.branches[1:]:
            if size:
                add((doc.start, doc.prompt), (at, size))
            at += size
    rows, own = np.concatenate(keys), np.concatenate(is_own)

    def move(values: np.ndarray, dtype: type) -> Tensor:
        tensor = torch.from_numpy(values.astype(dtype))
        if torch.device(device).type == "cuda":  # from pinned memory the copy does not block the host
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return Sequences(
        keys=move(rows, np.int64),
        own=move(np.flatnonzero(own), np.int64),
        again=move(np.flatnonzero(~own), np.int64),
        again_rows=move(rows[~own], np.int64),
        query_starts=move(np.concatenate([[0], np.cumsum(queries)]), np.int32),
        key_starts=move(np.concatenate([[0], np.cumsum(totals)]), np.int32),
        longest_query=max(queries),
        longest_key=max(totals),
    )


class GatherKeys(torch.autograd.Function):
    """`rows[keys]`; the backward pass copies the gradient of each row and adds those of its repetitions."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: Sequences) -> Tensor:
        ctx.plan = plan
        return rows.index_select(0, plan.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        plan = ctx.plan
        own = grad.index_select(0, plan.own)
        if len(plan.again):
            own.index_add_(0, plan.again_rows, grad.index_select(0, plan.again))
        return own, None


@lru_cache(maxsize=1)
def _grouped() -> dict[str, Any]:
    """The argument that newer PyTorch needs for grouped key-value heads; older versions take them without it."""
    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None) -> Tensor:
    plan = sequences(layout, query.device)
    # [T, heads, dim], the memory layout that the projections wrote: no copy.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    width = query.shape[-1]
    if width % _HEAD_MULTIPLE:
        query, key, value = (torch.nn.functional.pad(x, (0, -width % _HEAD_MULTIPLE)) for x in (query, key, value))
    if len(plan.again):
        key, value = GatherKeys.apply(key, plan), GatherKeys.apply(value, plan)
    output: Any = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        plan.query_starts,
        plan.key_starts,
        plan.longest_query,
        plan.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **(_grouped() if query.shape[1] != key.shape[1] else {}),
    )
    return output[..., :width].transpose(0, 1)[None]


_CAUSAL_FROM_THE_END = 2  # the kernel's mask type that aligns the ends of queries and keys


def _efficient(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """The same sequences by the memory-efficient kernels, which take float32."""
    plan = sequences(layout, query.device)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if len(plan.again):
        key, value = GatherKeys.apply(key, plan), GatherKeys.apply(value, plan)
    if groups > 1:  # these kernels need a key for every query head
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output, *_ = torch.ops.aten._efficient_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        plan.query_starts,
        plan.key_starts,
        plan.longest_query,
        plan.longest_key,
        0.0,
        _CAUSAL_FROM_THE_END,
        any(x.requires_grad for x in (query, key, value)),
        scale=scaling,
    )
    return output.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every model, type and direction (with and without gradients) is a separate graph. One oracle and one policy reach
    # the default limit of 8, after which calls would silently run unfused.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=True)


def flex_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None,
    softcap: float | None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """FlexAttention over the row's block mask; `kernel` defaults to the compiled one."""

    def capped(score, batch, head, q_index, k_index):
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    # A row of at most one tile would compile a separate graph, and narrow heads have no kernel: both are padded.
    length, width = query.shape[2:]
    missing, narrow = max(0, _TILE + 1 - length), -width % _FLEX_HEAD_MULTIPLE
    if missing or narrow:
        query, key, value = (torch.nn.functional.pad(x, (0, narrow, 0, missing)) for x in (query, key, value))
    call = kernel or _compiled_flex()
    # Makes the soft cap a constant of the graph: as a tensor it cannot be lowered.
    with torch._dynamo.config.patch(specialize_float=True, fail_on_recompile_limit_hit=True):
        output = call(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=block_mask(layout, length + missing, window, query.device),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[:, :, :length, :width]


def block_mask(layout: Layout, length: int, window: int | None, device: torch.device) -> Any:
    """The block mask of a row padded to `length` tokens, cached in the layout.

    The host derives the visible tiles from the documents. PyTorch's `create_block_mask` evaluates a `[length, length]`
    mask instead, which takes gigabytes at 32,768 tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    cache_key = ("flex", length, window, str(device))
    if cache_key not in layout.cache:
        coordinates = layout.token_coordinates()
        filled = [np.pad(x, (0, length - layout.length), constant_values=-1) for x in coordinates]
        document, branch, position = (torch.from_numpy(x).to(device) for x in filled)

        def allowed(batch, head, q, k):
            visible = (document[q] == document[k]) & ((branch[k] < 0) | (branch[k] == branch[q]))
            visible = visible & (position[k] <= position[q])
            if window is not None:
                visible = visible & (position[q] - position[k] < window)
            return visible

        partly, wholly = visible_tiles(filled[0], filled[1], filled[2], window)
        layout.cache[cache_key] = BlockMask.from_kv_blocks(
            *_listed(partly & ~wholly, device),
            *_listed(wholly, device),
            BLOCK_SIZE=_TILE,
            mask_mod=allowed,
            seq_lengths=(length, length),
        )
    return layout.cache[cache_key]


def visible_tiles(
    document: np.ndarray, branch: np.ndarray, position: np.ndarray, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(tiles of keys that are partly visible to a tile of queries, tiles that are wholly visible), both `[Q, K]` bool.

    The first may include a tile without a visible key (the mask decides within a tile), but misses none.
    """
    tiles = -(-len(document) // _TILE)
    tile_of = np.arange(len(document)) // _TILE
    segments, segment_of = np.unique(np.stack([document, branch]), axis=1, return_inverse=True)
    holds = np.zeros((tiles, segments.shape[1]), np.int64)
    holds[tile_of, segment_of.reshape(-1)] = 1
    same_document = segments[0][:, None] == segments[0][None]
    sees = (same_document & ((segments[1][None] < 0) | (segments[1][:, None] == segments[1][None]))).astype(np.int64)
    edges = np.arange(tiles) * _TILE
    lowest, highest = (f.reduceat(position, edges) for f in (np.minimum, np.maximum))
    before = np.tril(np.ones((tiles, tiles), bool))  # rows are in causal order
    partly = before & (holds @ sees @ holds.T > 0)
    wholly = before & (holds @ (1 - sees) @ holds.T == 0) & ~np.eye(tiles, dtype=bool)
    if window is not None:
        partly &= lowest[:, None] - highest[None] < window
        wholly &= highest[:, None] - lowest[None] < window
    return partly, wholly & partly


def _listed(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """FlexAttention's form: for each query tile the number of visible key tiles, and all key tiles, these first."""
    counts = tiles.sum(1).astype(np.int32)
    order = np.argsort(~tiles, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)
