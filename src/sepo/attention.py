"""Attention over packed rows: every document on its own, no `[T, T]` mask.

A row of documents `[prompt | branch | branch ...]` needs three kinds of block (see `packing.py`):

    prompt and first branch   causal, contiguous
    a later branch on itself  causal, contiguous
    a later branch on prompt  full, no mask

On a CPU each block is one call of PyTorch's flash kernel. The two blocks of a later branch are merged by their
log-sum-exp (the identity behind ring attention, arXiv 2310.01889): the backward kernel, given the merged output and
log-sum-exp, returns each block's exact share of the gradients. For the same reason the backward pass may cut a causal
block into smaller ones: the kernel's own computes most of the half that the mask hides. No key is copied, no mask is
read, and grouped key-value heads are never repeated. A GPU makes one call of a variable-length kernel
(`attention_cuda.py`). Where neither applies (soft-capping on a CPU, an unknown device) a plain masked softmax per document stands in; it
is also what the tests hold the fast paths against.

The functions plug into Transformers' attention interface under the name `ATTENTION`; a forward that carries no
`layout` (generation, evaluation by other code) falls through to ordinary SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sepo.attention_cuda import packed_attention
from sepo.packing import Layout

ATTENTION = "sepo_packed"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# (query slice, key slice, causal): one kernel call; slices are (start, length) along the row.
Block = tuple[tuple[int, int], tuple[int, int], bool]

# Queries of a causal block in the backward pass; 64 to 256 measure alike.
_BACKWARD_QUERIES = 128


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Transformers attention function: `query` `[1, heads, T, dim]`, `key`/`value` `[1, kv_heads, T, dim]`.

    Returns `[1, T, heads, dim]` and None. Without a `layout` this is SDPA (or a plain softmax with soft-capping).

    Raises:
        NotImplementedError: the layer adds something to its scores that packed rows do not carry (attention sinks,
            position biases) or drops attention weights; `logps.packing_mode` then picks the padded layout.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        allowed = _causal_mask(query.shape[2], query.device) if attention_mask is None else attention_mask
        return _softmax_attention(query, key, value, allowed, scaling, softcap).transpose(1, 2), None
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None or dropout:
        raise NotImplementedError("packed rows carry no attention sinks, position biases or attention dropout")

    kind = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in float32 beside lower-precision values.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kind == "cuda":
        window = sliding_window if _windowed(layout, sliding_window) else None
        output = packed_attention(query, key, value, layout, scaling, window, softcap)
    elif kind == "cpu" and softcap is None and not _windowed(layout, sliding_window):
        output = _BlockAttention.apply(query, key, value, layout, scaling)
    else:
        output = plain_packed_attention(query, key, value, layout, scaling, sliding_window, softcap)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _windowed(layout: Layout, sliding_window: int | None) -> bool:
    """Does the window hide anything from any token of the row?"""
    if sliding_window is None:
        return False
    longest = max(doc.prompt + max(doc.branches, default=0) for doc in layout.documents)
    return longest > sliding_window


# --- CPU: flash kernel per block ------------------------------------------------------------------------------------


def _blocks(layout: Layout) -> Iterator[tuple[Block, ...]]:
    """Kernel calls by query range: one causal block, or (causal block on itself, full block on the prompt)."""
    for doc in layout.documents:
        first = doc.branches[0] if doc.branches else 0
        head = (doc.start, doc.prompt + first)
        yield ((head, head, True),)
        at = doc.start + doc.prompt + first
        for size in doc.branches[1:]:
            if size:
                own = (at, size)
                yield ((own, own, True), (own, (doc.start, doc.prompt), False))
            at += size


def _backward_blocks(layout: Layout) -> Iterator[Block]:
    """The same with causal blocks cut into small ones and the full blocks below them.

    Every token is in one causal block, which comes before all else that involves its keys or queries.
    """
    for calls in _blocks(layout):
        (start, size), _, _ = calls[0]
        for done in range(0, size, _BACKWARD_QUERIES):
            own = (start + done, min(_BACKWARD_QUERIES, size - done))
            yield own, own, True
            if done:
                yield own, (start, done), False
        yield from calls[1:]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        heads, length, dim = query.shape[1:]
        # [1, T, heads, dim] underneath: the layout that the output projection reads without a copy.
        output = query.new_empty(1, length, heads, dim).transpose(1, 2)
        lse = torch.empty(1, length, heads, device=query.device, dtype=_lse_dtype(query)).transpose(1, 2)
        for calls in _blocks(layout):
            (start, size), _, _ = calls[0]
            parts = [_call(_flash, query, key, value, block, scaling) for block in calls]
            out, out_lse = parts[0] if len(parts) == 1 else _merge(*parts)
            output.narrow(2, start, size).copy_(out)
            lse.narrow(2, start, size).copy_(out_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        query, key, value, output, lse = ctx.saved_tensors
        # As in forward, the gradients lie as the projections' matmuls read them: [1, T, heads, dim].
        d_query, d_key, d_value = (
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (query, key, value)
        )
        for (q_start, q_size), (k_start, k_size), causal in _backward_blocks(ctx.layout):
            d_q, d_k, d_v = _flash_backward(
                grad.narrow(2, q_start, q_size),
                query.narrow(2, q_start, q_size),
                key.narrow(2, k_start, k_size),
                value.narrow(2, k_start, k_size),
                output.narrow(2, q_start, q_size),
                lse.narrow(2, q_start, q_size),
                0.0,
                causal,
                scale=ctx.scaling,
            )
            _put(d_query, d_q, q_start, add=not causal)
            _put(d_key, d_k, k_start, add=not causal)
            _put(d_value, d_v, k_start, add=not causal)
        return d_query, d_key, d_value, None, None


def _call(kernel, query: Tensor, key: Tensor, value: Tensor, block: Block, scaling: float) -> tuple[Tensor, Tensor]:
    (q_start, q_size), (k_start, k_size), causal = block
    return kernel(
        query.narrow(2, q_start, q_size),
        key.narrow(2, k_start, k_size),
        value.narrow(2, k_start, k_size),
        0.0,
        causal,
        scale=scaling,
    )


def _put(target: Tensor, part: Tensor, start: int, add: bool) -> None:
    view = target.narrow(2, start, part.shape[2])
    if add:
        view.add_(part)
    else:
        view.copy_(part)


def _merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets: outputs weighted by their share of the softmax mass."""
    (out_one, lse_one), (out_two, lse_two) = one, two
    lse = torch.logaddexp(lse_one, lse_two)
    share = torch.exp(lse_one - lse).unsqueeze(-1)
    return torch.lerp(out_two.to(share.dtype), out_one.to(share.dtype), share).to(out_one.dtype), lse


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# --- plain: a masked softmax per document ---------------------------------------------------------------------------


def plain_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same attention as one masked softmax per document; returns `[1, heads, T, dim]`.

    The mask of a document is `[length, length]`, so the memory grows with the longest document, not with the row.
    """
    sizes = [doc.length for doc in layout.documents]
    masks = _document_masks(layout, sliding_window, query.device)
    outputs = [
        _softmax_attention(q, k, v, allowed, scaling, softcap)
        for q, k, v, allowed in zip(
            query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), masks, strict=True
        )
    ]
    return torch.cat(outputs, dim=2)


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap)) * softcap
    if allowed.dtype == torch.bool:
        # The lowest finite number, not -inf: a padding row may see nothing, and must not become NaN.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    else:
        scores = scores + allowed
    return torch.softmax(scores, dim=-1, dtype=_lse_dtype(query)).to(value.dtype) @ value


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _document_masks(layout: Layout, sliding_window: int | None, device: torch.device) -> list[Tensor]:
    key = ("masks", sliding_window, device)
    if key not in layout.cache:
        _, branch, position = (torch.from_numpy(x).to(device) for x in layout.token_coordinates())
        masks = []
        for doc in layout.documents:
            span = slice(doc.start, doc.start + doc.length)
            b, p = branch[span], position[span]
            allowed = (b[None] < 0) | (b[None] == b[:, None])
            allowed &= p[None] <= p[:, None]
            if sliding_window is not None:
                allowed &= p[:, None] - p[None] < sliding_window
            masks.append(allowed)
        layout.cache[key] = masks
    return layout.cache[key]
