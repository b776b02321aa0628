"""Elementwise work on a block of logits between the LM head's matmuls: one Triton kernel in each direction.

As tensor operations it reads and writes every logit about ten times at four bytes, which on a GPU costs as much as the
matmuls. Here the forward pass reads a float32 logit once and keeps its exponential in half precision; the backward pass
reads the exponential and writes the gradient in the type of the next matmul. `lm_head.py` iterates over the blocks and
has the same steps in plain PyTorch, for everything but half precision on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sepo.kernels.layers_cuda import can_build, lines

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that PyTorch runs on
    triton = None


_COLUMNS = 2048  # per step of a program


def available(hidden: Tensor) -> bool:
    """Whether the kernels take hidden states of this type on this device."""
    return hidden.device.type == "cuda" and hidden.dtype in (torch.float16, torch.bfloat16) and can_build(hidden.device)


def matmul_float32(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` of half-precision matrices, summed and returned in float32.

    bfloat16 rounds a logit of 20 by up to 0.06, more than a training step moves it.
    """
    return torch.mm(x, w.t(), out_dtype=torch.float32)


if triton is not None:

    @triton.jit
    def _transformed(z, scale, cap, HAS_CAP: tl.constexpr):
        z = z * scale
        if HAS_CAP:
            z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)  # cap * tanh(z / cap)
        return z

    @triton.jit
    def _forward(
        logits, targets, kept, shifts, sums, target_logits, columns, first, scale, cap,
        HAS_CAP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per target: a pass for the row's maximum and sum of exponentials; with KEEP one to store them."""
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * columns
        lowest = -3.0e38  # not -inf: so a row of -inf only sums to 0, not NaN
        highest = lowest
        total = 0.0
        for left in range(0, columns, BLOCK):
            at = left + tl.arange(0, BLOCK)
            z = _transformed(tl.load(line + at, mask=at < columns, other=-float("inf")), scale, cap, HAS_CAP)
            z = tl.where(at < columns, z, -float("inf"))
            higher = tl.maximum(highest, tl.max(z, axis=0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), axis=0)
            highest = higher
        tl.store(shifts + row, highest)
        tl.store(sums + row, total)
        if KEEP:
            for left in range(0, columns, BLOCK):
                at = left + tl.arange(0, BLOCK)
                z = _transformed(tl.load(line + at, mask=at < columns, other=0.0), scale, cap, HAS_CAP)
                out = tl.exp(z - highest).to(kept.dtype.element_ty)
                tl.store(kept + row * columns + at, out, mask=at < columns)
        target = tl.load(targets + row) - first
        if (target >= 0) & (target < columns):
            tl.store(target_logits + row, _transformed(tl.load(line + target), scale, cap, HAS_CAP))

    @triton.jit
    def _backward(
        values, targets, shifts, normalisers, grads, out, columns, first, scale, cap,
        HAS_CAP: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the raw logits of one row and one step of columns.

        `values` are exponentials relative to `shifts` (KEPT) or recomputed raw logits.
        """
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        normaliser = tl.load(normalisers + row)
        value = tl.load(values + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        if KEPT:
            shift = tl.load(shifts + row)
            probability = value * tl.exp(shift - normaliser)
            z = tl.log(tl.maximum(value, 1.0e-37)) + shift  # read where there is a cap
        else:
            z = _transformed(value, scale, cap, HAS_CAP)
            probability = tl.exp(z - normaliser)
        is_target = (at == tl.load(targets + row) - first).to(tl.float32)
        gradient = tl.load(grads + row) * (is_target - probability) * scale
        if HAS_CAP:
            gradient = gradient * (1.0 - (z / cap) * (z / cap))
        tl.store(out + row * columns + at, gradient.to(out.dtype.element_ty), mask=inside)


def block_forward(
    logits: Tensor, targets: Tensor, target_logits: Tensor, first: int, scale: float, cap: float | None,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Reduce a block of raw logits.

    Args:
        logits: `[n, columns]` float32, from the matmul.
        targets: `[n]` token ids; for those inside the block `target_logits` `[n]` receives the transformed logit.
        first: token id of the block's first column.
        scale, cap: of `lm_head.LogitTransform`.
        keep: type of the exponentials kept for the backward pass, or None.

    Returns:
        the highest transformed logit of each row, the sum of exponentials relative to it, and those exponentials.
    """
    logits, targets = lines(logits, targets)
    assert target_logits.is_contiguous()  # written to
    rows, columns = logits.shape
    shifts, sums = (torch.empty(rows, device=logits.device, dtype=torch.float32) for _ in range(2))
    kept = None if keep is None else torch.empty_like(logits, dtype=keep)
    _forward[(rows,)](
        logits, targets, logits if kept is None else kept, shifts, sums, target_logits, columns, first,
        scale, cap or 1.0, HAS_CAP=cap is not None, KEEP=kept is not None, BLOCK=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return shifts, sums, kept


def block_backward(
    values: Tensor, targets: Tensor, shifts: Tensor | None, normalisers: Tensor, grads: Tensor, first: int,
    scale: float, cap: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient of a block's raw logits, `[n, columns]` in `dtype`; overwrites `values` if they have that type.

    Args:
        values: the exponentials that `block_forward` kept, with their `shifts`; or raw float32 logits, without.
        grads: `[n]` float32, gradient of each log-probability.
    """
    values, targets, normalisers, grads = lines(values, targets, normalisers, grads)
    shifts = None if shifts is None else shifts.contiguous()
    rows, columns = values.shape
    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    grid = (rows, -(-columns // _COLUMNS))
    _backward[grid](
        values, targets, normalisers if shifts is None else shifts, normalisers, grads, out, columns, first,
        scale, cap or 1.0, HAS_CAP=cap is not None, KEPT=shifts is not None, BLOCK=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return out
