"""Matmuls, and weight gradients that the matmul itself adds to `weight.grad`.

Autograd first writes a weight's gradient to a temporary tensor. For an embedding this is a dense `[vocabulary, hidden]`
tensor per packed row (0.7 GB for Gemma 3), of which a few hundred lines are not zero. Under autocast, autograd also
rounds each row's part to bfloat16, casts it back and adds it up. `gradients_in_place` avoids all of this.

On a CPU, float32 matmuls use oneDNN instead of MKL: 200 against 170 GFLOP/s on the shapes of SmolLM2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

# With fewer rows (a generation step) oneDNN's set-up costs more than it saves.
FEW_ROWS = 16


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's float32 linear layer."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(2, 3)
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, torch.ones(4, 3), None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(got, torch.full((2, 4), 3.0))


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` for `x` `[n, k]` and `w` `[m, k]`, by the fastest library on this device."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= FEW_ROWS and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.t())


# Lower-precision copies of the weights in one training step; None outside `gradients_in_place`. Shared by all threads:
# on a GPU the backward pass, with the recomputation of activation checkpointing, runs in a thread of its own.
_step_copies: dict[int, Tensor] | None = None


@contextlib.contextmanager
def gradients_in_place(enabled: bool = True) -> Iterator[None]:
    """Context in which prepared models add the gradients of large weights to `weight.grad` in their backward pass.

    It spans the forwards and backwards of one optimizer step: weights must not change inside it. Autograd does not see
    these gradients: hooks on them do not run and `torch.autograd.grad` does not return them. Use it only where
    `may_accumulate_in_place` allows it.
    """
    global _step_copies
    before, _step_copies = _step_copies, {} if enabled else None
    try:
        yield
    finally:
        _step_copies = before


def in_place() -> bool:
    """Whether `gradients_in_place` is active."""
    return _step_copies is not None


def may_accumulate_in_place(model: nn.Module) -> bool:
    """False if something needs this model's gradients from autograd: several processes, or hooks on weights."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def add_gradient(weight: Tensor, left: Tensor, right: Tensor, rows: slice = slice(None)) -> None:
    """`weight.grad[rows] += left.T @ right`, without a temporary where the types allow it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    add_product(weight.grad[rows], left.t(), right)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """`target += left @ right`."""
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    elif left.is_cuda and target.dtype == torch.float32:
        torch.addmm(target, left, right, out_dtype=torch.float32, out=target)
    else:
        target += left @ right


def compute_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the given type; inside `gradients_in_place` it is converted once a step."""
    if weight.dtype == dtype:
        return weight
    copies = _step_copies
    if copies is None:
        return weight.to(dtype)
    if id(weight) not in copies:
        copies[id(weight)] = weight.detach().to(dtype)
    return copies[id(weight)]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type of matmuls with this tensor: autocast's under autocast, else the tensor's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
