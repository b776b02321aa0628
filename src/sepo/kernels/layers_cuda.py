"""RMSNorm, rotary embeddings and gated activations on a GPU: one Triton kernel in each direction.

As PyTorch operations they read and write their tensors four to ten times: with rows of 16,384 tokens a fifth of a
training step of a billion-parameter Llama. The norm writes its output in the type that the next matmul reads; under
autocast each linear layer would otherwise make and keep its own copy. `layers.py` and `rotary.py` call the kernels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sepo.errors import one_line
from sepo.processes import log_once

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that PyTorch runs on
    triton = None


ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_WIDEST = 16384  # one program holds a whole row of a norm
_ELEMENTS = 1024  # per program of an elementwise kernel


def available(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device, type and width."""
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _WIDEST and can_build(x.device)


@lru_cache
def can_build(device: torch.device) -> bool:
    """Whether Triton builds and runs a kernel on this GPU, tried once a process: slim images have no C compiler."""
    if triton is None:
        return False
    try:
        norm_forward(torch.ones(2, 16, device=device), torch.ones(16, device=device), 1e-6, 0.0, torch.float32)
    except Exception as error:  # of a compiler, a driver or a linker
        log_not_built(error)
        return False
    return True


def log_not_built(error: Exception) -> None:
    """Say once a process that models run without the kernels of this module."""
    log_once(f"  GPU kernels cannot be built here ({one_line(error, 200)}): models run without them, which is slower")


if triton is not None:

    @triton.jit
    def _norm_forward(x, weight, y, inverses, width, eps, offset, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
        tl.store(inverses + row, inverse)
        tl.store(y + row * width + at, (values * inverse * scale).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward(
        x, weight, inverses, grad, d_x, d_weights, rows, rows_each, width, offset, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program takes `rows_each` rows and sums their share of the weight's gradient."""
        program = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
        d_weight = tl.zeros((BLOCK,), tl.float32)
        for row in range(program * rows_each, tl.minimum((program + 1) * rows_each, rows)):
            values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.load(inverses + row)
            normed = values * inverse
            scaled = g * scale
            # The part of the gradient along x changes its length, which the norm undoes.
            along = tl.sum(scaled * normed, axis=0) / width
            out = (scaled - normed * along) * inverse
            tl.store(d_x + row * width + at, out.to(d_x.dtype.element_ty), mask=inside)
            d_weight += g * normed
        tl.store(d_weights + program * width + at, d_weight, mask=inside)

    @triton.jit
    def _rotate(x, cos, sin, out, heads, half, sign, HALF: tl.constexpr, HEADS: tl.constexpr):
        """One program per token: both halves of all heads. `sign` -1 is the transpose, which undoes the rotation."""
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        at = tl.arange(0, HALF)[None]
        line = token * 2 * half + at
        inside = at < half
        cos_one = tl.load(cos + line, mask=inside, other=0.0).to(tl.float32)
        cos_two = tl.load(cos + line + half, mask=inside, other=0.0).to(tl.float32)
        sin_one = tl.load(sin + line, mask=inside, other=0.0).to(tl.float32)
        sin_two = tl.load(sin + line + half, mask=inside, other=0.0).to(tl.float32)
        where = token * heads * 2 * half + head * 2 * half + at
        inside = inside & (head < heads)
        one = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(x + where + half, mask=inside, other=0.0).to(tl.float32)
        if sign > 0:
            first = one * cos_one - two * sin_one
            second = two * cos_two + one * sin_two
        else:
            first = one * cos_one + two * sin_two
            second = two * cos_two - one * sin_one
        tl.store(out + where, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + where + half, second.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _activated(gate, KIND: tl.constexpr):
        """act(gate) and its derivative."""
        if KIND == 0:
            share = tl.sigmoid(gate)
            value = gate * share
            slope = share * (1 + gate * (1 - share))
        else:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            bent = 2 * tl.sigmoid(2 * inner) - 1  # tanh
            value = 0.5 * gate * (1 + bent)
            slope = 0.5 * (1 + bent) + 0.5 * gate * (1 - bent * bent) * 0.7978845608028654 * (
                1 + 0.134145 * gate * gate
            )
        return value, slope

    @triton.jit
    def _gated_forward(gates, ups, out, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32)
        value, _ = _activated(gate, KIND)
        tl.store(out + at, (value * up).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated_backward(
        gates, ups, grads, d_gates, d_ups, products, size, KIND: tl.constexpr, PRODUCT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = _activated(gate, KIND)
        tl.store(d_gates + at, (grad * up * slope).to(d_gates.dtype.element_ty), mask=inside)
        tl.store(d_ups + at, (grad * value).to(d_ups.dtype.element_ty), mask=inside)
        if PRODUCT:
            tl.store(products + at, (value * up).to(products.dtype.element_ty), mask=inside)


def lines(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, contiguous.

    A kernel gets an address, not strides: in a tensor that is a slice, transposed or expanded it would read the wrong
    numbers, and beyond the end.
    """
    return tuple(x.contiguous() for x in tensors)


def norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * (weight + offset)` in `dtype`, and 1 / rms of each row; `x` `[..., width]`."""
    x, weight = lines(x, weight)
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x, dtype=dtype)
    inverses = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _norm_forward[(rows,)](x, weight, y, inverses, width, eps, offset, BLOCK=block, num_warps=_warps(block))
    return y, inverses


def norm_backward(x: Tensor, weight: Tensor, inverses: Tensor, grad: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (in its type) and of the weight (float32)."""
    x, weight, inverses, grad = lines(x, weight, inverses, grad)
    width = x.shape[-1]
    rows = x.numel() // width
    programs = min(rows, 8 * _multiprocessors(x.device))
    each = -(-rows // programs)
    d_x = torch.empty_like(x)
    d_weights = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _norm_backward[(programs,)](
        x, weight, inverses, grad, d_x, d_weights, rows, each, width, offset, BLOCK=block, num_warps=_warps(block)
    )
    return d_x, d_weights.sum(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`x cos + rotate_half(x) sin` (sign 1), or its transpose (sign -1).

    Args:
        x: `[tokens, heads, dim]`.
        cos, sin: `[tokens, dim]`.
    """
    x, cos, sin = lines(x, cos, sin)
    tokens, heads, width = x.shape
    out = torch.empty_like(x)
    _rotate[(tokens,)](
        x, cos, sin, out, heads, width // 2, sign,
        HALF=triton.next_power_of_2(width // 2), HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
    return out


def gated_forward(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up`, for two tensors of one shape."""
    gate, up = lines(gate, up)
    out = torch.empty_like(gate)
    size = gate.numel()
    _gated_forward[(-(-size // _ELEMENTS),)](gate, up, out, size, KIND=ACTIVATIONS[activation], BLOCK=_ELEMENTS)
    return out


def gated_backward(
    activation: str, gate: Tensor, up: Tensor, grad: Tensor, product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `gate` and `up`, and with `product` also `act(gate) * up`, recomputed."""
    gate, up, grad = lines(gate, up, grad)
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    out = torch.empty_like(gate) if product else None
    size = gate.numel()
    _gated_backward[(-(-size // _ELEMENTS),)](
        gate, up, grad, d_gate, d_up, gate if out is None else out, size,
        KIND=ACTIVATIONS[activation], PRODUCT=product, BLOCK=_ELEMENTS,
    )  # fmt: skip
    return d_gate, d_up, out


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
