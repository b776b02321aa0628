"""Statistics of the next-token distribution at each target, which TRL logs: entropy, mean logit, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sepo.forward.lm_head import LogitTransform, block_logits, blocks


@torch.no_grad()
def token_statistics(
    hidden: Tensor, head: nn.Module, ids: Tensor, logps: Tensor, transform: LogitTransform, names: Sequence[str]
) -> dict[str, Tensor]:
    """Statistics of softmax(z) at each target, z = transform(h W^T + b), without a `[targets, vocabulary]` tensor.

    Args:
        hidden: `[N, hidden]`, the final hidden states that predict the targets.
        head: the LM head, a plain linear layer.
        ids: `[N]`, the targets.
        logps: `[N]`, their log-probabilities.
        transform: of the model's logits.
        names: any of entropy (nats), mean_logits (mean of z over the vocabulary), is_top1 (no token is more likely) and
            log_sum_sq_probs (log of the sum of squared probabilities).

    Returns:
        each of `names`, `[N]`.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    hidden = hidden.detach()
    picked = weight[ids].to(torch.promote_types(weight.dtype, torch.float32))
    target = (hidden.to(picked.dtype) * picked).sum(1, keepdim=True)
    target = transform.apply(target if bias is None else target + bias[ids, None])[:, 0]
    normaliser = target - logps.detach().to(target.dtype)
    expected, total, squares = (torch.zeros_like(normaliser) for _ in range(3))
    largest, own = torch.full_like(normaliser, float("-inf")), torch.empty_like(normaliser)
    for rows, columns in blocks(hidden, len(weight)):
        part = None if bias is None else bias[columns]
        logits = block_logits(hidden[rows], weight[columns], part, transform)
        if "mean_logits" in names:
            total[rows] += logits.sum(1)
        if "is_top1" in names:
            largest[rows] = torch.maximum(largest[rows], logits.amax(1))
            local = ids[rows] - columns.start
            inside = (local >= 0) & (local < logits.shape[1])
            values = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            own[rows] = torch.where(inside, values, own[rows])
        if "entropy" in names or "log_sum_sq_probs" in names:
            probabilities = (logits - normaliser[rows, None]).exp_()
            if "log_sum_sq_probs" in names:
                squares[rows] += probabilities.square().sum(1)
            expected[rows] += logits.mul_(probabilities).sum(1)
    found = {
        "entropy": normaliser - expected,
        "mean_logits": total / len(weight),
        "is_top1": own >= largest,
        "log_sum_sq_probs": squares.log(),
    }
    return {name: found[name] for name in names}
