"""Losses over pairs: pure functions of log-probability sums (and counts) of the two responses.

Arguments are `[pairs]` tensors of the chosen and the rejected responses, results are `[pairs]` losses; the caller
averages over pairs. Sums run over the targets, each times its weight: all response tokens, or the selected ones. The
load-balancing loss of mixtures of experts is the trainer's (`router_aux_loss_coef`).

The table `sepo.recipe.objectives.OBJECTIVES` lists what each objective reads; docs/objectives.md compares them.
`LOSSES` maps the names to the formulas, and the trainer calls `pair_losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sepo.recipe.objectives import OBJECTIVES, Objective

# `[pairs]` values of the chosen and of the rejected responses.
Sides = tuple[Tensor, Tensor]
Given = TypeVar("Given")


def sepo(sums: Sides, counts: Sides, gamma: float = 2.0, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """SePO, the contrast of mean log-probabilities over the key tokens (arXiv 2408.13518, equation 9).

        u = gamma / |S| * sum over S of log pi(y_i | x, y_<i)
        L = -log sigmoid(u_chosen - u_rejected - margin)

    Args:
        sums: (weighted) sums of policy log-probabilities over the key tokens.
        counts: number of key tokens, or sum of their weights.
        gamma: reward scale. The paper searched 2.1 to 2.5.
        margin: the reward difference that the loss aims for.
        label_smoothing: probability that a label is flipped, as in `dpo`; 0 in the paper.
    """
    chosen, rejected = _means(sums, counts)
    return _contrast(gamma * (chosen - rejected) - margin, label_smoothing)


def simpo(sums: Sides, counts: Sides, gamma: float = 2.0, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): SePO's loss with every response token in the sums.

        L = -log sigmoid(gamma / |y_w| log pi(y_w) - gamma / |y_l| log pi(y_l) - margin)

    The names are SePO's: `gamma` is the paper's beta (2.0 to 2.5), and `margin` is the paper's gamma (0.5 to 1.6).
    """
    return sepo(sums, counts, gamma, margin, label_smoothing)


def confpo(sums: Sides, counts: Sides, gamma: float = 2.0, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """ConfPO (arXiv 2506.08712): SimPO over the tokens that `below_mean_probability` marks.

    The loss of a pair is 0 if a response has no token below its mean (one token, or equal probabilities), as in the
    authors' code.

    Args:
        sums, counts: over the marked tokens; counts may be 0.
    """
    chosen, rejected = counts
    usable = (chosen > 0) & (rejected > 0)
    return sepo(sums, (chosen.clamp(min=1), rejected.clamp(min=1)), gamma, margin, label_smoothing) * usable


def below_mean_probability(logps: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Mark the tokens that ConfPO trains on: less probable than their response's mean (arXiv 2506.08712, section 4).

        pi(y_i | x, y_<i) < 1 / |y| * sum over j of pi(y_j | x, y_<j)

    Args:
        logps: `[targets]` log-probabilities under the current policy, all tokens of each response.
        segments: `[targets]`, the response of each target, below `num_segments`.

    Returns:
        `[targets]` bool, without gradient.
    """
    probabilities = logps.detach().exp()
    sums = probabilities.new_zeros(num_segments).index_add(0, segments, probabilities)
    counts = probabilities.new_zeros(num_segments).index_add(0, segments, torch.ones_like(probabilities))
    # Rounding must not put equal probabilities below their mean.
    margin = 1 - 8 * torch.finfo(probabilities.dtype).eps
    return probabilities < (sums / counts.clamp(min=1))[segments] * margin


def dpo(sums: Sides, reference: Sides, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), with label smoothing as in its conservative form (cDPO).

        h = beta * [(log pi_chosen - log ref_chosen) - (log pi_rejected - log ref_rejected)]
        L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    Args:
        sums: sums of policy log-probabilities over all response tokens.
        reference: the same under the reference.
        beta: strength of the KL constraint.
        label_smoothing: e, the probability that a label is flipped; 0 to below 0.5.
    """
    return _contrast(beta * _margins(sums, reference), label_smoothing)


def ipo(sums: Sides, counts: Sides, reference: Sides, beta: float = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17) on log-ratios per token.

        h = (log pi_chosen - log ref_chosen) / |y_w| - (log pi_rejected - log ref_rejected) / |y_l|
        L = (h - 1 / (2 beta))^2

    The paper has sums. Its authors ran means over tokens (confirmed to TRL, which does the same), so that a long
    response does not need a larger margin.
    """
    chosen, rejected = ((own - theirs) / count for own, theirs, count in zip(sums, reference, counts, strict=True))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def cpo(sums: Sides, counts: Sides, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """CPO (arXiv 2401.08417, equation 5): DPO with a uniform reference, and a likelihood term on the chosen side.

        L = -log sigmoid(beta log pi(y_w) - beta log pi(y_l)) - alpha / |y_w| log pi(y_w)

    The likelihood term is a mean over the response's tokens, so that it does not grow with length.
    """
    chosen, rejected = sums
    return _contrast(beta * (chosen - rejected), label_smoothing) - alpha * chosen / counts[0]


def orpo(sums: Sides, counts: Sides, alpha: float = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691, equations 4, 6 and 7): likelihood of the chosen response plus a log odds ratio.

        P(y) = exp(1 / |y| log pi(y)),   odds(y) = P(y) / (1 - P(y))
        L = -log P(y_w) - alpha log sigmoid(log odds(y_w) - log odds(y_l))

    `alpha` is the paper's lambda (TRL's beta). The odds use log P of at most -1e-6, since they are infinite at P = 1.
    The likelihood term is a mean over the response's tokens. TRL's is a mean over all tokens of a batch, prompts
    included, so it also trains on prompts and weights longer responses more.
    """
    chosen, rejected = (mean.clamp(max=-1e-6) for mean in _means(sums, counts))
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -sums[0] / counts[0] - alpha * logsigmoid(log_odds)


def rrhf(sums: Sides, counts: Sides, alpha: float = 1.0) -> Tensor:
    """RRHF (arXiv 2304.05302, equations 1 to 4) for two responses: a hinge on mean log-probabilities, and likelihood.

        p(y) = 1 / |y| log pi(y)
        L = max(0, p(y_l) - p(y_w)) - alpha p(y_w)

    The likelihood term is a mean over tokens as in the authors' code (a sum in their equation 3).
    """
    chosen, rejected = _means(sums, counts)
    return torch.relu(rejected - chosen) - alpha * chosen


def tdpo1(sums: Sides, reference: Sides, kls: Sides, beta: float = 0.1) -> Tensor:
    """TDPO1 (arXiv 2404.11999, equations 14 to 16): DPO with the difference of the sequential forward KLs.

        u = beta * [(log pi_w - log ref_w) - (log pi_l - log ref_l)]
        L = -log sigmoid(u - beta (D(y_l) - D(y_w))),   D(y) = sum over t of KL(ref || pi)(. | x, y_<t)

    Args:
        kls: D of each response, with gradient (see `token_kl.py`).
    """
    return -logsigmoid(beta * (_margins(sums, reference) - (kls[1] - kls[0])))


def tdpo2(sums: Sides, reference: Sides, kls: Sides, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO2 (arXiv 2404.11999, equation 17): TDPO1 with a weight, and no gradient through the chosen side's KL.

        L = -log sigmoid(u - alpha beta (D(y_l) - stop_gradient(D(y_w))))

    with u and D of `tdpo1`.
    """
    return -logsigmoid(beta * (_margins(sums, reference) - alpha * (kls[1] - kls[0].detach())))


def tis_dpo(sums: Sides, reference: Sides, kls: Sides | None = None, beta: float = 0.1, alpha: float = 0.0) -> Tensor:
    """TIS-DPO (arXiv 2410.04350, equation 13): DPO with an importance weight on every token.

        u = beta * [sum w_i (log pi - log ref)(y_w,i) - sum w_i (log pi - log ref)(y_l,i)]
        eta = beta * [sum w_i KL(pi || ref)(. | y_w,<i) - sum w_i KL(pi || ref)(. | y_l,<i)]
        L = -log sigmoid(u - alpha eta)

    alpha is 1 in the paper's equation and 0 by default in the authors' code. The paper's weights are exp(±clamp(log
    pi+ / pi-, -0.5, 1.5)) with a contrastive pair of models pi+ and pi-. Soft credit of `selection.py` gives them, with
    oracle and reference as the pair. With weights of 0 and 1 this is DPO on the selected tokens.

    Args:
        sums, reference, kls: weighted; `kls` are not needed when alpha is 0.
    """
    chosen_kls, rejected_kls = (0.0, 0.0) if kls is None else kls
    return -logsigmoid(beta * (_margins(sums, reference) - alpha * (chosen_kls - rejected_kls)))


def tgdpo(sums: Sides, reference: Sides, beta: float = 0.1) -> Tensor:
    """TGDPO (arXiv 2506.14574), as in the authors' code: DPO whose beta grows with the token's reward.

        L = -log sigmoid(sum beta (1 + alpha beta s_t) d_t over y_w - sum beta (1 - alpha beta s_t) d_t over y_l)

    with d_t = log pi - log ref of a token, and its reward s_t = log pi_oracle - log ref. The authors use alpha 0.5 and
    beta 0.1.

    Args:
        sums, reference: each token weighted by 1 ± alpha beta s_t (`guided_weights`).
    """
    return dpo(sums, reference, beta)


def guided_weights(rewards: np.ndarray, sign: int, alpha: float = 0.5, beta: float = 0.1) -> np.ndarray:
    """Token weights of TGDPO: 1 + sign alpha beta s_t, with `sign` 1 for chosen and -1 for rejected responses."""
    return 1 + sign * alpha * beta * rewards


def wspo(chosen_errors: Tensor, chosen_counts: Tensor) -> Tensor:
    """WSPO (arXiv 2410.18640): regress the policy's log-ratio on the weak model's, on the chosen response only.

        L = 1 / |y_w| * sum over t of (beta (log pi - log ref)(y_w,t) - s_t)^2,    s_t = log pi_weak - log ref_weak

    The mean is over a response, as for the other objectives; the authors' is over the tokens of a batch.

    Args:
        chosen_errors: `[pairs]` sums of the squared errors.
        chosen_counts: `[pairs]` number of tokens of each chosen response.
    """
    return chosen_errors / chosen_counts


def selective_marks(
    logps: Tensor, reference_logps: Tensor, segments: Tensor, num_segments: int, rate: float = 0.4
) -> Tensor:
    """Mark the tokens that Selective-DPO trains on (arXiv 2507.07725): DPO over these is its loss.

        a_t = log ref - log pi in chosen responses,  log pi - log ref in rejected ones
        kept where a_t is at least the (1 - rate) quantile of its response

    This is SePO with the current policy as the oracle. Before training, policy and reference are equal, so rounding
    decides; if all a_t are exactly equal, all tokens are kept.

    Args:
        logps, reference_logps: `[targets]`, all tokens of each response; used without gradient.
        segments: `[targets]`, ascending, even for chosen responses and odd for rejected ones.
        rate: share of a response's tokens to keep, at least one token.

    Returns:
        `[targets]` bool.
    """
    gaps = (reference_logps - logps.detach()) * (1 - 2 * (segments % 2))
    counts = torch.bincount(segments, minlength=num_segments)
    by_gap = torch.argsort(gaps, descending=True, stable=True)
    order = by_gap[torch.argsort(segments[by_gap], stable=True)]  # by response, then by falling gap
    kept = (rate * counts + 1e-6).floor().long().clamp(min=1)
    last = (counts.cumsum(0) - counts + kept - 1).clamp(max=max(len(gaps) - 1, 0))
    return gaps >= gaps[order[last]][segments]


def tbpo(
    advantages: Tensor, segments: Tensor, num_pairs: int, beta: float = 0.1, alpha: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """TBPO-A (arXiv 2605.12288) with the scaled Basu generator, as in the authors' code: ratios of matched tokens.

        a_t = log pi - log ref + KL(ref || pi)(. | x, y_<t)
        z_t = beta (a_t(y_l) - a_t(y_w)),   t = 1 ... min(|y_w|, |y_l|)
        L = mean over t of [exp((1 + alpha) z_t) / (1 + alpha) - (exp(-alpha z_t) - 1) / alpha] / 4

    alpha is the paper's lambda, 0 in the authors' runs, where the bracket becomes exp(z) + z. The factor 1/4 gives the
    gradient of DPO at z = 0. z is clipped to ±30. The KL represents the value of a prefix, which does not cancel
    between responses. TBPO-Q, which learns a value head instead, is not implemented.

    Args:
        advantages: `[targets]` a of the first min(|y_w|, |y_l|) tokens of both responses of each pair.
        segments: `[targets]`, ascending, 2 * pair for chosen and 2 * pair + 1 for rejected ones.
        smoothing: probability that a label is flipped; 0 in the paper.
    """
    is_rejected = segments % 2 == 1
    chosen, rejected = advantages[~is_rejected], advantages[is_rejected]
    pairs = segments[is_rejected] // 2
    if not torch.equal(segments[~is_rejected] // 2, pairs):
        raise ValueError("tbpo needs as many tokens of a chosen response as of the rejected one")
    log_ratios = (beta * (rejected - chosen)).clamp(-30, 30)
    losses = (1 - smoothing) * _basu(log_ratios, alpha) + smoothing * _basu(-log_ratios, alpha)
    sums = losses.new_zeros(num_pairs).index_add(0, pairs, losses)
    return sums / torch.bincount(pairs, minlength=num_pairs).clamp(min=1)


# Range of the importance ratio in `opd`, as usual in PPO.
OPD_CLIP = 0.2


def opd(logps: Tensor, baselines: Tensor, reference: Sides, segments: Tensor, clip: float = OPD_CLIP) -> Tensor:
    """On-policy distillation towards π_start · exp(λ s), on the policy's own answers: `[pairs]` losses.

        A_t = λ s_t - (log pi - log start)_t                                          without gradient
        r   = exp(clamp((log pi(y) - log start(y)) / |y|, -20, 20))                   without gradient
        r_t = r * pi(y_t) / pi(y_t)                 the last denominator without gradient, so r_t = r in value
        L   = -mean over t of min(r_t A_t, clip(r_t, 1 - e, 1 + e) A_t),              mean over both responses

    The advantage is that of distillation from a teacher on the student's samples (GKD, arXiv 2306.13649; the reverse KL
    of MiniLLM, 2306.08543). The teacher is log π_start + λ s: with λ = 1 and an oracle trained from the start, the
    oracle itself. The answers were sampled from the start, so r corrects for the steps since: the length-normalised
    ratio of a response and its clipping are GSPO's, token by token (2507.18071, GSPO-token). The
    clamp at 20 nats a token is ours: such a response is clipped anyway, and r stays finite. Chosen or rejected does
    not matter: both are answers of the policy, as `data.on_policy` samples them, exactly so at temperature 1.

    Args:
        logps: `[targets]`, all tokens of both responses.
        baselines: `[targets]`, log start + λ s.
        reference: sums of log start over each response.
        segments: `[targets]`, 2 * pair for chosen and 2 * pair + 1 for rejected tokens.
        clip: e.
    """
    number = 2 * len(reference[0])
    counts = torch.bincount(segments, minlength=number).clamp(min=1)
    frozen = logps.detach()
    start = torch.stack(list(reference), 1).flatten()
    sums = frozen.new_zeros(number).index_add(0, segments, frozen)
    ratios = ((sums - start) / counts).clamp(-20, 20).exp()[segments] * torch.exp(logps - frozen)
    advantages = baselines - frozen
    gains = torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    means = gains.new_zeros(number).index_add(0, segments, gains) / counts
    return -means.view(-1, 2).mean(1)


def opd_beta(alpha: float = 1.0) -> float:
    """The beta with which `with_baselines` gives log start + alpha s; alpha is λ."""
    return 1 / alpha if alpha else float("inf")


def _basu(log_ratios: Tensor, power: float) -> Tensor:
    """The Bregman ratio matching loss of R = exp(log_ratios) with Basu's generator of this power, divided by 4."""
    rest = -torch.expm1(-power * log_ratios) / power if power else log_ratios
    return (torch.exp((1 + power) * log_ratios) / (1 + power) + rest) / 4


def _means(sums: Sides, counts: Sides) -> Sides:
    return sums[0] / counts[0], sums[1] / counts[1]


def _margins(sums: Sides, reference: Sides) -> Tensor:
    """Log-ratio of the chosen response minus that of the rejected one: `[pairs]`."""
    return (sums[0] - reference[0]) - (sums[1] - reference[1])


def _contrast(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x below 0, accurate near 0 and for large -x."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@dataclass
class PairSums:
    """The inputs of an objective: (weighted) sums over the targets of each side.

    Attributes:
        policy: log-probabilities under the policy.
        counts: sums of the weights; the number of targets where all weights are 1.
        reference: log-probabilities under the reference; None without one.
        kls: KL between policy and reference at each target; None if the objective reads none.
        chosen_errors: `[pairs]` squared errors of `wspo`; None for the others.
        matched: `[pairs]` losses of `tbpo`; None for the others.
        distilled: `[pairs]` losses of `opd`; None for the others.
    """

    policy: Sides
    counts: Sides
    reference: Sides | None = None
    kls: Sides | None = None
    chosen_errors: Tensor | None = None
    matched: Tensor | None = None
    distilled: Tensor | None = None

    def of_reference(self) -> Sides:
        return _given(self.reference, "log-probabilities under the reference")

    def of_kls(self) -> Sides:
        return _given(self.kls, "the KL between policy and reference at every target")


def _given(value: Given | None, name: str) -> Given:
    if value is None:
        raise ValueError(f"the objective needs {name}")
    return value


@dataclass(frozen=True)
class LossSettings:
    """The settings of an objective.

    Attributes:
        alpha: weight of the second term of cpo, orpo, rrhf, tdpo2 and tis_dpo; the sums of tgdpo and tbpo include it.
    """

    beta: float = 0.1
    gamma: float = 2.0
    margin: float = 0.0
    alpha: float = 0.0
    label_smoothing: float = 0.0


LOSSES: dict[str, Callable[[PairSums, LossSettings], Tensor]] = {
    "sepo": lambda sums, s: sepo(sums.policy, sums.counts, s.gamma, s.margin, s.label_smoothing),
    "dpo": lambda sums, s: dpo(sums.policy, sums.of_reference(), s.beta, s.label_smoothing),
    "ipo": lambda sums, s: ipo(sums.policy, sums.counts, sums.of_reference(), s.beta),
    "simpo": lambda sums, s: simpo(sums.policy, sums.counts, s.gamma, s.margin, s.label_smoothing),
    "cpo": lambda sums, s: cpo(sums.policy, sums.counts, s.beta, s.alpha, s.label_smoothing),
    "orpo": lambda sums, s: orpo(sums.policy, sums.counts, s.alpha),
    "rrhf": lambda sums, s: rrhf(sums.policy, sums.counts, s.alpha),
    "tdpo1": lambda sums, s: tdpo1(sums.policy, sums.of_reference(), sums.of_kls(), s.beta),
    "tdpo2": lambda sums, s: tdpo2(sums.policy, sums.of_reference(), sums.of_kls(), s.beta, s.alpha),
    "confpo": lambda sums, s: confpo(sums.policy, sums.counts, s.gamma, s.margin, s.label_smoothing),
    "tis_dpo": lambda sums, s: tis_dpo(sums.policy, sums.of_reference(), sums.kls, s.beta, s.alpha),
    "tgdpo": lambda sums, s: tgdpo(sums.policy, sums.of_reference(), s.beta),
    "wspo": lambda sums, s: wspo(_given(sums.chosen_errors, "the squared errors of chosen tokens"), sums.counts[0]),
    "selective_dpo": lambda sums, s: dpo(sums.policy, sums.of_reference(), s.beta, s.label_smoothing),
    "tbpo": lambda sums, s: _given(sums.matched, "the losses of the matched tokens"),
    "opd": lambda sums, s: _given(sums.distilled, "the losses of the answers"),
}


def pair_losses(objective: str, sums: PairSums, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and implicit rewards (chosen, rejected) of the objective with this name, each `[pairs]`."""
    return LOSSES[objective](sums, settings), *_implicit_rewards(OBJECTIVES[objective], sums, settings)


def _implicit_rewards(objective: Objective, sums: PairSums, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """The quantity that the loss contrasts: the scaled log-ratio to the reference, or the scaled (mean) logps."""
    if objective.reads_reference:
        reference = sums.of_reference()
        return settings.beta * (sums.policy[0] - reference[0]), settings.beta * (sums.policy[1] - reference[1])
    chosen, rejected = sums.policy
    if "gamma" in objective.settings:
        chosen_counts, rejected_counts = (count.clamp(min=1e-6) for count in sums.counts)
        return settings.gamma * chosen / chosen_counts, settings.gamma * rejected / rejected_counts
    if "beta" in objective.settings:
        return settings.beta * chosen, settings.beta * rejected
    return _means(sums.policy, sums.counts)


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 if the chosen reward is higher, 0 if it is lower, 0.5 for a tie: `[pairs]`."""
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
