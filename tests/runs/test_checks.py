"""What can be known to be wrong is said in one line before anything runs: settings, limits of models, the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM

from pairs import some_pairs
from sepo.api import extension_of, plan_run, run_recipe
from sepo.credit.rewards import pair_rewards
from sepo.data.tables import make_table, provenance_of, read_table, write_table
from sepo.errors import UserError
from sepo.forward.scoring import dataset_logps
from sepo.models.names import check_model
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.reading import parse_override, parse_recipe, set_key
from sepo.recipe.settings import Recipe
from sepo.runs import pipeline
from sepo.runs.pipeline import check_inputs, check_pairs
from sepo.stages import data, reference
from sepo.stages.score import score_pairs
from sepo.stages.select import select
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def model(tmp_path) -> Path:
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    return tmp_path / "m"


def recipe_of(folder: Path, model: Path, *overrides: str, prompt: str = "Is it red?") -> Recipe:
    data = folder / "pairs.jsonl"
    rows = [{"prompt": f"{prompt} {i}", "chosen": f"Yes, {i} {i}.", "rejected": f"No {i}."} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict = {
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "data": {"source": str(data), "as_chat": True, "held_out": 2},
        "reference": {"model": str(model)},
        "oracle": {"training": {"batch_size": 6, "learning_rate": 1e-2}},
        "policy": {"training": {"batch_size": 6, "learning_rate": 1e-2}},
        "eval": {"prompts": 1, "max_new_tokens": 4},
    }
    for override in overrides:
        key, value = parse_override(override)
        set_key(values, key, value, override)
    return parse_recipe(values, "test")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# --- settings of a training ---


@pytest.mark.parametrize("section", ["oracle", "policy"])
@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("lr_scheduler_type=cosinee", "training.lr_scheduler_type cannot be used .*cosinee is not a valid"),
        ("report_to=wandb", "training: report_to names wandb, which is not installed"),
        ("report_to=nonsense", "training: report_to names 'nonsense'"),
        ("arguments.optim=adamw_bnb_8bit", "training.arguments.optim cannot be used .*bitsandbytes"),
        ("arguments.optim=nonsense", "training.arguments.optim cannot be used"),
        ("arguments.optim=galore_adamw", "training.arguments.optim cannot be used"),
        ("arguments.eval_strategy=steps", "training.arguments.eval_strategy cannot be used .*eval_dataset"),
        ("arguments.load_best_model_at_end=true", "training.arguments.load_best_model_at_end cannot be used"),
        ("arguments.deepspeed=none.json", "training.arguments.deepspeed: cannot read 'none.json'"),
        ("arguments.lr_scheduler_kwargs={nonsense: 1}", "training.arguments.lr_scheduler_kwargs cannot be used"),
        ("arguments.optim_args=nonsense", "training.arguments.optim_args cannot be used"),
        ("arguments.dataloader_num_workers=-1", "training.arguments.dataloader_num_workers cannot be used"),
        ("arguments.logging_dir=x", "training.arguments.logging_dir: not a TrainingArguments field"),
        ("arguments.learning_rate=1", "set .*training.learning_rate instead"),
        ("arguments.gradient_accumulation_steps=2", "batch_size is the number of pairs per update"),
        ("arguments.per_device_train_batch_size=2", "batch_size is the number of pairs per update"),
        ("arguments.torch_compile=true", "gradients are accumulated in place"),
        ("arguments.use_liger_kernel=true", "it would replace the fused kernels"),
        ("arguments.neftune_noise_alpha=5", "with noise, the policy would differ"),
        ("arguments.train_sampling_strategy=sequential", "pairs are drawn at random"),
        ("arguments.output_dir=x", "checkpoints are in the output folder"),
        ("arguments.objective=dpo", "training.arguments.objective cannot be used"),
    ],
)
@pytest.mark.daily(16)
def test_a_training_that_cannot_be_set_up_is_refused_by_its_setting(tmp_path, model, section, setting, match):
    recipe = recipe_of(tmp_path, model, f"{section}.training.{setting}")
    with pytest.raises(UserError, match=match) as error:
        check_inputs(recipe)
    assert one_line(error).startswith(f"{section}.training")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["oracle.training.max_steps=0", "policy.training.max_steps=0"])
def test_no_steps_are_no_training(tmp_path, model, setting):
    with pytest.raises(UserError, match="0 steps train nothing"):
        recipe_of(tmp_path, model, setting)


@pytest.mark.parametrize("section", ["oracle", "policy"])
def test_layers_that_an_adapter_is_to_be_put_on_must_be_there(tmp_path, model, section):
    with pytest.raises(UserError, match=rf"{section}.lora.target_modules \['foo'\] does not fit"):
        check_inputs(recipe_of(tmp_path, model, f"{section}.lora.target_modules=[foo]"))
    check_inputs(recipe_of(tmp_path, model, f"{section}.lora.r=4"))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("lr_scheduler_type=cosinee", "reference.sft.training.lr_scheduler_type cannot be used"),
        ("arguments.optim=nonsense", "reference.sft.training.arguments.optim cannot be used"),
        ("arguments.packingg=true", "reference.sft.training.arguments.packingg cannot be used"),
    ],
)
def test_a_fine_tuning_is_checked_as_well(tmp_path, model, setting, match):
    pytest.importorskip("trl")
    rows = tmp_path / "sft.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    recipe = recipe_of(tmp_path, model, f"reference.sft.source={rows}", f"reference.sft.training.{setting}")
    with pytest.raises(UserError, match=match):
        check_inputs(recipe, extension_of(recipe))
    rows.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    recipe = recipe_of(tmp_path, model, f"reference.sft.source={rows}")
    with pytest.raises(UserError, match="has the columns question, answer: expected messages"):
        check_inputs(recipe, extension_of(recipe))


# --- limits of a model ---


def test_a_token_beyond_the_embedding_is_found_by_the_dry_run_and_the_run(tmp_path):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    tokenizer.add_tokens(["é"])
    tokenizer.save_pretrained(tmp_path / "m")
    plan_run(recipe_of(tmp_path, tmp_path / "m"))  # an added token that nobody uses disturbs nobody
    recipe = recipe_of(tmp_path, tmp_path / "m", prompt="Is it é?")
    for run in (plan_run, run_recipe):
        with pytest.raises(UserError, match=r"holds the token 'é' with id 101, but .* has 101 embeddings") as error:
            run(recipe)
        one_line(error)


def test_pairs_longer_than_learned_positions_are_refused_and_rotary_ones_counted(tmp_path, capfd):
    for kind in ("gpt2", "llama", "mistral"):
        save_model(tiny_model(kind), tiny_tokenizer(), tmp_path / kind)
    long = "Is it red? " * 50
    with pytest.raises(UserError, match=r"pairs are longer than the 512 positions of .*set data.max_length to 512"):
        plan_run(recipe_of(tmp_path, tmp_path / "gpt2", prompt=long))
    with pytest.raises(UserError, match=r"prompts with eval.max_new_tokens 510 are longer .*lower eval.max_new_tokens"):
        plan_run(recipe_of(tmp_path, tmp_path / "gpt2", "eval.max_new_tokens=510"))
    plan_run(recipe_of(tmp_path, tmp_path / "gpt2", "data.max_length=512", prompt=long))
    capfd.readouterr()
    for kind in ("llama", "mistral"):
        plan_run(recipe_of(tmp_path, tmp_path / kind, prompt=long))
        assert "6 of 6 pairs are longer than the 512 positions" in capfd.readouterr().err


def test_pairs_are_read_again_only_where_a_limit_is_reached(tmp_path, monkeypatch):
    """The data stage has seen the largest id and the longest texts."""
    save_model(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "m")
    recipe = recipe_of(tmp_path, tmp_path / "m")
    found = data.prepare_data(recipe.data, load_tokenizer(tmp_path / "m"), tmp_path / "pairs")["extremes"]
    tables = {part: read_table(tmp_path / "pairs" / part, "pairs") for part in found}
    for part, table in tables.items():
        rows = table.to_pylist()
        sides = [[*row["prompt_ids"], *row[f"{side}_ids"]] for row in rows for side in ("chosen", "rejected")]
        assert found[part]["largest_id"] == max(max(ids) for ids in sides)
        assert found[part]["longest"] == max(map(len, sides))
        assert found[part]["longest_prompt"] == max(len(row["prompt_ids"]) for row in rows)
    reads = []
    monkeypatch.setattr(pipeline, "read_table", lambda path, kind: reads.append(path) or read_table(path, kind))
    check_pairs(recipe, tmp_path / "pairs", found)
    assert not reads
    beyond = {"largest_id": 101, "longest": 513, "longest_prompt": 513}  # 101 embeddings, 512 positions
    for name, value in beyond.items():
        check_pairs(recipe, tmp_path / "pairs", {**found, "held_out": {**found["held_out"], name: value}})
        assert len(reads) == 2, name
        reads.clear()


# --- an oracle that says nothing ---


def test_an_oracle_that_is_the_reference_is_refused(tmp_path, model):
    with pytest.raises(UserError, match="is the reference: every token reward would be 0"):
        check_inputs(recipe_of(tmp_path, model, f"oracle.model={model}"))
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "copy")
    with pytest.raises(UserError, match="has the weights of the reference"):
        run_recipe(recipe_of(tmp_path, model, f"oracle.model={tmp_path / 'copy'}"))


def test_an_adapter_that_was_never_trained_is_no_oracle(tmp_path, model):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "idle")
    check_model(tmp_path / "idle")
    with pytest.raises(UserError, match="is an untrained adapter"):
        check_inputs(recipe_of(tmp_path, model, f"oracle.model={tmp_path / 'idle'}"))


def test_an_oracle_on_another_base_than_the_reference_is_said(tmp_path, model, capfd):
    save_model(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "other")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "other"),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    check_inputs(recipe_of(tmp_path, model, f"oracle.model={tmp_path / 'adapter'}"))
    assert "the oracle is an adapter of" in capfd.readouterr().err


def test_scores_that_are_all_zero_are_refused_and_not_kept(tmp_path):
    pairs = some_pairs(6)
    logps = dataset_logps(tiny_model("llama"), pairs)
    for name, table in (("pairs", pairs), ("logps", logps)):
        write_table(tmp_path / name, table, 100)
    with pytest.raises(UserError, match="every token reward is 0"):
        score_pairs(tmp_path / "pairs", [tmp_path / "logps"], tmp_path / "logps", tmp_path / "scores")
    assert not list((tmp_path / "scores").glob("*.parquet"))
    write_table(tmp_path / "zero", pair_rewards(pairs, logps, logps), 100)
    with pytest.raises(UserError, match="every token reward is 0"):
        select(tmp_path / "zero", tmp_path / "selection")


def test_an_oracle_that_prefers_the_rejected_is_pointed_out(tmp_path, capfd):
    pairs = some_pairs(40)
    logps = dataset_logps(tiny_model("llama"), pairs)
    columns = logps.to_pydict()
    better = [[value + 1.0 for value in row] for row in columns["chosen_logps"]]
    oracle = make_table("logps", {**columns, "chosen_logps": better}, provenance_of(logps))
    for name, table in (("pairs", pairs), ("reference", logps), ("oracle", oracle)):
        write_table(tmp_path / name, table, 100)
    score_pairs(tmp_path / "pairs", [tmp_path / "oracle"], tmp_path / "reference", tmp_path / "right")
    assert "swapped" not in capfd.readouterr().err
    score_pairs(tmp_path / "pairs", [tmp_path / "reference"], tmp_path / "oracle", tmp_path / "swapped")
    assert "prefers the rejected response in 100% of the pairs looked at" in capfd.readouterr().err


def test_a_share_of_few_pairs_that_is_none_is_said(tmp_path, model, capfd):
    plan_run(recipe_of(tmp_path, model, "data.held_out=0.05"))
    assert "data.held_out 0.05 of 8 pairs is no pair: nothing will be evaluated" in capfd.readouterr().err


def test_a_fine_tuned_reference_depends_on_the_content_of_its_rows(tmp_path, model):
    rows = tmp_path / "sft.jsonl"
    recipe = recipe_of(tmp_path, model, f"reference.sft.source={rows}")
    seen = []
    for text in ("a", "b", "a"):
        rows.write_text(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
        seen.append(dict(reference.stage(recipe, reference.hash_model(recipe.reference.model)).depends))
    assert seen[0] == seen[2] != seen[1]
