"""A cheap probe of how far a policy in training is from its start, and when to probe.

The KL of a measurement is taken on the policy's own answers. Sampling them costs far more than a training step. The
probe samples nothing: it reads a few answers of the *start*, sampled once, and sums the KL between the next-token
distributions of both models over the whole vocabulary, KL(policy || start) on the start's prefixes. For small moves
both KLs are equal. Further from the start the policy's own answers differ, and the ratio of the two KLs depends on
method and model. Every measurement therefore rescales the probe for the remaining targets.

The start's hidden states are computed once. A run needs one or two dozen probes, however long it is: sqrt(KL) grows
about linearly in the steps, so a line through the last two probes predicts the step of the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sepo.evaluate.measure import sample
from sepo.files import write_json
from sepo.forward.logps import read_hidden
from sepo.forward.packing import CHOSEN
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import make_batches, single_responses, table_pairs, tokens_per_row_for
from sepo.forward.token_kl import token_logps_and_kl
from sepo.recipe.settings import EvalSettings

PROBES = "probes.json"
# Answers of the start that a probe reads; about as many tokens as one batch of pairs.
RESPONSES = 16
# A measured KL is an estimate; the ratio to the probed KL is limited to this factor in both directions.
_LARGEST_SCALE = 3.0


class Probe:
    """KL(policy || start) along a few answers of the start, in nats per response, from one forward pass per batch.

    Args:
        base: the start, on its device, in the types of the policies in training.
        prompts: the start answers the first `RESPONSES` of them, under `settings` and `seed`.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        settings: EvalSettings,
        seed: int,
    ):
        first = list(prompts[:RESPONSES])
        answers = sample(base, tokenizer, first, settings.model_copy(update={"samples": 1}), seed)
        self.base, self.number = base, len(answers)
        answered = [first[answer.prompt_index] for answer in answers]
        self.pairs = table_pairs(single_responses(answered, [list(answer.response_ids) for answer in answers]))
        self.hidden: list[torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> float:
        """The KL summed over an answer's tokens, mean over the answers."""
        device = next(policy.parameters()).device
        budget = tokens_per_row_for(device, scoring=True)
        training = policy.training
        policy.eval()
        try:
            for model in (self.base, policy):  # one architecture, so the layout is the same
                layout = prepare_model(model, longest=self.pairs.longest, tokens_per_row=budget)
            batches = [batch.to(device) for batch in make_batches(self.pairs, layout, budget)]
            if self.hidden is None:
                self.hidden = [read_hidden(self.base, batch) for batch in batches]
            total = 0.0
            for batch, frozen in zip(batches, self.hidden, strict=True):
                _, kl = token_logps_and_kl(policy, self.base, batch, "reverse", frozen)
                total += float(kl[batch.segments % 2 == CHOSEN].sum())
        finally:
            policy.train(training)
        return total / self.number


class Probes:
    """The probes of a policy in training. A JSON file keeps them, so that a resumed run probes at the same steps.

    Args:
        path: the JSON file, a list of [step, KL].
    """

    def __init__(self, probe: Callable[[nn.Module], float], path: Path):
        self.probe, self.path = probe, path
        self.probes: list[tuple[int, float]] = []

    def begin(self, step: int) -> None:
        """Continue after `step` with the probes up to it."""
        self.probes = [probe for probe in _read_probes(self.path) if probe[0] <= step]

    def look(self, step: int, policy: nn.Module, threshold: float) -> float | None:
        """The probed KL, if a probe is due on the way to `threshold`."""
        if step < next_look(self.probes, threshold):
            return None
        value = self.probe(policy)
        self.probes.append((step, value))
        write_json(self.path, self.probes, indent=None)
        return value


def scale_of(points: Sequence[Mapping[str, Any]]) -> float:
    """Measured KL over probed KL at the last point that has both; 1 without such a point.

    >>> scale_of([{"kl": 1.5, "probe": 1.0}, {"kl": 4.0, "probe": 2.0}])
    2.0
    """
    ratios = [point["kl"] / point["probe"] for point in points if point["kl"] > 0]
    return min(max(ratios[-1], 1 / _LARGEST_SCALE), _LARGEST_SCALE) if ratios else 1.0


def next_look(probes: Sequence[tuple[int, float]], threshold: float) -> int:
    """The next step to probe: where a line through the last two probes in sqrt(KL) reaches the threshold. The step
    grows by at most 1/2 (after a warm-up the KL grows faster than the line) and at least 1/12.

    Args:
        probes: (step, KL) in order of steps; every run starts at (0, 0).

    >>> next_look([], 1.0), next_look([(10, 0.25)], 1.0), next_look([(10, 0.25), (15, 0.7225)], 1.0)
    (1, 15, 18)
    """
    (step, kl), (earlier, kl_earlier) = ([(0, 0.0), (0, 0.0), *probes])[-1:-3:-1]
    if step == 0:
        return 1
    root = math.sqrt(max(kl, 0.0))
    slope = (root - math.sqrt(max(kl_earlier, 0.0))) / (step - earlier)
    ahead = (math.sqrt(threshold) - root) / slope if slope > 0 else math.inf
    return step + max(1, step // 12, math.ceil(min(ahead, step / 2)))


def _read_probes(path: Path) -> list[tuple[int, float]]:
    """The probes of an interrupted run; empty if the file is no list of probes."""
    try:
        return [(int(step), float(kl)) for step, kl in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of an interrupted training; empty if the file is no list of points."""
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    valid = isinstance(points, list) and all(isinstance(point, dict) and "step" in point for point in points)
    return points if valid else []
