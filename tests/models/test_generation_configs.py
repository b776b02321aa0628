"""A generation config that Transformers would refuse to save after the training is mended, or refused, before it."""

import json
import shutil

import peft
import pytest
from transformers import GenerationConfig

from pairs import some_pairs
from sepo import processes
from sepo.errors import UserError
from sepo.models.names import check_model
from sepo.models.saving import save_model
from sepo.models.weights import load_model
from sepo.recipe.settings import TrainingSettings
from sepo.training.fit import train_model
from tiny_models import tiny_model, tiny_tokenizer

# What is in the file, and what is left of it.
MENDED = {
    "padding": ({"pad_token_id": -1}, {"pad_token_id": 0}),
    "beams": ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}, {"early_stopping": None}),
    "sampling": ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9}),
    "sampling and padding": ({"temperature": 0.9, "pad_token_id": -1}, {"do_sample": True, "temperature": 0.9}),
    "scores": ({"output_scores": True}, {"output_scores": None}),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": False}, {"return_dict_in_generate": False}),
    "cache": ({"use_cache": False, "cache_implementation": "static"}, {"use_cache": False}),
}
REFUSED = {
    "tokens": {"max_new_tokens": -5}, "words": {"max_new_tokens": "many"}, "cache": {"cache_implementation": "a"},
    "stopping": {"early_stopping": "maybe"}, "sequences": {"num_return_sequences": 4},
    "mark": {"watermarking_config": {"a": 7}},
}  # fmt: skip


def with_values(folder, target, values, kind="whole"):
    shutil.copytree(folder / kind, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny_model("llama"), tiny_tokenizer(), folder / "whole")
    adapted = peft.get_peft_model(
        load_model(folder / "whole", device="cpu"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "whole")
    save_model(adapted, tiny_tokenizer(), folder / "adapter")
    return folder


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("case", MENDED)
@pytest.mark.daily(2)
def test_values_that_cannot_be_saved_are_left_out_and_named_before_the_training(
    models, tmp_path, case, kind, capsys, monkeypatch
):
    monkeypatch.setattr(processes, "_logged", set())
    values, left = MENDED[case]
    folder = with_values(models, tmp_path / "m", values, kind)
    check_model(folder)
    said = capsys.readouterr().err
    assert ("cannot be saved" in said) == (case != "sampling")
    settings = TrainingSettings(batch_size=4, max_steps=1)
    for _ in range(2):
        train_model(str(folder), some_pairs(4), tmp_path / "out", settings, device="cpu", objective="simpo")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    saved.validate(strict=True)
    assert {key: getattr(saved, key) for key in left} == left


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_be_read_are_refused_in_one_line(models, tmp_path, case, kind):
    folder = with_values(models, tmp_path / "m", REFUSED[case], kind)
    for read in (check_model, lambda folder: load_model(folder, device="cpu", train=True)):
        with pytest.raises(UserError) as refused:
            read(folder)
        assert "\n" not in str(refused.value)
