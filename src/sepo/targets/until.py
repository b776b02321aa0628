"""Train until a measured value reaches its target: the policy's KL from its start, or the oracle's held-out accuracy.

A training is usually told how long it lasts. `policy.target_kl` and `oracle.target_accuracy` tell how far it goes; the
number of epochs (or steps) is then the limit. The value is measured on the way, and the weights nearest to the target
are kept. A measurement of the KL samples answers, so a probe (`kl_probe`) says when one is due.

The checkpoints' folder keeps the points (`target-points.json`), the probes and the nearest weights, so a killed
training continues and keeps the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sepo.credit.rewards import response_sums
from sepo.evaluate.accuracy import won
from sepo.evaluate.measure import own_logps, response_logps, sample
from sepo.files import write_json
from sepo.forward.scoring import dataset_logps
from sepo.processes import log
from sepo.recipe.settings import EvalSettings
from sepo.targets.kl_probe import PROBES, Probes, read_points, scale_of

# Their names begin with "target-", so that no training takes them for logs.
POINTS, NEAREST = "target-points.json", "target-{}.safetensors"
# The KL is first measured at these shares of its target: the first corrects the probe, the second is a point near the
# target on the other side of it.
_BEFORE = (0.3, 0.85)
MEASUREMENTS = len(_BEFORE) + 1  # a KL that falls short of its probe is measured again
# The accuracy is measured again after this share of the steps so far.
_LOOKS = 1 / 12


class Look(Protocol):
    """Says when a value is measured."""

    def begin(self, step: int) -> None:
        """Continue after `step`."""

    def due(self, step: int, model: nn.Module, points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """What a measurement at this step is recorded with; None if none is due."""


class Target(NamedTuple):
    """What a training aims at.

    Attributes:
        name: "kl" or "accuracy", in results and points.
        value: where training ends.
        setting: its name in the recipe, for messages.
        limit: what a longer training needs.
    """

    name: str
    value: float
    setting: str
    limit: str


class UntilTarget(TrainerCallback):
    """Ends a training where a measured value reaches its target, and keeps the weights nearest to it.

    Args:
        measure: the value of a model.
        folder: of the training; points and weights go to its `checkpoints`.

    Attributes:
        results: after the training `target_NAME/reached` (1 or 0), and `/kept` and `/step`, the value and the step of
            the weights that were kept.
    """

    def __init__(self, target: Target, look: Look, measure: Callable[[nn.Module], float], folder: Path):
        self.target, self.look, self.measure, self.folder = target, look, measure, folder / "checkpoints"
        self.points: list[dict[str, Any]] = []
        self.results: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.points = [point for point in read_points(self.folder / POINTS) if point["step"] <= state.global_step]
        self.look.begin(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self._reached():
            due = self.look.due(state.global_step, model, self.points)
            if due is None and state.global_step >= state.max_steps:
                due = {}
            if due is not None:
                self._add({"step": state.global_step, self.target.name: self.measure(model), **due}, model)
        if self._reached():
            # A checkpoint written now would say that the training is over; the model itself follows.
            control.should_training_stop, control.should_save = True, False
        return control

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Put the nearest weights into the model. An interrupted training has none to put, or goes on later."""
        stored = [point for point in self.points if (self.folder / NEAREST.format(point["step"])).is_file()]
        if not stored or not (self._reached() or state.global_step >= state.max_steps):
            return
        kept = min(stored, key=self._distance)
        weights = load_file(self.folder / NEAREST.format(kept["step"]))
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(weights[name])
        name, value = self.target.name, kept[self.target.name]
        values = {"reached": float(self._reached()), "kept": value, "step": float(kept["step"])}
        self.results = {f"target_{name}/{key}": number for key, number in values.items()}
        self._say(kept["step"], value, state.global_step)

    def _reached(self) -> bool:
        return any(point[self.target.name] >= self.target.value for point in self.points)

    def _distance(self, point: dict[str, Any]) -> float:
        return abs(point[self.target.name] - self.target.value)

    def _add(self, point: dict[str, Any], model: nn.Module) -> None:
        """Record a measurement, and keep the weights if no earlier one is as near."""
        nearest = min(map(self._distance, self.points), default=float("inf"))
        if self._distance(point) < nearest:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / NEAREST.format(point["step"])
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model)}
            save_file(weights, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            for earlier in self.folder.glob(NEAREST.format("*")):
                if earlier != path:
                    earlier.unlink()
        self.points.append(point)
        write_json(self.folder / POINTS, self.points, indent=None)

    def _say(self, step: int, value: float, last: int) -> None:
        target = self.target
        if self._reached():
            log(f"  {target.setting} {target.value:g}: kept step {step} of {last}, {target.name} {value:.3f}")
            return
        log(
            f"  {target.setting} {target.value:g} was not reached: the pairs are used up after {last} steps; kept step "
            f"{step}, {target.name} {value:.3f}; {target.limit}"
        )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class LookAtKl(Probes):
    """Probes the KL, and asks for two measurements before the target and one at it.

    Where a measurement falls short of what the probe said, the probe is rescaled by it and training goes on.
    """

    def __init__(self, target: float, probe: Callable[[nn.Module], float], folder: Path):
        super().__init__(probe, folder / "checkpoints" / f"target-{PROBES}")
        self.target = target

    def due(self, step: int, model: nn.Module, points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        measured = [point for point in points if "probe" in point]
        furthest = max((point["kl"] for point in measured), default=0.0)
        goal = next((share * self.target for share in _BEFORE if share * self.target > furthest), self.target)
        threshold = goal / scale_of(measured)
        value = self.look(step, model, threshold)
        return {"probe": value} if value is not None and value >= threshold else None


class LookAtAccuracy:
    """Asks for a measurement at steps that grow by a twelfth."""

    def begin(self, step: int) -> None:
        """Nothing to continue: the points say when the last look was."""

    def due(self, step: int, model: nn.Module, points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return {} if step >= _after(points[-1]["step"] if points else 0) else None


def _after(step: int) -> int:
    return step + max(1, int(step * _LOOKS))


def number_of_looks(steps: int) -> int:
    """How often `LookAtAccuracy` measures in a training of `steps`, its end included.

    >>> number_of_looks(1), number_of_looks(24), number_of_looks(25), number_of_looks(26)
    (1, 24, 25, 25)
    """
    step, looks = 0, 0
    while step < steps:
        step, looks = _after(step), looks + 1
    return looks


def kl_from(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: EvalSettings,
    seed: int,
) -> Callable[[nn.Module], float]:
    """A function that samples a policy's answers to the prompts and returns its KL from the base, nats per answer.

    The estimate is that of the evaluation, with its prompts, samples and seed.
    """

    def measure(policy: nn.Module) -> float:
        answers = sample(policy, tokenizer, prompts, settings, seed)
        ratios = own_logps(policy, prompts, answers) - response_logps(base, prompts, answers)
        return float(ratios.mean())

    return measure


def accuracy_on(pairs: pa.Table, reference_logps: pa.Table, tokens_per_row: int | None) -> Callable[[nn.Module], float]:
    """A function that returns the share of pairs that a model in training ranks as they are labelled.

    A pair's margin is the summed log-ratio to the reference, chosen minus rejected: the oracle's summed token rewards.
    """
    before = response_sums(reference_logps, "logps")

    def measure(model: nn.Module) -> float:
        after = response_sums(dataset_logps(model, pairs, tokens_per_row=tokens_per_row), "logps")
        chosen, rejected = (a - b for a, b in zip(after, before, strict=True))
        return float(won(chosen, rejected).mean())

    return measure
