"""Matmuls, and gradients that are added to `weight.grad` by the matmul itself.

Autograd would write a weight's gradient to a temporary first; for an embedding that is a dense `[vocabulary, hidden]`
of zeros a row, 0.7 GB for Gemma 3, of which a few hundred lines are used. Under autocast it would also round each row's
part to bfloat16, cast it back and add it up. Inside `gradients_in_place` none of that happens.

On a CPU, float32 products go through oneDNN instead of MKL: 200 against 170 GFLOP/s on the shapes of SmolLM2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

# Below this many rows (a generation step) oneDNN's set-up costs more than it saves.
FEW_ROWS = 16


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Does this build of PyTorch offer oneDNN's float32 linear layer?"""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(2, 3)
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, torch.ones(4, 3), None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(got, torch.full((2, 4), 3.0))


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` for `x` `[n, k]` and `w` `[m, k]`, by whichever library is faster on this device."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= FEW_ROWS and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.t())


# Lower-precision copies of the weights of one training step, or None outside of `gradients_in_place`. One for all
# threads: on a GPU the backward pass, and with it what activation checkpointing computes again, runs in its own thread.
_step_copies: dict[int, Tensor] | None = None


@contextlib.contextmanager
def gradients_in_place(enabled: bool = True) -> Iterator[None]:
    """While it lasts, forwards of prepared models add the gradients of large weights to `weight.grad` themselves.

    For the forwards and backwards of one optimizer step: weights must not change inside it. Autograd does not see those
    gradients: hooks on them do not run and `torch.autograd.grad` does not return them. `may_accumulate_in_place` says
    whether a model can do with that.
    """
    global _step_copies
    before, _step_copies = _step_copies, {} if enabled else None
    try:
        yield
    finally:
        _step_copies = before


def in_place() -> bool:
    """Is `gradients_in_place` on?"""
    return _step_copies is not None


def may_accumulate_in_place(model: nn.Module) -> bool:
    """Does nothing wait for the gradients of this model through autograd (several processes, hooks on weights)?"""
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
    """The weight in the type that is computed with; converted once a step inside `gradients_in_place`."""
    if weight.dtype == dtype:
        return weight
    copies = _step_copies
    if copies is None:
        return weight.to(dtype)
    if id(weight) not in copies:
        copies[id(weight)] = weight.detach().to(dtype)
    return copies[id(weight)]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type of matmuls with this tensor: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
