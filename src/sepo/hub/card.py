"""Model and dataset cards: the README.md of a policy, an oracle, or a table of token rewards.

`policy_card`, `oracle_card` and `table_card` fill the templates `*_card.md` from what a run wrote; `write_policy_card`
writes the policy's card beside its weights. Names and texts of data are escaped, because a card is Markdown with HTML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData, try_to_load_from_cache

from sepo.errors import one_line
from sepo.files import write_text
from sepo.models.folders import is_adapter, read_json_object
from sepo.numbers import number
from sepo.recipe.settings import EMBEDDED_DATA, Recipe
from sepo.report.edges import measured
from sepo.report.run_summary import RunSummary, cautions, short_name, summary_of_folder, task_scores
from sepo.runs.folder import CARD

# The start of a line in the templates. A card without it is the user's own text, and sepo leaves it alone.
_MARK = "<!-- Written by sepo"
# A setting that may be a path of this machine; its folders may have spaces.
_PATH = re.compile(r"(?!package:).*[/\\].*", re.DOTALL)
# Settings about places and speed, not about the method, and secrets.
_NOT_SHOWN = {
    "output_dir", "device", "server", "cache", "key_variable", "key_header", "headers", "concurrency", "retries",
    "timeout", "hub_token", "push_to_hub_token",
}  # fmt: skip

METRICS = {
    "gold_reward/base": "gold reward, before",
    "gold_reward/policy": "gold reward, after",
    "gold_reward/difference": "gold reward, difference",
    "gold_reward/win_rate": "share of prompts with a higher gold reward",
    "judge/win_rate": "judge's win rate against the start",
    "judge/length_controlled": "judge's win rate at equal length",
    "kl": "KL from the start, nats per response",
    "length/base": "tokens per response, before",
    "length/policy": "tokens per response, after",
    "finished/policy": "share of responses that end by themselves",
    "policy/accuracy": "held-out pairs ranked right by log p(after) - log p(before)",
    "oracle/accuracy": "held-out pairs that the oracle ranks right",
    "oracle/length_baseline": "held-out pairs whose chosen response is the longer one",
    "fidelity/auc": "AUC of the token rewards for the words of the gold reward (chance 0.5)",
}

_EXAMPLES = """
## Examples

{title}; not selected.

| prompt | before | after |
|---|---|---|
{rows}
"""
_USAGE = """\
```python
{imports}

name = "ORG/NAME"  # or a folder
model = {model}.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0], skip_special_tokens=True))
```"""


def policy_card(
    recipe: Recipe,
    metrics: Mapping[str, Any],
    summary: RunSummary,
    *,
    names: Collection[str],
    base: str | None,
    adapter: bool,
    license: str | None,
) -> str:
    """The card of a policy.

    Args:
        metrics: as in `metrics.json`.
        summary: of the same run.
        names: those of the recipe that are on the hub (`hub_names`).
        base: hub id of the base model; None if it has none.
        adapter: whether only an adapter was saved.
        license: the hub's identifier, such as "apache-2.0"; None if it is not known.
    """
    return _card(
        "policy_card.md",
        **_model_values(recipe, names, base, adapter, license),
        start=plain(short_name(recipe.policy.model or recipe.reference.model)),
        objective=recipe.policy.objective,
        trained="\n".join(f"- **{plain(name)}**: {plain(text)}" for name, text in summary.trained),
        measured_on=plain(_capital(summary.moved_title)),
        metrics=metrics_with_intervals(metrics, METRICS | _judge_metrics(recipe) | _task_metrics(metrics)),
        limitations="\n".join(f"- {plain(sentence)}" for sentence in cautions(recipe, metrics)),
        examples=_examples(summary),
    )


def oracle_card(
    recipe: Recipe,
    metrics: Mapping[str, Any],
    *,
    names: Collection[str],
    base: str | None,
    adapter: bool,
    license: str | None,
) -> str:
    """The card of an oracle; arguments as for `policy_card`."""
    shown = {name: text for name, text in METRICS.items() if name.startswith(("oracle", "fidelity"))}
    return _card(
        "oracle_card.md",
        **_model_values(recipe, names, base, adapter, license),
        start=plain(short_name(recipe.reference.model)),
        beta=f"{recipe.oracle.beta:g}",
        metrics=metrics_with_intervals(metrics, shown),
    )


def table_card(
    recipe: Recipe, counts: Mapping[str, int], tokenizer: str, license: str | None, names: Collection[str]
) -> str:
    """The card of a score table as a dataset.

    Args:
        counts: rows of each split.
        tokenizer: the model whose tokenizer made the token ids.
        names: those of the recipe that are on the hub (`hub_names`).
    """
    sources = _hub_sources(recipe, names)
    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        tags=["sepo", "preference-optimization", "token-rewards", "dpo"],
        source_datasets=sources,
        pretty_name=f"{recipe.name}: token rewards",
        configs=[
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*.parquet"} for s in counts]}
        ],
    )
    return _card(
        "table_card.md",
        front_matter=f"---\n{data.to_yaml()}\n---",
        name=plain(recipe.name),
        rows=", ".join(f"{split} {count:,}" for split, count in counts.items()),
        source=source_of(recipe, names),
        tokenizer=plain(short_name(tokenizer)),
        settings=settings_block(recipe, names),
    )


def pairs_card(
    name: str, how: str, made: Mapping[str, Any], counts: Sequence[str], length: Sequence[str], file: str
) -> str:
    """The card of preference pairs made from sampled answers, as a dataset.

    Args:
        how: the rule by which answers became pairs, one sentence.
        made: model, judge and settings, by name. Of a path only the last part is shown.
        counts, length: lines.
        file: the data, relative to the card.
    """
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["sepo", "preference-optimization", "dpo", "on-policy", "synthetic"],
        pretty_name=f"{name}: preference pairs from sampled answers",
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": file}]}],
    )
    rows = counts[0].split(" ")[0] if counts else "0"
    return _card(
        "pairs_card.md",
        front_matter=f"---\n{data.to_yaml()}\n---",
        name=plain(name),
        rows=rows,
        how=plain(how),
        made="\n".join(f"- **{plain(key)}**: {plain(str(_shareable(value, ())))}" for key, value in made.items()),
        counts="\n".join(f"- {plain(line)}" for line in counts),
        length="\n".join(f"- {plain(line)}" for line in length),
    )


def _card(template: str, **values: str) -> str:
    return Template(resources.files("sepo.hub").joinpath(template).read_text(encoding="utf-8")).substitute(values)


def _model_values(
    recipe: Recipe, names: Collection[str], base: str | None, adapter: bool, license: str | None
) -> dict[str, str]:
    """The parts that the cards of both models share."""
    return {
        "front_matter": front_matter(recipe, names, base, adapter, license),
        "name": plain(recipe.name),
        "usage": usage(adapter, base),
        "source": source_of(recipe, names),
        "settings": settings_block(recipe, names),
        "license": "" if license else "\nThe licences of the base model and of the data apply.\n",
    }


def write_policy_card(folder: Path, recipe: Recipe, metrics: Mapping[str, Any]) -> Path | None:
    """Write the card beside the policy of a run; None if the user's own text is there."""
    path = folder / "policy" / CARD
    if not may_write(path):
        return None
    write_text(path, policy_card_of_run(folder, recipe, metrics))
    return path


def policy_card_of_run(
    folder: Path,
    recipe: Recipe,
    metrics: Mapping[str, Any],
    *,
    base: str | None = None,
    license: str | None = None,
    merged: bool = False,
) -> str:
    """The card of the policy in a run folder; `base` and `license` override what the run records.

    Args:
        merged: an adapter is shared as a whole model.
    """
    name, names = recipe.policy.model or recipe.reference.model, hub_names(folder)
    return policy_card(
        recipe,
        metrics,
        summary_of_folder(folder, recipe, metrics),
        names=names,
        base=base or hub_id(name, names),
        adapter=is_adapter(folder / "policy") and not merged,
        license=license or license_beside(name, names),
    )


def is_generated(text: str) -> bool:
    """Whether sepo wrote a card."""
    return _MARK in text


def may_write(path: Path) -> bool:
    """Whether there is no card, or a card that sepo wrote."""
    return not path.exists() or is_generated(path.read_text(encoding="utf-8", errors="replace"))


def front_matter(recipe: Recipe, names: Collection[str], base: str | None, adapter: bool, license: str | None) -> str:
    """The metadata of a model, as the hub reads them."""
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        datasets=_hub_sources(recipe, names),
        library_name="peft" if adapter else "transformers",
        license=license,
        model_name=recipe.name,
        pipeline_tag="text-generation",
        tags=["sepo", "preference-optimization", "alignment"],
    )
    return f"---\n{data.to_yaml()}\n---"


def usage(adapter: bool, base: str | None) -> str:
    """Code that loads the model from ORG/NAME, a placeholder for its repository."""
    if not adapter:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        return _USAGE.format(imports=imports, model="AutoModelForCausalLM")
    imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    code = _USAGE.format(imports=imports, model="AutoPeftModelForCausalLM")
    note = "These are adapter weights only: `base_model_name_or_path` in `adapter_config.json` names the base."
    return code if base is not None else f"{code}\n\n{note}"


def metrics_with_intervals(metrics: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A table of those metrics that have a value, with 95 % intervals."""
    lines = ["| metric | value | 95 % interval |", "|---|---:|---:|"]
    for name, text in names.items():
        if (value := measured(metrics, name)) is not None:
            lines.append(f"| {plain(text)} | {number(value.value)} | {value.interval_text()} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _judge_metrics(recipe: Recipe) -> dict[str, str]:
    """Names of the judge's metrics that say that the judge is an oracle."""
    if recipe.eval.judge is None or recipe.eval.judge.oracle is None:
        return {}
    return {
        "judge/win_rate": "win rate against the start, by a DPO oracle as judge",
        "judge/oracle_accuracy": "held-out pairs that this judge ranks right",
    }


def _task_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    rates = {
        name: f"{name.split('/')[1]}, judge's win rate against the start"
        for name in metrics
        if name.startswith("benchmarks/") and name.endswith("/win_rate")
    }
    return rates | {
        f"tasks/{task}/{score}/{part}": f"{task} ({score}), {words}"
        for task, score in task_scores(metrics).items()
        for part, words in (("base", "before"), ("policy", "after"), ("difference", "difference"))
    }


def _examples(summary: RunSummary) -> str:
    if not summary.examples:
        return ""
    rows = [f"| {' | '.join(map(plain, example[:3]))} |" for example in summary.examples]
    return _EXAMPLES.format(title=plain(_capital(summary.examples_title)), rows="\n".join(rows))


def settings_block(recipe: Recipe, names: Collection[str]) -> str:
    """The settings that differ from the defaults as a YAML code block, without paths of this machine."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(_shareable(values, names), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def _shareable(value: Any, names: Collection[str]) -> Any:
    """Settings without places of this machine: of a path the last part, unless it is among the run's hub names."""
    if isinstance(value, Mapping):
        return {name: _shareable(item, names) for name, item in value.items() if name not in _NOT_SHOWN}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_shareable(item, names) for item in value]
    if isinstance(value, str) and _PATH.fullmatch(value) and value not in names:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def plain(text: str) -> str:
    """Escape a text for one line of Markdown: markup, links and mentions become character codes.

    >>> plain("5 < 7, *really*")
    '5 &#60; 7, &#42;really&#42;'
    """
    text = "".join(c if c.isalnum() or c in " .,;?-+−±%()'’–" else f"&#{ord(c)};" for c in one_line(text, 2000))
    return re.sub(r"(?i)www\.", lambda match: f"{match[0][:3]}&#46;", text)  # GitHub links www. by itself


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def source_of(recipe: Recipe, names: Collection[str]) -> str:
    """The sources of the preference pairs: a hub id as a link, a file by its name only."""
    return "; ".join(_source_of(part.source, names) for part in recipe.data.parts())


def _source_of(source: str, names: Collection[str]) -> str:
    if (hub := hub_id(source, names)) is not None:
        return f"[{hub}](https://huggingface.co/datasets/{hub})"
    if source in EMBEDDED_DATA:
        return f"the embedded task `{source.removeprefix('embedded:')}` of sepo"
    return f"a file or folder, {plain(Path(source).name)}"


def _hub_sources(recipe: Recipe, names: Collection[str]) -> list[str] | None:
    """The hub ids among the sources; None without any."""
    return [hub for part in recipe.data.parts() if (hub := hub_id(part.source, names)) is not None] or None


def license_beside(model: str, names: Collection[str]) -> str | None:
    """The licence in a model's card, in its folder or in the hub's cache; None if no card can be read."""
    path = Path(model) / CARD
    try:
        if model in names:
            path = Path(str(try_to_load_from_cache(model, CARD)))
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license") if path.is_file() else None
    except Exception:  # YAML of others can be anything
        return None
    return found if isinstance(found, str) else None


def hub_names(folder: Path) -> frozenset[str]:
    """The names in a run's recipe that meant something on the hub when it ran (`runs.folder.hub_names`).

    Runs of earlier releases recorded none, so their cards link nothing.
    """
    path = folder / "manifest.json"
    names = read_json_object(path).get("hub") if path.is_file() else None
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def hub_id(name: str, names: Collection[str]) -> str | None:
    """The name if it is among a run's hub names; None for a file, a folder, or a file in a package."""
    return name if name in names else None
