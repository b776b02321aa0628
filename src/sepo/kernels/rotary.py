"""Rotary embeddings by one kernel on a GPU, installed in the Python modules of a model's attention layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sepo.kernels import layers_cuda


class _RotaryFunction(torch.autograd.Function):
    """Rotary embedding of queries or keys `[batch, heads, T, dim]`, computed in float32; the type stays."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _RotaryFunction._rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _RotaryFunction._rotate(grad, cos, sin, -1), None, None

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        batch, heads, length, width = x.shape
        rows = x.transpose(1, 2).reshape(batch * length, heads, width)
        cos, sin = (part.expand(batch, length, width).reshape(batch * length, width) for part in (cos, sin))
        return layers_cuda.rotate(rows, cos, sin, sign).view(batch, length, heads, width).transpose(1, 2)


def _rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap a model's rotary function: fused on a GPU, the original elsewhere."""

    @wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        plain = args or kwargs or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]
        if plain or cos.requires_grad or not layers_cuda.available(q):
            return original(q, k, cos, sin, *args, **kwargs)
        return _RotaryFunction.apply(q, cos, sin), _RotaryFunction.apply(k, cos, sin)

    apply_rotary_pos_emb.sepo_fused = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def use_fused_rotary(lm: PreTrainedModel) -> None:
    """Install the fused rotary function where it gives the model's values and gradients on a test input."""
    device = next(lm.parameters()).device
    if not layers_cuda.available(torch.empty(1, 1, device=device)):
        return
    for name in {type(module).__module__ for module in lm.modules() if type(module).__name__.endswith("Attention")}:
        original = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
        if original is None or getattr(original, "sepo_fused", False):
            continue
        fused = _rotary(original)
        # Sines instead of random numbers: the global random state belongs to the training.
        q, k, cos, sin = (
            (torch.arange(7 * heads * 16, device=device) * step).sin().view(1, 7, heads, 16).transpose(1, 2)
            for heads, step in ((4, 1.3), (2, 1.7), (1, 0.9), (1, 0.7))
        )
        try:
            results = []
            for function in (original, fused):
                inputs = [x.detach().clone().requires_grad_() for x in (q, k)]
                with torch.enable_grad():
                    outputs = function(*inputs, cos[:, 0], sin[:, 0])
                    gradients = torch.autograd.grad([(x * x.sin()).sum() for x in outputs], inputs)
                results.append([*outputs, *gradients])
            same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
        except Exception:  # of a function with other arguments, or of a compiler
            same = False
        if same:
            sys.modules[name].apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
