"""Cards: what the hub shows of a model or a table of token rewards, and what lies beside the weights on disk.

`policy_card`, `oracle_card` and `table_card` are pure functions of what a run wrote; `write_policy_card` puts the first
beside the policy. Whatever comes from data or from names is escaped: a card is Markdown with HTML in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData, try_to_load_from_cache

from sepo.errors import one_line
from sepo.files import write_text
from sepo.models.folders import is_adapter
from sepo.recipe.settings import EMBEDDED_DATA, Recipe
from sepo.report.numbers import number
from sepo.report.run_summary import RunSummary, cautions, short_name, summary_of_folder, task_scores
from sepo.runs.folder import CARD

# A card without this line is somebody's own text, and is left alone.
MARK = "<!-- Written by sepo from the run. Without this line it is kept as it is. -->"
PAPER = "[SePO](https://arxiv.org/abs/2408.13518) (Yang et al., EMNLP 2025)"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Half the width of a 95 % interval, in standard errors.
_INTERVAL = 1.96
# Settings that say where and how fast, not what, and those that may tell of a network.
_NOT_SHOWN = {
    "output_dir", "device", "server", "cache", "key_variable", "concurrency", "retries", "timeout", "hub_token",
    "push_to_hub_token",
}  # fmt: skip

FIGURES = {
    "gold_reward/base": "gold reward, before",
    "gold_reward/policy": "gold reward, after",
    "gold_reward/difference": "gold reward, difference",
    "gold_reward/win_rate": "share of prompts with a higher gold reward",
    "judge/win_rate": "the judge's win rate against the start",
    "judge/length_controlled": "the same at equal lengths",
    "kl": "KL from the start, nats a response",
    "length/base": "tokens of a response, before",
    "length/policy": "tokens of a response, after",
    "finished/policy": "share of responses that end by themselves",
    "policy/accuracy": "held-out pairs ranked right, by what training changed",
    "oracle/accuracy": "held-out pairs that the oracle ranks right",
    "oracle/length_baseline": "held-out pairs whose chosen response is the longer one",
    "fidelity/auc": "AUC of the token rewards for words that count (chance 0.5)",
}


def policy_card(
    recipe: Recipe,
    metrics: Mapping[str, Any],
    story: RunSummary,
    *,
    base: str | None,
    adapter: bool,
    license: str | None,
) -> str:
    """The card of a policy: what it is, how it is loaded, what it was trained on, its figures, settings and answers.

    Args:
        metrics: as in `metrics.json`.
        story: of the same run.
        base: hub id of the model that it was trained from, None where it has none.
        adapter: only an adapter of that model was saved.
        license: identifier of the hub, such as "apache-2.0"; None where it is not known.
    """
    name = plain(recipe.name)
    start = plain(short_name(recipe.policy.model or recipe.reference.model))
    parts = [
        front_matter(recipe, base, adapter, license),
        MARK,
        f"# {name}",
        f"{start}, aligned with selective preference optimization: {PAPER}. An oracle that was trained with DPO gives "
        f"every response token a reward; the policy was trained with the objective `{recipe.policy.objective}`.",
        "## Use",
        usage(adapter, base),
        "## What was trained on what",
        "\n".join(f"- **{plain(what)}**: {plain(text)}" for what, text in story.trained),
        f"Preference data: {source_of(recipe)}.",
        "## Figures",
        plain(story.moved_title[:1].upper() + story.moved_title[1:]) + ".",
        figures(metrics, FIGURES | _judge_figures(recipe) | _task_figures(metrics)),
        "## Be careful",
        "\n".join(f"- {plain(sentence)}" for sentence in cautions(recipe, metrics)),
        *_examples(story),
        "## Settings",
        "What differs from the defaults:",
        settings_block(recipe),
        *_license(license),
    ]
    return "\n\n".join(parts) + "\n"


def oracle_card(
    recipe: Recipe, metrics: Mapping[str, Any], *, base: str | None, adapter: bool, license: str | None
) -> str:
    """The card of an oracle: a model whose log-probabilities, less the reference's, are token rewards."""
    parts = [
        front_matter(recipe, base, adapter, license),
        MARK,
        f"# The oracle of {plain(recipe.name)}",
        f"{plain(short_name(recipe.reference.model))}, trained with DPO (beta {recipe.oracle.beta:g}), to score tokens "
        f"rather than to talk: the reward of a response token is its log-probability under this model less that under "
        f"the model it was trained from. {PAPER}.",
        "## Use",
        usage(adapter, base),
        f"Preference data: {source_of(recipe)}.",
        "## Figures",
        figures(metrics, {name: text for name, text in FIGURES.items() if name.startswith(("oracle", "fidelity"))}),
        "## Settings",
        settings_block(recipe),
        *_license(license),
    ]
    return "\n\n".join(parts) + "\n"


def table_card(recipe: Recipe, counts: Mapping[str, int], tokenizer: str, license: str | None) -> str:
    """The card of a score table as a dataset.

    Args:
        counts: rows of each split.
        tokenizer: the model whose tokens they are.
    """
    hub = hub_id(recipe.data.source)
    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        tags=["sepo", "preference-optimization", "token-rewards", "dpo"],
        source_datasets=None if hub is None else [hub],
        pretty_name=f"{recipe.name}: token rewards",
        configs=[
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*.parquet"} for s in counts]}
        ],
    )
    rows = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# Token rewards of {plain(recipe.name)}",
        f"Preference pairs in which every response token has a reward and a weight, by {PAPER}. Pairs: {rows}. "
        f"Preference data: {source_of(recipe)}; its licence applies to the texts.",
        "## Columns",
        "| column | type | meaning |\n|---|---|---|\n"
        "| `pair_id` | int64 | row of the pair in its source |\n"
        "| `prompt` | string | as the model read it, with what the chat template writes |\n"
        "| `prompt_ids` | list of int32 | the same as token ids |\n"
        "| `chosen`, `rejected` | string | the responses, with the token that ends them |\n"
        "| `chosen_ids`, `rejected_ids` | list of int32 | their token ids |\n"
        "| `chosen_tokens`, `rejected_tokens` | list of string | the same as the vocabulary writes them |\n"
        "| `chosen_rewards`, `rejected_rewards` | list of float32 | log p(oracle) − log p(reference) of each token, "
        "nats |\n"
        "| `chosen_weights`, `rejected_weights` | list of float32 | weight of each token in training, 0 where it is no "
        "key token; null in pairs that were not trained on |\n"
        "| `pair_weight` | float32 | weight of the pair's loss in training; null in pairs that were not trained on |",
        f"Token ids are those of the tokenizer of {plain(short_name(tokenizer))}.",
        "## Use",
        "```python\nfrom datasets import load_dataset\n\n"
        'pairs = load_dataset("ORG/NAME", split="train")\n'
        'row = pairs[0]\nprint(list(zip(row["chosen_tokens"], row["chosen_rewards"], row["chosen_weights"])))\n```',
        "## Settings",
        settings_block(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def write_policy_card(folder: Path, recipe: Recipe, metrics: Mapping[str, Any]) -> Path | None:
    """Write the card beside the policy of a run; None where somebody's own text is there."""
    path = folder / "policy" / CARD
    if not may_write(path):
        return None
    write_text(path, policy_card_of_run(folder, recipe, metrics))
    return path


def policy_card_of_run(
    folder: Path, recipe: Recipe, metrics: Mapping[str, Any], *, base: str | None = None, license: str | None = None
) -> str:
    """The card of the policy in a run folder; `base` and `license` replace what can be read off the run."""
    name = recipe.policy.model or recipe.reference.model
    return policy_card(
        recipe,
        metrics,
        summary_of_folder(folder, recipe, metrics),
        base=base or hub_id(name),
        adapter=is_adapter(folder / "policy"),
        license=license or license_beside(name),
    )


def may_write(path: Path) -> bool:
    """Is there no card, or one that a run wrote?"""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def front_matter(recipe: Recipe, base: str | None, adapter: bool, license: str | None) -> str:
    """The metadata of a model, as the hub reads them."""
    source = hub_id(recipe.data.source)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        datasets=None if source is None else [source],
        library_name="peft" if adapter else "transformers",
        license=license,
        model_name=recipe.name,
        pipeline_tag="text-generation",
        tags=["sepo", "preference-optimization", "alignment"],
    )
    return f"---\n{data.to_yaml()}\n---"


def usage(adapter: bool, base: str | None) -> str:
    """How the model is loaded; it says ORG/NAME where its own place will be."""
    if adapter:
        load = "from peft import AutoPeftModelForCausalLM", "AutoPeftModelForCausalLM.from_pretrained(name)"
        also = "from transformers import AutoTokenizer"
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            ("AutoModelForCausalLM.from_pretrained(name)"),
        )
        also = ""
    head = "\n".join(line for line in (load[0], also) if line)
    note = ""
    if adapter and base is None:
        note = "\n\nThese are adapter weights alone: `base_model_name_or_path` in `adapter_config.json` names the base."
    return f"""```python
{head}

name = "ORG/NAME"  # or a folder
model = {load[1]}
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0], skip_special_tokens=True))
```{note}"""


def figures(metrics: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A table of figures with 95 % intervals, of those that there are."""
    lines = ["| figure | value | 95 % interval |", "|---|---:|---:|"]
    for name, text in names.items():
        value, error = metrics.get(name), metrics.get(f"{name}_se")
        if not isinstance(value, int | float):
            continue
        known = isinstance(error, int | float)
        interval = f"{number(value - _INTERVAL * error)} to {number(value + _INTERVAL * error)}" if known else ""  # type: ignore[operator]
        lines.append(f"| {plain(text)} | {number(value)} | {interval} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _judge_figures(recipe: Recipe) -> dict[str, str]:
    """What the judge's figures are called where it is an oracle: a reader should know who says so."""
    if recipe.eval.judge is None or recipe.eval.judge.oracle is None:
        return {}
    return {
        "judge/win_rate": "win rate against the start by a DPO oracle as judge",
        "judge/oracle_accuracy": "held-out pairs that this judge ranks right",
    }


def _task_figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    rates = {
        name: f"{name.split('/')[1]}, the judge's win rate against the start"
        for name in metrics
        if name.startswith("benchmarks/") and name.endswith("/win_rate")
    }
    return rates | {
        f"tasks/{task}/{score}/{part}": f"{task} ({score}), {words}"
        for task, score in task_scores(metrics).items()
        for part, words in (("base", "before"), ("policy", "after"), ("difference", "difference"))
    }


def settings_block(recipe: Recipe) -> str:
    """The settings that differ from the defaults as YAML in a code block, without places on this machine."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(_shareable(values), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def plain(text: str) -> str:
    """Text inside a line as Markdown and HTML show it as it is: what could be markup, a link or a mention is a code.

    >>> plain("5 < 7, *really*")
    '5 &#60; 7, &#42;really&#42;'
    """
    text = "".join(c if c.isalnum() or c in " .,;?-+−±%()'’–" else f"&#{ord(c)};" for c in one_line(text, 2000))
    return re.sub(r"(?i)www\.", lambda found: f"{found[0][:3]}&#46;", text)  # it would become a link


def source_of(recipe: Recipe) -> str:
    """Where the preference pairs are from: a hub id as a link, a file by its name alone."""
    source = recipe.data.source
    if (hub := hub_id(source)) is not None:
        return f"[{hub}](https://huggingface.co/datasets/{hub})"
    if source in EMBEDDED_DATA:
        return f"the embedded task `{source.removeprefix('embedded:')}` of sepo"
    return f"a file or folder, {plain(Path(source).name)}"


def license_beside(model: str) -> str | None:
    """The licence that a model's card names, in its folder or the hub's cache; None where no card can be read."""
    path = Path(model) / CARD
    try:
        if not path.is_file() and hub_id(model) is not None:
            path = Path(str(try_to_load_from_cache(model, CARD)))
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license") if path.is_file() else None
    except Exception:  # foreign YAML
        return None
    return found if isinstance(found, str) else None


def _license(license: str | None) -> list[str]:
    return [] if license else ["The licences of the model that this was trained from, and of the data, apply."]


def _examples(story: RunSummary) -> list[str]:
    if not story.examples:
        return []
    rows = [
        f"| {plain(one.prompt)} | {plain(one.before)} | {plain(one.after)} |"
        for one in story.examples
    ]  # fmt: skip
    title = plain(story.examples_title[:1].upper() + story.examples_title[1:]) + "; not selected."
    return ["## Before and after", title, "| prompt | before | after |\n|---|---|---|\n" + "\n".join(rows)]


def hub_id(name: str) -> str | None:
    """The hub id that a name of a recipe is; None for a file, a folder, or something in a package."""
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _shareable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shareable(item) for name, item in value.items() if name not in _NOT_SHOWN}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_shareable(item) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(".") or os.path.exists(value)):
        return Path(value).name
    return value
