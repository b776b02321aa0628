"""Losses over pairs: pure functions of log-probability sums (and counts) of the two responses.

Every argument is a `[pairs]` tensor and so is every result; averaging over pairs is the caller's business. Sums run
over the targets: all response tokens, or the selected ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sepo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    gamma: float = 2.0,
    margin: float = 0.0,
) -> Tensor:
    """SePO, the contrast of mean log-probabilities over the key tokens (arXiv 2408.13518, equation 9).

        u = gamma / |S| * sum over S of log pi(y_i | x, y_<i)
        L = -log sigmoid(u_chosen - u_rejected - margin)

    With all tokens selected it is SimPO's loss (arXiv 2405.14734, equation 6) with beta = gamma.

    Args:
        chosen_sums, rejected_sums: `[pairs]` (weighted) sums of policy log-probabilities over the key tokens.
        chosen_counts, rejected_counts: `[pairs]` number of key tokens, or sum of their weights.
        gamma: reward scale. The paper searched 2.1 to 2.5.
        margin: how much better the chosen response should score.
    """
    chosen_rewards = gamma * chosen_sums / chosen_counts
    rejected_rewards = gamma * rejected_sums / rejected_counts
    return -logsigmoid(chosen_rewards - rejected_rewards - margin)


def dpo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    reference_chosen_sums: Tensor,
    reference_rejected_sums: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), with label smoothing as in its conservative form (cDPO).

        h = beta * [(log pi_chosen - log ref_chosen) - (log pi_rejected - log ref_rejected)]
        L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    Args:
        chosen_sums, rejected_sums: `[pairs]` sums of policy log-probabilities over all response tokens.
        reference_chosen_sums, reference_rejected_sums: `[pairs]`, the same under the reference.
        beta: strength of the KL constraint.
        label_smoothing: e, the probability that a label is flipped; 0 to below 0.5.
    """
    logits = beta * ((chosen_sums - reference_chosen_sums) - (rejected_sums - reference_rejected_sums))
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Share of pairs whose chosen reward is the higher one, ties one half: `[pairs]` of 0, 0.5 or 1."""
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
