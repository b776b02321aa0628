"""Log-probabilities of target tokens through the LM head, without a `[targets, vocabulary]` tensor.

    log p_i = z_i[y_i] - logsumexp(z_i),   z_i = transform(h_i W^T + b),   transform: scale, then soft-cap

The vocabulary is processed in blocks that fit the processor's cache (a few thousand tokens wide, all targets high), so
every line of W is read once for the logits and once for the gradients. The usual chunks of targets against the whole
vocabulary read W once per chunk: 0.7 GB for Gemma 3.

The gradient needs softmax(z) again. Recomputing it costs a fourth matmul beside the three unavoidable ones, so as many
blocks as fit a fixed budget are kept until the backward pass and only the others are recomputed. A kept block holds
exp(z - max), which replaces z in place for the sum; the backward pass only scales it. Memory is bounded by the budget
plus one block, whatever the number of targets or the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sepo.kernels import lm_head_cuda
from sepo.kernels.gradients import add_gradient, add_product, compute_copy, compute_dtype, in_place, matmul_nt
from sepo.models.sharding import inside_call, waits_for_call


@dataclass(frozen=True)
class HeadLimits:
    """Sizes of the blocks of logits.

    Attributes:
        block_bytes: logits of one block: a share of the last-level cache on a CPU; enough to occupy a GPU.
        block_targets: targets in one block; more targets take several rounds over the vocabulary.
        keep_bytes: exponentials of logits kept for the backward pass.
    """

    block_bytes: int
    block_targets: int
    keep_bytes: int


CPU_LIMITS = HeadLimits(block_bytes=4 * 2**20, block_targets=1024, keep_bytes=256 * 2**20)
GPU_LIMITS = HeadLimits(block_bytes=256 * 2**20, block_targets=16384, keep_bytes=2 * 2**30)


@dataclass(frozen=True)
class LogitTransform:
    """A model's transform of its logits: `softcap * tanh(scale * z / softcap)`; scale 1 and no cap by default."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config) -> LogitTransform:
        """Read `final_logit_softcapping` (Gemma), `logits_soft_cap` (RecurrentGemma), `logit_scale` (Cohere) and
        `logits_scaling` (Granite divides by it, HyperCLOVA X multiplies).
        """
        config = config.get_text_config()
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:
            scale = float(config.logits_scaling)
            scale = scale if config.model_type.startswith("hyperclovax") else 1.0 / scale
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(scale=scale, softcap=softcap)

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
        """Turn the gradient of transformed logits, given as `logits`, into that of raw logits, in place."""
        if self.softcap is not None:
            assert logits is not None
            grad.mul_(1.0 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


# Called with the targets and the part of the vocabulary of a block, and its transformed logits, not to be changed.
BlockReader = Callable[[slice, slice, Tensor], None]


def target_logps(
    hidden: Tensor, head: nn.Module, target_ids: Tensor, transform: LogitTransform, reader: BlockReader | None = None
) -> Tensor:
    """Log-probability of each target under the LM head.

    Args:
        hidden: `[N, hidden]`, the final hidden states that predict the targets.
        head: the model's output embedding. A plain `nn.Linear` takes the fused path; any other (quantised,
            LoRA-wrapped) is called chunk by chunk under activation checkpointing.
        target_ids: `[N]`.
        transform: of the model's logits.
        reader: sees the logits of each block once, in the forward pass.

    Returns:
        `[N]` float32 (float64 for float64 inputs).
    """

    def fused(h: Tensor) -> Tensor:
        return _TargetLogps.apply(h, head.weight, head.bias, target_ids, transform, reader)

    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and waits_for_call(head):
        return inside_call(head, fused, hidden)
    if type(head) is nn.Linear:
        return fused(hidden)
    vocabulary = getattr(head, "out_features", 2**17)
    rows = max(1, 16 * _limits(hidden).block_bytes // (vocabulary * 4))
    parts = []
    for start in range(0, len(hidden), rows):
        chunk = (hidden[start : start + rows], target_ids[start : start + rows])
        if reader is not None:
            with torch.no_grad():
                logits = transform.apply(head(chunk[0]).to(_float(hidden)))
            reader(slice(start, start + len(chunk[0])), slice(0, logits.shape[1]), logits)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logps, head, transform, *chunk, use_reentrant=False))
        else:
            parts.append(_chunk_logps(head, transform, *chunk))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_float(hidden))


def head_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """All logits of the LM head before their transform, `[N, V]`, rounded as those of `target_logps`.

    Half precision is summed and returned in float32: bfloat16 rounds a logit of 20 by up to 0.06.
    """
    if (
        not isinstance(head, nn.Linear)
        or type(head).forward is not nn.Linear.forward
        or compute_dtype(head.weight) not in _HALF
    ):
        return head(hidden).to(_float(hidden))
    if waits_for_call(head):
        return inside_call(head, lambda h: _HeadLogits.apply(h, head.weight, head.bias), hidden)
    return _HeadLogits.apply(hidden, head.weight, head.bias)


class _HeadLogits(torch.autograd.Function):
    """`h W^T (+ b)` in half precision, summed and returned in float32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(weight)
        h, w = hidden.to(dtype), compute_copy(weight, dtype)
        ctx.save_for_backward(h, w)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return block_logits(h, w, bias, LogitTransform())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, w = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad
        low = grad.to(h.dtype)
        of_hidden, of_weight, of_bias = ctx.dtypes
        return (
            matmul_nt(low, w.t()).to(of_hidden) if need_hidden else None,
            (low.t() @ h).to(of_weight) if need_weight else None,
            grad.sum(0).to(of_bias) if need_bias else None,
        )


def _chunk_logps(head: nn.Module, transform: LogitTransform, hidden: Tensor, target_ids: Tensor) -> Tensor:
    logits = transform.apply(head(hidden).to(_float(hidden)))
    return logits.gather(1, target_ids[:, None])[:, 0] - logits.logsumexp(1)


_HALF = (torch.float16, torch.bfloat16)


def _float(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _limits(hidden: Tensor) -> HeadLimits:
    return CPU_LIMITS if hidden.device.type == "cpu" else GPU_LIMITS


def blocks(hidden: Tensor, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """(targets, vocabulary) slices of the blocks: all blocks of the first group of targets, then of the next."""
    limits = _limits(hidden)
    for start in range(0, len(hidden), limits.block_targets):
        rows = slice(start, min(start + limits.block_targets, len(hidden)))
        size = (rows.stop - rows.start) * (8 if hidden.dtype == torch.float64 else 4)
        # Widths in multiples of 64 suit the matmul's inner loops.
        width = max(64, limits.block_bytes // size // 64 * 64)
        for left in range(0, vocabulary, width):
            yield rows, slice(left, min(left + width, vocabulary))


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        transform: LogitTransform,
        reader: BlockReader | None,
    ) -> Tensor:
        dtype = compute_dtype(weight)
        h, w = hidden.to(dtype), compute_copy(weight, dtype)
        budget = _limits(h).keep_bytes if any(ctx.needs_input_grad) else 0
        kept: list[tuple[Tensor, Tensor]] = []
        targets = torch.zeros(len(h), dtype=_float(h), device=h.device)
        normalisers = torch.full_like(targets, float("-inf"))
        ctx.fused = lm_head_cuda.available(h) and bias is None
        for rows, columns in blocks(h, len(w)):
            if ctx.fused:
                raw = lm_head_cuda.matmul_float32(h[rows], w[columns])
                if reader is not None:
                    reader(rows, columns, transform.apply(raw))
                budget -= raw.numel() * h.element_size()
                shift, sums, exponentials = lm_head_cuda.block_forward(
                    raw, target_ids[rows], targets[rows], columns.start, transform.scale, transform.softcap,
                    h.dtype if budget >= 0 else None,
                )  # fmt: skip
                normalisers[rows] = torch.logaddexp(normalisers[rows], sums.log_() + shift)
                if exponentials is not None:
                    kept.append((exponentials, shift))
                continue
            logits = block_logits(h[rows], w[columns], None if bias is None else bias[columns], transform)
            if reader is not None:
                reader(rows, columns, logits)
            inside, local = _inside(target_ids[rows], columns)
            targets[rows] += torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0)
            # Clamped to the lowest finite number, so that a row of -inf only sums to 0, not NaN.
            shift = logits.amax(1).clamp_min_(torch.finfo(logits.dtype).min)
            exponentials = logits.sub_(shift[:, None]).exp_()
            normalisers[rows] = torch.logaddexp(normalisers[rows], exponentials.sum(1).log_() + shift)
            budget -= logits.numel() * logits.element_size()
            if budget >= 0:
                kept.append((exponentials, shift))
        ctx.save_for_backward(h, w, bias, target_ids, targets, normalisers, *(part for block in kept for part in block))
        ctx.weight, ctx.transform, ctx.in_place, ctx.hidden_dtype = weight, transform, in_place(), hidden.dtype
        return targets - normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, w, bias, target_ids, targets, normalisers, *kept = ctx.saved_tensors
        weight = ctx.weight
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(h, dtype=_float(h)) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight and not ctx.in_place else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        # d logp / d z = onehot - softmax(z)
        d_targets = ctx.transform.backward_(grad.clone(), targets)
        for index, (rows, columns) in enumerate(blocks(h, len(w))):
            if ctx.fused:
                values, shift = kept[2 * index : 2 * index + 2] if 2 * index < len(kept) else (None, None)
                if values is None:
                    values = lm_head_cuda.matmul_float32(h[rows], w[columns])
                d_logits = lm_head_cuda.block_backward(
                    values, target_ids[rows], shift, normalisers[rows], grad[rows], columns.start,
                    ctx.transform.scale, ctx.transform.softcap, h.dtype,
                )  # fmt: skip
                if d_hidden is not None:
                    add_product(d_hidden[rows], d_logits, w[columns])
            else:
                if 2 * index < len(kept):
                    exponentials, shift = kept[2 * index : 2 * index + 2]
                else:
                    shift = normalisers[rows]
                    exponentials = block_logits(
                        h[rows], w[columns], None if bias is None else bias[columns], ctx.transform
                    )
                    exponentials.sub_(shift[:, None]).exp_()
                capped = None
                if ctx.transform.softcap is not None:
                    # Where the exponential is 0 the logit is unknown, but its share of the gradient is 0 too.
                    capped = exponentials.clamp_min(torch.finfo(exponentials.dtype).tiny).log_().add_(shift[:, None])
                d_logits = exponentials.mul_((-grad[rows] * torch.exp(shift - normalisers[rows]))[:, None])
                ctx.transform.backward_(d_logits, capped)
                inside, local = _inside(target_ids[rows], columns)
                d_logits.scatter_add_(1, local[:, None], (d_targets[rows] * inside)[:, None])
                if d_bias is not None:
                    d_bias[columns] += d_logits.sum(0).to(d_bias.dtype)
                d_logits = d_logits.to(h.dtype)
                if d_hidden is not None:
                    d_hidden[rows] += matmul_nt(d_logits, w[columns].t())
            if need_weight and ctx.in_place:
                add_gradient(weight, d_logits, h[rows], columns)
            elif d_weight is not None:
                d_weight[columns] += (d_logits.t() @ h[rows]).to(d_weight.dtype)
        return None if d_hidden is None else d_hidden.to(ctx.hidden_dtype), d_weight, d_bias, None, None, None


def _inside(target_ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block of the vocabulary, and their column in it (0 for the others)."""
    inside = (target_ids >= columns.start) & (target_ids < columns.stop)
    return inside, torch.where(inside, target_ids - columns.start, 0)


def block_logits(h: Tensor, w: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    if h.dtype not in _HALF:
        logits = matmul_nt(h, w)
    elif h.is_cuda:
        logits = lm_head_cuda.matmul_float32(h, w)
    else:
        with torch.autocast(h.device.type, enabled=False):  # it would round the product
            logits = matmul_nt(h.float(), w.float())
    if bias is not None:
        logits += bias
    return transform.apply_(logits)
