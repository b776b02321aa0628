"""At which step does a policy pass a given KL from its start? A probe that is cheap enough to ask while it is trained.

The KL of a measurement is that on the policy's own answers, which have to be written first: far dearer than a step. The
probe writes nothing. It reads a few answers of the *start*, drawn once, and adds up the KL between the two models'
next-token distributions over the whole vocabulary along them: KL(policy || start) on the start's prefixes. For small
moves both are the same; further out the policy's own answers lead elsewhere, and the two part by a factor that depends
on method and model. So every measurement also sets the scale of the probe for the targets that are left.

The start's side is read once. The steps to look at are chosen so that a run takes a dozen or two probes, however long
it is: the root of the KL grows about in proportion to the steps, so a line through the last two says where to look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
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
# Answers of the start that a probe reads: about as many tokens as one batch of pairs.
RESPONSES = 16
# A measured KL is an estimate: a scale beyond this factor, to either side, is taken for chance.
_LARGEST_SCALE = 3.0


class Probe:
    """KL(policy || start) along a few answers of the start, in nats a response, from a forward pass each.

    Args:
        base: the start, on its device, in the types of the policies in training.
        prompts: the first `RESPONSES` are answered by the start, as `settings` and `seed` say.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        settings: EvalSettings,
        seed: int,
    ):
        some = list(prompts[:RESPONSES])
        answers = sample(base, tokenizer, some, settings.model_copy(update={"samples": 1}), seed)
        self.base, self.number = base, len(answers)
        asked = [some[one.prompt_index] for one in answers]
        self.pairs = table_pairs(single_responses(asked, [list(one.response_ids) for one in answers]))
        self.hidden: list[torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> float:
        """Mean over the answers of the KL summed over their tokens."""
        device = next(policy.parameters()).device
        budget = tokens_per_row_for(device, scoring=True)
        training = policy.training
        policy.eval()
        try:
            for one in (self.base, policy):  # of one architecture, so of one layout
                layout = prepare_model(one, longest=self.pairs.longest, tokens_per_row=budget)
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


class Passing:
    """Notices when a policy in training passes given KLs; what it saw is kept in a JSON file, so that a run that was
    interrupted looks at the same steps.

    Args:
        targets: KLs in nats a response, ascending.
        path: the JSON file of probes, a list of [step, KL].
    """

    def __init__(self, targets: Sequence[float], probe: Probe, path: Path):
        self.targets, self.probe, self.path = targets, probe, path
        self.probes: list[tuple[int, float]] = []

    def begin(self, step: int) -> None:
        """Go on after a step with what was seen up to there."""
        self.probes = [one for one in _read_probes(self.path) if one[0] <= step]

    def passed(self, step: int, policy: nn.Module, points: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Look at the policy if it is time to.

        Args:
            points: what was measured so far; those before `step` count.

        Returns:
            `passed`, the targets passed since the last measurement, and `probe`; empty where there is none.
        """
        before = [point for point in points if point["step"] < step and "probe" in point]
        furthest = max((max(point["kl"], *point["passed"]) for point in before), default=0.0)
        left = [target for target in self.targets if target > furthest]
        if not left:
            return {}
        scale = scale_of(before)
        if step < next_look(self.probes, left[0] / scale):
            return {}
        value = self.probe(policy)
        self.probes.append((step, value))
        write_json(self.path, self.probes, indent=None)
        passed = [target for target in left if value >= target / scale]
        return {"passed": passed, "probe": value} if passed else {}


def scale_of(points: Sequence[Mapping[str, Any]]) -> float:
    """Measured KL over probed KL at the last point that has both; 1 before there is one.

    >>> scale_of([{"kl": 1.5, "probe": 1.0}, {"kl": 4.0, "probe": 2.0}])
    2.0
    """
    found = [point["kl"] / point["probe"] for point in points if point["kl"] > 0]
    return min(max(found[-1], 1 / _LARGEST_SCALE), _LARGEST_SCALE) if found else 1.0


def next_look(probes: Sequence[tuple[int, float]], threshold: float) -> int:
    """The step to look at next: where a line through the last two probes, straight in the root of the KL, gets to the
    threshold; at most half as far again from the start (a warm-up makes it steeper), at least a twelfth.

    Args:
        probes: (step, KL) so far, in order of steps; every run starts at (0, 0).

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
    """What an interrupted run saw; nothing if that is no list of probes."""
    try:
        return [(int(step), float(kl)) for step, kl in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
