"""What a run takes over from models, and what it leaves when settings change: nothing silently old, nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest

from pairs import config, some_pairs
from sepo.cli import main
from sepo.recipe.reading import parse_recipe
from sepo.recipe.settings import EvalSettings
from sepo.stages import reference
from sepo.study.policy_evaluator import Checkpoints, PolicyEvaluator, start_of
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer
from tiny_run import run_command, stages_done


def strict(path):
    """JSON as the standard has it: Python alone reads a bare NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


QUICK = ("policy.training.max_steps=1", "eval.prompts=1", "eval.samples=1", "eval.max_new_tokens=2")


@pytest.fixture
def copy(finished_run, copied_run, tmp_path):
    """The finished run at another place, with a policy of its own."""
    tiny_model("llama", seed=3, max_position_embeddings=512).save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path, run_command(finished_run, copied_run)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_changed_template_or_eos_list_of_the_policys_model_redoes_what_inherits_it(copy, capsys):
    folder, command = copy
    command = [*command, *QUICK, f"policy.model={folder / 'policy'}"]
    assert main(command) == 0
    assert stages_done(capsys.readouterr().err) == ["train", "eval"]
    assert main(command) == 0
    assert stages_done(capsys.readouterr().err) == []
    model, policy = folder / "policy", folder / "run" / "policy"

    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    assert main(command) == 0
    text = capsys.readouterr().err
    assert "start.tokenizer and generation config changed" in text
    assert stages_done(text) == ["train", "eval"]
    assert (policy / "chat_template.jinja").read_text() == template.read_text()

    change_json(model / "generation_config.json", eos_token_id=[2, 50])
    assert main(command) == 0
    assert stages_done(capsys.readouterr().err) == ["train", "eval"]
    assert json.loads((policy / "generation_config.json").read_text())["eos_token_id"] == [2, 50]

    change_json(model / "generation_config.json", transformers_version="0.0")
    (model / "README.md").write_text("a note")
    assert main(command) == 0
    assert stages_done(capsys.readouterr().err) == []


def test_a_fine_tuned_reference_depends_on_the_template_that_writes_its_rows(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"model": str(tmp_path / "model"), "sft": {"source": str(tmp_path / "rows.jsonl")}}
    recipe = parse_recipe({"reference": settings}, "test")
    before = reference.stage(recipe, reference.hash_model(recipe.reference.model)).depends
    assert reference.stage(recipe, reference.hash_model(recipe.reference.model)).depends == before
    with open(tmp_path / "model" / "chat_template.jinja", "a") as file:
        file.write("!")
    after = reference.stage(recipe, reference.hash_model(recipe.reference.model)).depends
    assert {key for key in before if before[key] != after[key]} == {"model"}


def test_what_earlier_settings_left_is_named_kept_and_used_again(copy, capsys):
    folder, command = copy
    command = [*command, *QUICK]
    run = folder / "run"
    dpo = ["policy.objective=dpo", f"policy.model={folder / 'policy'}"]
    assert main([*command, "oracle.count=2", *dpo]) == 0
    assert "not used by these settings" not in capsys.readouterr().err
    assert {"seconds/oracle-2", "seconds/policy_start_logps"} <= set(strict(run / "metrics.json"))
    weights = (run / "oracle-2" / "model.safetensors").read_bytes()

    assert main(command) == 0
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if "not used by these settings" in line]
    assert "logps/oracle-2, logps/policy_start, oracle-2 (0.00 GB" in line
    assert (run / "oracle-2" / "model.safetensors").read_bytes() == weights
    for name in ("oracle-2", "oracle-2_logps", "policy_start_logps"):  # no time of a stage that the run has not
        assert f"seconds/{name}" not in strict(run / "metrics.json")
        assert name not in strict(run / "manifest.json")["stages"]

    assert main([*command, "oracle.count=2"]) == 0
    text = capsys.readouterr().err
    assert f"{run / 'oracle-2'} exists, trained with the same" in text
    assert "not used by these settings, and kept: logps/policy_start (" in text


def test_json_of_a_run_and_of_a_comparison_is_json_where_figures_are_undefined(copy, capsys):
    """One prompt has no standard error, no gold reward no gain."""
    folder, command = copy
    assert main([*command, "eval.prompts=1", "eval.samples=1", "eval.gold=null"]) == 0
    grid = folder / "grid.yaml"
    grid.write_text(
        f"base: {command[1]}\noutput_dir: {folder / 'out'}\ncheckpoints: 1\nvariants:\n"
        "  simpo: {set: {policy.objective: simpo}}\n"
    )
    for gold in ("null", "vader"):
        assert main(["compare", str(grid), "eval.prompts=1", "eval.samples=1", f"eval.gold={gold}"]) == 0
    read = [strict(path) for path in folder.rglob("*.json")]
    assert None in strict(folder / "run" / "metrics.json").values()
    assert len(read) > 20
    assert any(None in point.values() for path in folder.rglob("points.json") for point in strict(path))


@pytest.mark.parametrize(
    "settings",
    [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}],
    ids=["one batch", "two batches"],
)
def test_pairs_seen_are_those_that_were_trained_on(tmp_path, settings):
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(17)
    asked, measured = pairs.slice(0, 1), EvalSettings(prompts=1, max_new_tokens=1)
    judge = PolicyEvaluator(model, tokenizer, asked, measured, 0, start_of(model, tokenizer, asked, measured, 0), pairs)
    watch = Checkpoints(judge, np.linspace(1 / 6, 1, 6).tolist(), tmp_path / "points.json", len(pairs))
    trained = []

    class Counting(PreferenceTrainer):
        def training_step(self, model, inputs, *rest):
            trained.append(inputs["num_pairs"])
            return super().training_step(model, inputs, *rest)

    Counting(
        tiny_model("llama"), config(tmp_path, objective="simpo", num_train_epochs=2, **settings), pairs,
        callbacks=[watch],
    ).train()  # fmt: skip
    assert [point["pairs_seen"] for point in watch.points] == [8, 16, 17, 25, 33, 34]
    assert sum(trained) == 34
