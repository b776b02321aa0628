"""What a measured value shows at the edge of its data, and in which words.

A standard error of 0 is not certainty: eight pairs that are all ranked right say little about the ninth. Summary,
report, card, comparison and judge ask this module for intervals and for words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sepo.numbers import number, with_error
from sepo.report.statistics import spread_seen, student_reach, wilson

# Independent groups below which a summary says that there are few.
FEW = 10
# Metrics that are shares in [0, 1], by the last part of their names.
_SHARES = ("accuracy", "accuracy_not_longer", "win_rate", "auc", "oracle_accuracy")


@dataclass(frozen=True)
class Measured:
    """A value with its standard error.

    Attributes:
        error: standard error; None if there is none.
        groups: number of independent groups, such as prompts, behind the value; None if it is not known.
        share: the value is a share in [0, 1].
        unit: what the groups are.
    """

    value: float
    error: float | None
    groups: int | None = None
    share: bool = False
    unit: str = "prompts"

    @property
    def spread(self) -> bool:
        """Whether the groups differ, so that the standard error says something."""
        return self.error is not None and spread_seen(self.error, self.value)

    @property
    def sigmas(self) -> float:
        """The value in standard errors; NaN without spread."""
        return self.value / self.error if self.error is not None and self.spread else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: Wilson's for a share, Student's t for a mean; None if the data show none."""
        if self.value != self.value or self.error is None or (self.groups is not None and self.groups < 2):
            return None
        if self.share:
            return wilson(self.value, self.error if self.spread else 0.0, self.groups)
        if not self.spread:
            return None
        reach = student_reach(self.error, None if self.groups is None else self.groups - 1)
        return self.value - reach, self.value + reach

    @property
    def remark(self) -> str:
        """Why there is no interval, or why the standard error is 0; empty if there is nothing to say."""
        count = "" if self.groups is None else f" in {self.groups:,} {self.unit}"
        if self.value != self.value:
            return ""
        if self.groups is not None and self.groups < 2:
            return f"one of the {self.unit} only: no error is known" if self.groups else ""
        if self.error is None or self.spread:
            return ""
        if self.share and self.value in (0.0, 1.0):
            return f"{'ceiling' if self.value else 'floor'}: no spread seen{count}"
        return f"no spread seen{count}"

    def text(self, form: str = "") -> str:
        """The value with its standard error; without spread with its interval, or the words for it."""
        if self.spread or self.error is None:
            return with_error(self.value, self.error, form)
        if self.interval is None:
            return f"{number(self.value, form)} ({self.remark})" if self.remark else number(self.value, form)
        return f"{number(self.value, form)} (95 %: {self.interval_text(form.removeprefix('+'))})"

    def interval_text(self, form: str = "") -> str:
        """The 95 % interval, else the remark."""
        if self.interval is None:
            return self.remark
        return f"{number(self.interval[0], form)} to {number(self.interval[1], form)}"


def measured(metrics: Mapping[str, Any], name: str) -> Measured | None:
    """A metric of a run (docs/metrics.md) with the number of groups behind it; None if it has no value."""
    value = _number(metrics.get(name))
    if value is None:
        return None
    groups, unit = _groups_of(metrics, name)
    share = name.rsplit("/", 1)[-1] in _SHARES and 0 <= value <= 1
    return Measured(value, _number(metrics.get(f"{name}_se")), groups, share, unit)


def _groups_of(metrics: Mapping[str, Any], name: str) -> tuple[int | None, str]:
    """The number of independent groups behind a metric, and what they are."""
    part, _, last = name.rpartition("/")
    if part in ("oracle", "policy") and last.startswith("accuracy"):
        count = _number(metrics.get(f"{part}/pairs_not_longer" if last.endswith("not_longer") else f"{part}/pairs"))
        return (None if count is None else int(count)), "pairs"
    if part == "fidelity" or part.startswith("tasks/") or last == "oracle_accuracy":
        return None, "pairs"
    counts = [metrics.get("prompts")] if not part.startswith("benchmarks/") else []
    counts += [metrics.get(f"{part}/judged")]
    known = [int(count) for value in counts if (count := _number(value)) is not None]
    return (min(known) if known else None), "prompts"


def _number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# --- what a run does not show -----------------------------------------------------------------------------------------


def ranking_caution(accuracy: Measured, length_baseline: float, pairs: str = "held-out pairs") -> str:
    """Why an accuracy on pairs may show no preference but length or chance; empty if it shows more.

    Args:
        length_baseline: accuracy of always preferring the longer response.
        pairs: which pairs.
    """
    longer = length_baseline >= 0.5
    by_length = max(length_baseline, 1 - length_baseline)
    if by_length > 0.5 and by_length >= accuracy.value:
        return (
            f"length explains everything: the {'longer' if longer else 'shorter'} response is right in "
            f"{by_length:.0%} of the {pairs}, the ranking in {accuracy.value:.0%}"
        )
    if accuracy.interval is None or accuracy.interval[0] <= by_length:
        return f"hardly better than length or chance ({accuracy.text('.0%')} against {by_length:.0%})"
    return ""


def nothing_learnt(metrics: Mapping[str, Any]) -> str:
    """Why a policy cannot be told from its start; empty if it can, or if nothing says so.

    The KL from the start decides. Without it the accuracy of the log-ratio on held-out pairs does.
    """
    kl, accuracy = measured(metrics, "kl"), measured(metrics, "policy/accuracy")
    if kl is not None:
        if kl.interval is None:
            return f"KL from the start {kl.text('.2f')}" if kl.value <= 0 or not kl.value >= 0.01 else ""
        return "" if kl.interval[0] > 0 else f"KL from the start {kl.text('.2f')}, within its error of 0"
    if accuracy is not None and not (accuracy.interval and accuracy.interval[0] > 0.5):
        return f"held-out pairs ranked right {accuracy.text('.0%')}, chance is 50%"
    return ""


def few_groups(groups: int | None, unit: str = "prompts") -> str:
    """Words for a small number of independent groups; empty for enough."""
    if groups is None or groups >= FEW:
        return ""
    return f"{groups} {unit if groups != 1 else unit.removesuffix('s')}"
