"""One graph of the stages: a dry run plans exactly the stages that a run records."""

import json
import random
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from sepo.api import extension_of, run_recipe
from sepo.errors import UserError
from sepo.planning.plan import Planner, plan_stages
from sepo.planning.sizes import method_sizes
from sepo.planning.stages import cost_of
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.reading import load_recipe
from sepo.runs.method import UNTIL, Method
from sepo.runs.pipeline import check_inputs
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer_of

RECIPE = """
name: graph
device: cpu
data: {source: FOLDER/prefs.jsonl, held_out: 2}
reference: {model: FOLDER/model}
oracle: {training: {learning_rate: 1.0e-2, batch_size: 8, max_steps: 1}}
policy: {training: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 1}}
eval: {prompts: 1, max_new_tokens: 2, examples: 0}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    for name, seed, kind in (("model", 0, "gpt2"), ("other", 1, "gpt2"), ("foreign", 2, "llama2")):
        tokenizer = tiny_tokenizer_of(kind)
        model = tiny_model("llama", seed=seed, initializer_range=0.02, vocab_size=len(tokenizer), num_hidden_layers=3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for index in range(8):
        good, bad = ([{"role": "assistant", "content": text}] for text in (f"Yes, thanks {index}!", f"no {index}"))
        rows.append({"prompt": [{"role": "user", "content": f"Is it {index}?"}], "chosen": good, "rejected": bad})
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more.jsonl").write_text((folder / "prefs.jsonl").read_text().replace("Is it", "Was it"))
    (folder / "judge.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    (folder / "questions.json").write_text(json.dumps([{"instruction": "Name a fruit."}]))
    rows = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(8)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    run_recipe(recipe_of(folder, "given"))
    return folder


def recipe_of(workplace, name: str, *overrides: str):
    folder = workplace / "runs" / name
    return load_recipe(workplace / "recipe.yaml", [f"output_dir={folder}", *overrides])


KINDS = {
    "plain": [],
    "existing oracle": ["oracle.model=WORKPLACE/runs/given/oracle"],
    "given rewards": ["oracle.rewards=WORKPLACE/runs/given/scores"],
    "given rewards, with a reference": ["oracle.rewards=WORKPLACE/runs/given/scores", "policy.objective=dpo"],
    "truth": ["eval.gold=vader", "select={k_chosen: 1, k_rejected: 1, credit: truth}"],
    "truth, second tokenizer": ["eval.gold=vader", "select.credit=truth", "policy.model=WORKPLACE/foreign"],
    "several oracles": ["oracle.count=2"],
    "contrastive": ["oracle.contrastive=true"],
    "several contrastive oracles": ["oracle.count=2", "oracle.contrastive=true"],
    "part of the layers": ["reference.layers=2", "policy.model=WORKPLACE/other"],
    "fine-tuned reference": [
        "reference.sft={source: WORKPLACE/sft.jsonl, max_length: 32, training: {batch_size: 4, max_steps: 1}}",
    ],
    "another policy": ["policy.model=WORKPLACE/other"],
    "another policy, with a reference": ["policy.model=WORKPLACE/other", "policy.objective=ipo"],
    "the reference by name as policy, with a reference": ["policy.model=WORKPLACE/model", "policy.objective=dpo"],
    "second tokenizer": ["policy.model=WORKPLACE/foreign"],
    "second tokenizer, with a reference": ["policy.model=WORKPLACE/foreign", "policy.objective=dpo"],
    "oracle in mixed precision": ["oracle.training.bf16=true"],
    "policy in mixed precision": ["policy.training.bf16=true", "policy.objective=dpo"],
    "both in mixed precision": ["oracle.training.bf16=true", "policy.training.bf16=true", "policy.objective=dpo"],
    "second tokenizer in mixed precision": [
        *("policy.model=WORKPLACE/foreign", "policy.objective=dpo", "policy.training.bf16=true"),
    ],
    "gold reward": ["eval.gold=vader"],
    "judge": ["eval.judge=function:judge:length"],
    "benchmark": ["eval.benchmarks={own: WORKPLACE/questions.json}", "eval.benchmark_max_new_tokens=2"],
    "judged benchmark": [
        "eval.benchmarks={own: WORKPLACE/questions.json}",
        "eval.benchmark_max_new_tokens=2",
        "eval.judge=function:judge:length",
    ],
    "no evaluation": ["eval.prompts=0", "data.held_out=0"],
    **{f"objective {name}": [f"policy.objective={name}"] for name in OBJECTIVES},
}
# Settings that change no stage of their own, tried together with the kinds.
SETTINGS = {
    "policy's KL": ["policy.target_kl=0.01"],
    "automatic rate": [
        *("policy.target_kl=0.5", "policy.training.learning_rate=auto", "policy.training.max_steps=4"),
    ],
    "oracle's accuracy": ["oracle.target_accuracy=0.9"],
    "confidence": ["select.confidence=0.3"],
    "label log-odds": ["select.label_log_odds=0.5"],
    "LoRA": ["policy.lora={r: 2}", "oracle.lora={r: 2}"],
    "sample": ["data.sample=0.5"],
    "two sources": [
        "data={sources: [{source: WORKPLACE/prefs.jsonl}, {source: WORKPLACE/more.jsonl}], held_out: 2}",
    ],
}


def planned_stages(recipe, folder: Path) -> list[str]:
    planner = Planner(folder)
    extension = extension_of(recipe)
    method = Method(recipe, planner, extension=extension)
    plan_stages(method, extension)
    sizes = method_sizes(method, "cpu")
    assert all(cost_of(stage, sizes).what for stage in planner.stages.values())
    return list(planner.stages)


# For the nightly run: objectives that read tables as another one does (the reference by name as policy is trained by
# DPO), and what a kind of the ordinary run covers, with more than it has.
_NIGHTLY = {f"objective {name}" for name in OBJECTIVES if name not in ("tgdpo", "tbpo")} | {
    "given rewards", "several contrastive oracles", "another policy", "second tokenizer", "benchmark", "gold reward",
    "oracle in mixed precision", "policy in mixed precision", "second tokenizer, with a reference", "judge",
    "another policy, with a reference", "truth", "existing oracle", "contrastive",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.nightly if kind in _NIGHTLY else []) for kind in KINDS],
)
def test_a_plan_has_exactly_the_stages_of_the_run(workplace, tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(str(workplace))
    plan_and_run(workplace, tmp_path, kind.replace(",", "").replace(" ", "-"), KINDS[kind])


def plan_and_run(workplace: Path, tmp_path: Path, name: str, overrides: list[str]) -> None:
    """Compare the stages of a plan with those of the run; a refused recipe is refused before its first stage."""
    try:
        recipe = recipe_of(workplace, name, *(item.replace("WORKPLACE", str(workplace)) for item in overrides))
        check_inputs(recipe, extension_of(recipe))
    except UserError:
        assert " + " in name, "a kind alone is a recipe that runs"
        return
    # From the folder of another recipe: stages with the same inputs are reused, records of other stages are removed.
    shutil.copytree(workplace / "runs" / "given", recipe.run_folder)
    planned = planned_stages(recipe, tmp_path)
    run_recipe(recipe)
    stages = json.loads((recipe.run_folder / "manifest.json").read_text())["stages"]
    assert sorted(planned) == sorted(stages)


TWO_KINDS = random.Random(0).sample(
    [pair for pair in combinations({**KINDS, **SETTINGS}, 2) if not all(kind.startswith("objective") for kind in pair)],
    40,
)


@pytest.mark.nightly
@pytest.mark.parametrize("kinds", [*((kind,) for kind in SETTINGS), *TWO_KINDS], ids=" + ".join)
def test_kinds_together_run_as_planned_or_are_refused_at_once(workplace, tmp_path, monkeypatch, kinds):
    monkeypatch.syspath_prepend(str(workplace))
    overrides = [item for kind in kinds for item in {**KINDS, **SETTINGS}[kind]]
    plan_and_run(workplace, tmp_path, " + ".join(kinds), overrides)


# The first stage and a training in the ordinary run.
@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, marks=[] if s in ("reference", "train") else pytest.mark.nightly) for s in UNTIL],
)
def test_a_run_until_a_stage_ends_there_and_the_whole_run_continues_it(workplace, capsys, stage):
    recipe = recipe_of(workplace, f"until-{stage}")
    assert run_recipe(recipe, until=stage) == {}
    done = json.loads((recipe.run_folder / "manifest.json").read_text())["stages"]
    order = ["data", "reference_logps", "oracle", "oracle_logps", "score", "select", "train", "eval"]
    last = {"reference": "reference_logps"}.get(stage, stage)
    assert list(done) == order[: order.index(last) + 1]
    assert not (recipe.run_folder / "metrics.json").exists()
    capsys.readouterr()
    run_recipe(recipe)
    said = capsys.readouterr().err
    assert all(f"[{name}] unchanged, reused" in said for name in done)


def test_a_dry_run_until_a_stage_plans_no_further(workplace, capsys):
    from sepo.cli import main

    folder = workplace / "runs" / "planned"
    assert main(["run", str(workplace / "recipe.yaml"), f"output_dir={folder}", "--dry-run", "--until", "score"]) == 0
    shown = capsys.readouterr().out
    assert "\nscore " in shown
    assert "\nselect " not in shown


def test_the_help_names_every_stage_that_a_run_can_end_with(capsys):
    from sepo.cli import main

    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(list(UNTIL)[:-1]) + f" or {list(UNTIL)[-1]}" in shown


def test_a_stage_that_does_not_exist_is_refused_before_anything_starts(workplace, capsys):
    from sepo.cli import main

    folder = workplace / "runs" / "wrong"
    assert main(["run", str(workplace / "recipe.yaml"), f"output_dir={folder}", "--until", "scores"]) == 2
    assert "there is no stage 'scores' (did you mean 'score'?)" in capsys.readouterr().err
    assert not folder.exists()
