"""KL between policy and reference over the whole vocabulary, at every target: TDPO, TIS-DPO and TBPO use it.

A log-probability needs one logit and a normaliser. A KL needs every logit of both models, so it cannot be stored before
training: the frozen reference runs beside the policy (about a third more time for equal models). The LM heads process a
few targets at a time under activation checkpointing, so memory is bounded by one chunk of both models' logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sepo.forward.logps import read_hidden, target_hidden
from sepo.forward.packing import PackedBatch
from sepo.kernels.lm_head import LogitTransform, head_logits
from sepo.models.adapters import causal_lm

# Bytes of both models' logits of one chunk of targets. Small chunks would leave a GPU idle.
_CHUNK_BYTES = 64 * 2**20
_GPU_CHUNK_BYTES = 512 * 2**20


def token_logps_and_kl(
    model: nn.Module, reference: nn.Module, batch: PackedBatch, direction: str, frozen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, and the KL between the models' next-token distributions there.

        forward   KL(reference || model) = sum over v of ref(v) (log ref(v) - log pi(v))
        reverse   KL(model || reference)

    Args:
        model: the policy, prepared by `prepare.prepare_model`; it gets gradients if they are enabled.
        reference: a frozen model with the same vocabulary and layout.
        direction: "forward" or "reverse".
        frozen: `read_hidden` of the reference for this batch, or None to compute it here.

    Returns:
        logps and kl, each `[N]` float32 (float64 for float64 models), in nats.
    """
    hidden = target_hidden(causal_lm(model), batch)
    if frozen is None:
        with torch.no_grad():
            frozen = read_hidden(reference, batch)
    parts = _Heads(model, reference, direction == "forward")
    wide = 8 if hidden.dtype == torch.float64 else 4
    budget = _CHUNK_BYTES if hidden.device.type == "cpu" else _GPU_CHUNK_BYTES
    rows = max(1, budget // (parts.vocabulary * wide * 2))
    pieces = []
    for start in range(0, len(hidden), rows):
        chunk = (hidden[start : start + rows], frozen[start : start + rows], batch.target_ids[start : start + rows])
        if torch.is_grad_enabled():
            pieces.append(checkpoint(parts, *chunk, use_reentrant=False))
        else:
            pieces.append(parts(*chunk))
    logps, kls = zip(*pieces, strict=True)
    return torch.cat(logps), torch.cat(kls)


class _Heads:
    """The two LM heads, applied to one chunk of targets."""

    def __init__(self, model: nn.Module, reference: nn.Module, forward_kl: bool):
        self.head, self.transform = _head_of(model)
        self.reference_head, self.reference_transform = _head_of(reference)
        self.forward_kl = forward_kl
        self.vocabulary = getattr(self.head, "out_features", 2**17)

    def __call__(self, hidden: Tensor, frozen: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        log_policy = self._log_softmax(self.head, self.transform, hidden)
        with torch.no_grad():
            log_reference = self._log_softmax(self.reference_head, self.reference_transform, frozen)
        if self.forward_kl:
            kl = _kl(log_reference, log_policy)
        else:
            kl = _kl(log_policy, log_reference)
        return log_policy.gather(1, target_ids[:, None])[:, 0], kl

    @staticmethod
    def _log_softmax(head: nn.Module, transform: LogitTransform, hidden: Tensor) -> Tensor:
        return transform.apply(head_logits(head, hidden)).log_softmax(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; a token of probability 0 under p adds 0, whatever q is (0 log 0 = 0)."""
    never = log_p.isneginf()
    log_p = log_p.masked_fill(never, 0)  # before the product: 0 times infinity is NaN, and so is its gradient
    return (log_p.exp() * (log_p - log_q.masked_fill(never, 0))).masked_fill(never, 0).sum(1)


def _head_of(model: nn.Module) -> tuple[nn.Module, LogitTransform]:
    lm = causal_lm(model)
    return lm.get_output_embeddings(), LogitTransform.from_config(lm.config)
