"""Log-probabilities of target tokens through the LM head, without a `[targets, vocabulary]` tensor.

    log p_i = z_i[y_i] - logsumexp(z_i),   z_i = transform(h_i W^T + b),   transform: scale, then soft-cap

Rows are projected in chunks. The gradient needs softmax(z) again; recomputing it costs a fourth matmul beside the
three that are unavoidable, so the logits of as many chunks as fit a fixed budget (256 MiB) are kept until the
backward pass and only the rest are recomputed. Memory is bounded by the budget plus one chunk, whatever the number of
targets or the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20
KEEP_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits: `softcap * tanh(scale * z / softcap)`; scale 1 and no cap by default."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config) -> LogitTransform:
        """Read Gemma's `final_logit_softcapping`, Cohere's `logit_scale` and Granite's `logits_scaling`."""
        config = config.get_text_config()
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:
            scale = 1.0 / float(config.logits_scaling)
        return cls(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform float logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap is not None else logits

    def backward_(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Turn the gradient of transformed logits (given those logits) into that of raw logits, in place."""
        if self.softcap is not None:
            assert logits is not None
            grad.mul_(1.0 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


def target_logps(hidden: Tensor, head: nn.Module, target_ids: Tensor, transform: LogitTransform) -> Tensor:
    """Log-probability of each target under the LM head.

    Args:
        hidden: `[N, hidden]`, the final hidden states that predict the targets.
        head: the model's output embedding; a plain `nn.Linear` takes the fused path, anything else (quantised,
            LoRA-wrapped) is called chunk by chunk under activation checkpointing.
        target_ids: `[N]`.
        transform: what the model does to its logits.

    Returns:
        `[N]` float32 (float64 for float64 inputs).
    """
    if type(head) is nn.Linear:
        return _TargetLogps.apply(hidden, head.weight, head.bias, target_ids, transform)
    vocabulary = getattr(head, "out_features", 2**17)
    rows = _rows_per_chunk(vocabulary, hidden)
    parts = []
    for start in range(0, len(hidden), rows):
        piece = (hidden[start : start + rows], target_ids[start : start + rows])
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logps, head, transform, *piece, use_reentrant=False))
        else:
            parts.append(_chunk_logps(head, transform, *piece))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_float(hidden))


def _chunk_logps(head: nn.Module, transform: LogitTransform, hidden: Tensor, target_ids: Tensor) -> Tensor:
    logits = transform.apply(head(hidden).to(_float(hidden)))
    return logits.gather(1, target_ids[:, None])[:, 0] - logits.logsumexp(1)


def _float(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rows_per_chunk(vocabulary: int, hidden: Tensor) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * (8 if hidden.dtype == torch.float64 else 4)))


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, transform: LogitTransform
    ) -> Tensor:
        compute = weight.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            compute = torch.get_autocast_dtype(hidden.device.type)
        h, w = hidden.to(compute), weight.to(compute)
        needs_grad = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        kept_bytes = 0
        logps = torch.empty(len(h), dtype=_float(h), device=h.device)
        normalisers = torch.empty_like(logps)
        rows = _rows_per_chunk(len(w), h)
        for start in range(0, len(h), rows):
            span = slice(start, start + rows)
            logits = _logits(h[span], w, bias, transform)
            normalisers[span] = logits.logsumexp(1)
            logps[span] = logits.gather(1, target_ids[span, None])[:, 0] - normalisers[span]
            size = logits.numel() * logits.element_size()
            if needs_grad and kept_bytes + size <= KEEP_BYTES and start == len(kept) * rows:
                kept.append(logits)
                kept_bytes += size
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers, *kept)
        ctx.transform, ctx.compute, ctx.rows = transform, compute, rows
        return logps

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        hidden, weight, bias, target_ids, normalisers, *kept = ctx.saved_tensors
        h, w = hidden.to(ctx.compute), weight.to(ctx.compute)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        for index, start in enumerate(range(0, len(h), ctx.rows)):
            span = slice(start, start + ctx.rows)
            logits = kept[index] if index < len(kept) else _logits(h[span], w, bias, ctx.transform)
            capped = logits.clone() if ctx.transform.softcap is not None else None
            # d logp / d z = onehot - softmax(z)
            d_logits = logits.sub_(normalisers[span, None]).exp_().neg_()
            d_logits[torch.arange(len(d_logits), device=h.device), target_ids[span]] += 1.0
            d_logits.mul_(grad[span, None])
            ctx.transform.backward_(d_logits, capped)
            if d_bias is not None:
                d_bias += d_logits.sum(0).to(d_bias.dtype)
            d_logits = d_logits.to(ctx.compute)
            if d_hidden is not None:
                d_hidden[span] = d_logits @ w
            if d_weight is not None:
                if d_weight.dtype == d_logits.dtype:
                    d_weight.addmm_(d_logits.t(), h[span])
                else:
                    d_weight += d_logits.t() @ h[span]
        return d_hidden, d_weight, d_bias, None, None


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = torch.mm(h, w.t()).to(_float(h))
    if bias is not None:
        logits += bias
    return transform.apply_(logits)
