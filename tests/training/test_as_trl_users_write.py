"""`PreferenceTrainer` called as people call TRL's trainers: an adapter's configuration, no tokenizer, save_model."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pairs import config, some_pairs
from sepo.errors import UserError
from sepo.models.adapters import new_adapter
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

TEXT = [{"prompt": f"Is it {i}?", "chosen": f" Yes, {i}!", "rejected": f" no {i} here"} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by_name", [True, False])
def test_a_new_adapter_is_trained_and_saved_and_the_base_stays_as_it_is(tmp_path, folder, by_name):
    model = str(folder) if by_name else AutoModelForCausalLM.from_pretrained(folder)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = PreferenceTrainer(
        model,
        config(tmp_path, objective="dpo", max_steps=3, learning_rate=1e-2),
        train_dataset=some_pairs(),
        peft_config=lora,
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        name for name in before if "lora_" in name
    }
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert isinstance(load_model(tmp_path / "saved"), peft.PeftModel)


def test_the_same_seed_starts_the_same_adapter(tmp_path, folder):
    def weights(seed: int) -> list:
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(len(str(seed)) + torch.randint(9, ()).item())
        trainer = PreferenceTrainer(
            model, config(tmp_path, objective="simpo", seed=seed), some_pairs(),
            peft_config=peft.LoraConfig(target_modules="all-linear"),
        )  # fmt: skip
        return [p for p in trainer.model.parameters() if p.requires_grad]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_an_adapter_that_cannot_be_added_is_refused(tmp_path, folder):
    model, settings = AutoModelForCausalLM.from_pretrained(folder), config(tmp_path, objective="simpo")
    with pytest.raises(UserError, match="peft_config is of type dict"):
        PreferenceTrainer(model, settings, some_pairs(), peft_config={"r": 4})
    with pytest.raises(UserError, match="virtual tokens"):
        PreferenceTrainer(model, settings, some_pairs(), peft_config=peft.PromptTuningConfig(num_virtual_tokens=2))
    lora = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UserError, match="has an adapter already"):
        PreferenceTrainer(peft.get_peft_model(model, lora), settings, some_pairs(), peft_config=lora)


def test_a_model_in_memory_finds_its_tokenizer_by_its_name(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = PreferenceTrainer(
        model, config(tmp_path, objective="simpo", max_steps=1), datasets.Dataset.from_list(TEXT)
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["", "nowhere/at-all"])
def test_a_model_without_a_tokenizer_says_how_to_pass_one(tmp_path, name):
    model = tiny_model("llama")
    model.config.name_or_path = name
    with pytest.raises(UserError, match="pass processing_class, such as") as caught:
        PreferenceTrainer(model, config(tmp_path, objective="simpo"), datasets.Dataset.from_list(TEXT))
    assert "\n" not in str(caught.value)


def test_nothing_that_a_trainer_saves_is_a_pickle_of_its_arguments(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = config(tmp_path, objective="simpo", max_steps=2, save_strategy="steps", save_steps=1)
    trainer = PreferenceTrainer(model, settings, some_pairs())
    trainer.train()
    trainer.save_model()
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert list(tmp_path.rglob("training_args.bin")) == []


@pytest.mark.parametrize(
    ("targets", "upper", "missing"),
    [(["q_proj", "nosuch"], 1.0, "nosuch"), (["q_prok"], 1.0, "q_prok"), (["nosuch", "v_proj"], 0.5, "nosuch")],
)
def test_every_name_of_target_modules_is_in_the_model(targets, upper, missing):
    with pytest.raises(UserError, match=f"it has no module '{missing}'"):
        new_adapter(tiny_model("llama"), LoraSettings(target_modules=targets, upper=upper))


def test_several_evaluation_sets_are_measured_under_their_names(tmp_path, folder):
    data = datasets.Dataset.from_list(TEXT)
    sets = {"easy": data.select(range(3)), "hard": data.select(range(3, 8))}
    settings = config(tmp_path, objective="dpo", max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = PreferenceTrainer(str(folder), settings, data, eval_dataset=sets)
    trainer.train()
    got = trainer.evaluate()
    assert any("eval_hard_loss" in row for row in trainer.state.log_history[:-2])
    for name, part in sets.items():
        alone = PreferenceTrainer(trainer.model, settings, data, eval_dataset=part, reference_is_start=False)
        assert got[f"eval_{name}_loss"] != alone.evaluate()["eval_loss"]  # its reference is the trained model
    before = PreferenceTrainer(str(folder), settings, data, eval_dataset=sets).evaluate()
    assert before["eval_easy_loss"] == pytest.approx(before["eval_hard_loss"]) == pytest.approx(0.6931, abs=1e-3)


def test_reference_log_probabilities_of_several_sets_go_by_name(tmp_path, folder):
    data = datasets.Dataset.from_list(TEXT)
    with pytest.raises(UserError, match="eval_reference_logps is"):
        PreferenceTrainer(
            str(folder),
            config(tmp_path, objective="dpo"),
            data,
            eval_dataset={"a": data},
            eval_reference_logps=some_pairs(),
        )


def frozen(folder):
    return load_model(folder, device="cpu")


def adapter_for_inference(folder, tmp_path):
    new = new_adapter(AutoModelForCausalLM.from_pretrained(folder), LoraSettings(r=2))
    new.save_pretrained(tmp_path / "adapter")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
@pytest.mark.parametrize("kind", ["frozen", "adapter"])
def test_a_model_of_which_nothing_is_trained_is_refused_before_its_pairs_are_read(tmp_path, folder, kind, objective):
    model = frozen(folder) if kind == "frozen" else adapter_for_inference(folder, tmp_path)
    with pytest.raises(UserError, match="no weight of the model requires a gradient"):
        PreferenceTrainer(model, config(tmp_path, objective=objective), some_pairs())
    assert "eval_loss" in PreferenceTrainer(
        model, config(tmp_path, objective=objective), eval_dataset=some_pairs()
    ).evaluate()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_that_are_trained_are_named(tmp_path, folder, dtype, monkeypatch, capfd):
    """Transformers loads in the types of the checkpoint: 31 of 46,800 weights changed in four steps at 5e-7."""
    monkeypatch.setattr("sepo.processes._logged", set())
    settings = config(tmp_path, objective="simpo")
    PreferenceTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), settings, some_pairs())
    said = f"the weights that are trained are {str(dtype).removeprefix('torch.')}, in which small updates round"
    assert said in capfd.readouterr().err
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj"])  # in float32 on any base
    PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), settings, some_pairs(), peft_config=adapters
    )
    PreferenceTrainer(AutoModelForCausalLM.from_pretrained(folder), settings, some_pairs())
    assert "small updates" not in capfd.readouterr().err
