"""Attention over packed rows on a CPU: one call of PyTorch's flash kernel for each block of a document.

The two blocks of a later branch are merged by their log-sum-exp (the identity behind ring attention, arXiv 2310.01889):
the backward kernel, given the merged output and log-sum-exp, returns each block's exact share of the gradients. For the
same reason the backward pass may split a causal block into smaller ones, which saves most of the masked half that the
kernel would compute. No key is copied, no mask is read, and grouped key-value heads are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sepo.kernels.layout import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# (query slice, key slice, causal): one kernel call; slices are (start, length) along the row.
Block = tuple[tuple[int, int], tuple[int, int], bool]
# Queries of a causal block in the backward pass; 64 to 256 are equally fast.
_BACKWARD_QUERIES = 128


def _blocks(layout: Layout) -> Iterator[tuple[Block, ...]]:
    """Kernel calls of each query range: one causal block, or (causal block on itself, full block on the prompt)."""
    for doc in layout.documents:
        first = doc.branches[0] if doc.branches else 0
        head = (doc.start, doc.prompt + first)
        yield ((head, head, True),)
        at = doc.start + doc.prompt + first
        for size in doc.branches[1:]:
            if size:
                branch = (at, size)
                yield ((branch, branch, True), (branch, (doc.start, doc.prompt), False))
            at += size


def _backward_blocks(layout: Layout) -> Iterator[Block]:
    """`_blocks` with each causal block split into small causal ones and the full blocks below them.

    Every token is in one causal block, which comes before all other blocks with its keys or queries: `_put` writes
    the first part of a gradient and adds the others.
    """
    for calls in _blocks(layout):
        (start, size), _, _ = calls[0]
        for done in range(0, size, _BACKWARD_QUERIES):
            block = (start + done, min(_BACKWARD_QUERIES, size - done))
            yield block, block, True
            if done:
                yield block, (start, done), False
        yield from calls[1:]


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        heads, length, dim = query.shape[1:]
        # [1, T, heads, dim] underneath: the layout that the output projection reads without a copy.
        output = query.new_empty(1, length, heads, dim).transpose(1, 2)
        lse = torch.empty(1, length, heads, device=query.device, dtype=lse_dtype(query)).transpose(1, 2)
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
        # As in forward, the memory layout is the one the projections' matmuls read: [1, T, heads, dim].
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
    """Merge attention over two disjoint key sets: outputs weighted by their share of the softmax mass."""
    (out_one, lse_one), (out_two, lse_two) = one, two
    lse = torch.logaddexp(lse_one, lse_two)
    share = torch.exp(lse_one - lse).unsqueeze(-1)
    return torch.lerp(out_two.to(share.dtype), out_one.to(share.dtype), share).to(out_one.dtype), lse


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
