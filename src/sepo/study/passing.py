"""Find the training steps at which a policy passes given KLs from its start, with a cheap probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sepo.targets.kl_probe import Probe, Probes, scale_of


class Passing(Probes):
    """Detects when a policy in training passes given KLs.

    Args:
        targets: KLs in nats per response, ascending.
        path: of the probes.
    """

    def __init__(self, targets: Sequence[float], probe: Probe, path: Path):
        super().__init__(probe, path)
        self.targets = targets

    def passed(self, step: int, policy: nn.Module, points: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Probe the policy if a probe is due.

        Args:
            points: the measurements so far; those before `step` count.

        Returns:
            `passed`, the targets passed since the last measurement, and `probe`, the probed KL. Empty if no probe is
            due or no target was passed.
        """
        before = [point for point in points if point["step"] < step and "probe" in point]
        furthest = max((max(point["kl"], *point["passed"]) for point in before), default=0.0)
        left = [target for target in self.targets if target > furthest]
        if not left:
            return {}
        scale = scale_of(before)
        value = self.look(step, policy, left[0] / scale)
        if value is None:
            return {}
        passed = [target for target in left if value >= target / scale]
        return {"passed": passed, "probe": value} if passed else {}
