"""The objectives: one row each, with everything but the formula, which `sepo.training.objectives` has.

From this table come the names and descriptions in the recipe, the checks, the choice of what training reads, and the
table in docs/objectives.md. The module does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sepo.errors import UserError, check_number, nearest

KlDirection = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: its name in a recipe.
        title: its name in the literature.
        paper: arXiv number.
        targets: the tokens that it trains on.
            "selected": the key tokens of a selection table, with their weights.
            "rewarded": every response token; the selection table (credit "reward") has its reward as the weight.
            "all": every response token.
            "marked": those of all response tokens that the current policy marks in each step.
            "matched": the first min(|y_w|, |y_l|) tokens of both responses, compared position by position.
        tokens: the same for the documentation, in the paper's terms.
        settings: the settings that it reads, each with its meaning in the paper ("" where that needs no words).
        reads_reference: it reads the log-probabilities of the reference.
        baselines: it reads a baseline for each token. The baseline takes the place of the weight
            (`sepo.training.batches.with_baselines`).
        kl: the KL over the vocabulary that it reads: "forward" is KL(reference || policy), "reverse" the other way.
        kl_needs_alpha: it reads this KL only if alpha is above 0.
        label_smoothing: label smoothing is defined for it.
        alpha: default weight of its second term; None without one.
        rate: default share of each response's tokens that it marks; None if it has no such setting.
    """

    name: str
    title: str
    paper: str
    targets: Literal["selected", "rewarded", "all", "marked", "matched"]
    tokens: str
    settings: Mapping[str, str]
    reads_reference: bool = False
    baselines: bool = False
    kl: KlDirection | None = None
    kl_needs_alpha: bool = False
    label_smoothing: bool = False
    alpha: float | None = None
    rate: float | None = None

    @property
    def reads_selection(self) -> bool:
        """It trains on the tokens and weights of a selection table."""
        return self.targets in ("selected", "rewarded")

    @property
    def reads_token_rewards(self) -> bool:
        """It reads the reward of every response token."""
        return self.targets == "rewarded"

    def alpha_or_default(self, alpha: float | None) -> float:
        """The weight of the second term: `alpha` if given, else the default; 0 without a second term."""
        return (self.alpha or 0.0) if alpha is None else alpha

    def kl_direction(self, alpha: float | None = None) -> KlDirection | None:
        """The KL that it reads with this `alpha`; None if it reads none."""
        if self.kl_needs_alpha and not self.alpha_or_default(alpha):
            return None
        return self.kl


_ROWS = (
    Objective(
        "sepo", "SePO", "2408.13518", "selected", "the selection, with its weights", {"gamma": "", "margin": ""},
        label_smoothing=True,
    ),
    Objective("dpo", "DPO", "2305.18290", "all", "all", {"beta": ""}, reads_reference=True, label_smoothing=True),
    Objective("ipo", "IPO", "2310.12036", "all", "all, mean per token", {"beta": "its τ"}, reads_reference=True),
    Objective(
        "simpo", "SimPO", "2405.14734", "all", "all, mean per token", {"gamma": "its β", "margin": "its γ"},
        label_smoothing=True,
    ),
    Objective(
        "cpo", "CPO", "2401.08417", "all", "all", {"beta": "", "alpha": "likelihood"}, label_smoothing=True, alpha=1.0,
    ),
    Objective("orpo", "ORPO", "2403.07691", "all", "all, mean per token", {"alpha": "odds ratio"}, alpha=0.1),
    Objective("rrhf", "RRHF", "2304.05302", "all", "all, mean per token", {"alpha": "likelihood"}, alpha=1.0),
    Objective("tdpo1", "TDPO1", "2404.11999", "all", "all", {"beta": ""}, reads_reference=True, kl="forward"),
    Objective(
        "tdpo2", "TDPO2", "2404.11999", "all", "all", {"beta": "", "alpha": "KL"},
        reads_reference=True, kl="forward", alpha=0.5,
    ),
    Objective(
        "confpo", "ConfPO", "2506.08712", "marked", "those less probable than the mean of their response, in each step",
        {"gamma": "", "margin": ""}, label_smoothing=True,
    ),
    Objective(
        "tis_dpo", "TIS-DPO", "2410.04350", "selected", "the selection, with its weights", {"beta": "", "alpha": "KL"},
        reads_reference=True, kl="reverse", kl_needs_alpha=True, alpha=0.0,
    ),
    Objective(
        "tgdpo", "TGDPO", "2506.14574", "rewarded", "all, each weighted by its reward",
        {"beta": "", "alpha": "token rewards"}, reads_reference=True, alpha=0.5,
    ),
    Objective(
        "wspo", "WSPO", "2410.18640", "rewarded", "all of the chosen response, each with its reward", {"beta": ""},
        reads_reference=True, baselines=True,
    ),
    Objective(
        "selective_dpo", "Selective-DPO", "2507.07725", "marked",
        "the share of each response on which the policy lags the reference most, in each step",
        {"beta": "", "rate": ""}, reads_reference=True, baselines=True, label_smoothing=True, rate=0.4,
    ),
    Objective(
        "tbpo", "TBPO-A", "2605.12288", "matched", "the first min(\\|y_w\\|, \\|y_l\\|) of both responses, by position",
        {"beta": "", "alpha": "power of the generator"},
        reads_reference=True, baselines=True, kl="forward", label_smoothing=True, alpha=0.0,
    ),
    Objective(
        "opd", "On-policy distillation", "2306.13649", "rewarded", "all, each with its advantage",
        {"alpha": "λ, token rewards"}, reads_reference=True, baselines=True, alpha=1.0,
    ),
)  # fmt: skip

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _ROWS}


def check_objective(name: str, label_smoothing: float = 0.0) -> None:
    """Raise a UserError for an unknown objective, or for label smoothing where the objective does not define it."""
    if name not in OBJECTIVES:
        raise UserError(
            f"objective is '{name}'{nearest(str(name), OBJECTIVES)}: expected one of {', '.join(OBJECTIVES)}"
        )
    check_number("label_smoothing", label_smoothing, least=0, below=0.5)
    if label_smoothing and not OBJECTIVES[name].label_smoothing:
        raise UserError(f"label_smoothing is not defined for {name}: leave it at 0")


def names_with(setting: str) -> str:
    """The objectives that read a setting: "sepo, simpo and confpo"."""
    return _list_of(name for name, objective in OBJECTIVES.items() if setting in objective.settings)


def names_with_label_smoothing() -> str:
    """The objectives for which label smoothing is defined."""
    return _list_of(name for name, objective in OBJECTIVES.items() if objective.label_smoothing)


def meanings_of_alpha() -> str:
    """The second term that alpha weighs in each objective, with the default: "likelihood of cpo (1), ..."."""
    return ", ".join(
        f"{objective.settings['alpha']} of {name} ({objective.alpha:g})"
        for name, objective in OBJECTIVES.items()
        if objective.alpha is not None
    )


def _list_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
