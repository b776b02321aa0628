"""`policy.training.learning_rate: auto`: a learning rate that reaches `policy.target_kl` before the pairs are used up.

A short training at a low, constant rate measures how fast the policy moves, with the probe of `kl_probe`. sqrt(KL) is
about proportional to the rate, and grows with a power of the number of steps: 1 where all steps have one direction, 1/2
where they are independent. The KL at half of the probe and at its end gives the power. With the sum of the planned
schedule the rate follows. Where it is far from the rate of the probe, the probe is repeated at the new rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, get_scheduler

from sepo.errors import UserError
from sepo.processes import log
from sepo.recipe.settings import PolicySettings, TrainingSettings

FOLDER = ".rate-probe-{}"  # within the model's folder, which the trained model replaces
FIRST_RATE, FIRST_RATE_LORA = 1e-5, 1e-4
# The target is planned at this share of the steps: the policy slows down where the pairs repeat.
_PLANNED = 0.7
_STEPS = 12  # of a probe; a sixth of the training if that is less
_FAR = 3.0  # a rate beyond this factor of the probe's is probed again
_PROBES = 4
USUAL_PROBES = 2  # for estimates of time
_CAP = 30.0  # the largest step between two rates
_LARGEST = 0.05


class ProbedKl(NamedTuple):
    """The KL from the start in a short training, nats an answer: after half of its steps, and at its end."""

    half: float
    end: float


class ReadKl(TrainerCallback):
    """Probes the KL of a policy in a short training.

    Attributes:
        results: after the training the fields of `ProbedKl`.
    """

    def __init__(self, probe: Callable[[nn.Module], float]):
        self.probe = probe
        self.results: dict[str, float] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps // 2:
            self.results["half"] = self.probe(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.results["end"] = self.probe(model)


def choose_rate(
    policy: PolicySettings, steps: int, train: Callable[[TrainingSettings, Path], ProbedKl], out: Path
) -> TrainingSettings:
    """The settings of the training with a learning rate for `auto`.

    Args:
        policy: with `target_kl`.
        steps: that the training may last.
        train: trains the policy from its start with some settings, into a folder. A finished training is reused.
        out: folder of the policy, for the probes.

    Raises:
        UserError: the policy does not move in any probe, its KL is not finite, or the schedule's rate is 0 throughout.
    """
    assert policy.target_kl is not None
    number = probe_steps(steps)
    planned = _sum_of_schedule(policy.training, steps, max(1, round(_PLANNED * steps)))
    if planned <= 0:
        raise UserError(
            f"learning_rate auto: a training of {steps} steps ends in its warm-up, at a rate of 0: expected more "
            "steps, or warmup_ratio: 0"
        )
    rate = FIRST_RATE_LORA if policy.lora is not None else FIRST_RATE
    for probe in range(1, _PROBES + 1):
        kl = train(probe_training(policy.training, number, rate), out / FOLDER.format(probe))
        if not math.isfinite(kl.end):
            raise UserError(
                f"learning_rate auto: the policy is not finite after {number} steps at {rate:.2g}: give a number"
            )
        wanted = next_rate(rate, kl, number, policy.target_kl, planned)
        log(f"  learning_rate auto: KL {kl.end:.3g} after {number} steps at {rate:.2g}, so {wanted:.2g}")
        last, rate = rate, wanted
        if 1 / _FAR <= wanted / last <= _FAR:
            break
    if kl.end <= 0:
        raise UserError(
            f"learning_rate auto: {number} steps at {last:.2g} do not move the policy, so it learns nothing from these "
            "pairs: look at the key tokens, or give a number"
        )
    return policy.training.model_copy(update={"learning_rate": rate})


def probe_steps(steps: int) -> int:
    """Steps of one probe for a training of `steps`; an even number.

    >>> probe_steps(47), probe_steps(300), probe_steps(3)
    (6, 12, 2)
    """
    return 2 * max(1, min(_STEPS, steps // 6) // 2)


def probe_training(training: TrainingSettings, steps: int, rate: float) -> TrainingSettings:
    """The settings of a probe: `steps` at a constant rate."""
    short = {"max_steps": steps, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_minutes": 0.0}
    return training.model_copy(update={**short, "report_to": "none", "learning_rate": rate})


def next_rate(rate: float, kl: ProbedKl, steps: int, target: float, planned: float) -> float:
    """The peak rate that reaches a KL, from a probe at a constant rate.

    Args:
        kl: of the probe, an even number of `steps`.
        planned: sum of the schedule's multipliers until the target.

    >>> round(next_rate(1e-5, ProbedKl(0.0025, 0.01), steps=10, target=1.0, planned=100.0), 7)
    1e-05
    >>> round(next_rate(1e-5, ProbedKl(0.0, 0.0), steps=10, target=1.0, planned=100.0), 7)
    0.0003
    """
    if kl.end <= 0:
        return min(rate * _CAP, _LARGEST)
    power = 0.5 * math.log2(kl.end / kl.half) if kl.half > 0 else 1.0
    ahead = (planned / steps) ** min(max(power, 0.5), 1.0)
    factor = math.sqrt(target / kl.end) / ahead
    return min(rate * min(max(factor, 1 / _CAP), _CAP), _LARGEST)


def _sum_of_schedule(training: TrainingSettings, steps: int, until: int) -> float:
    """Sum of the multipliers of the learning rate over the first `until` of `steps` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(training.warmup_ratio * steps)
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=training.arguments.get("lr_scheduler_kwargs"),
    )
    total = 0.0
    for _ in range(until):
        total += schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
    return total
