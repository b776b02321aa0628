"""Checkpoints with other weights than their model: dry run and loading refuse them and name the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from sepo.errors import UserError
from sepo.models.names import check_model
from sepo.models.saving import save_model
from sepo.models.weights import load_model
from sepo.recipe.reading import parse_recipe
from sepo.runs.pipeline import check_inputs
from tiny_models import tiny_model, tiny_tokenizer

FILE = "model.safetensors"


def saved(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    save_model(tiny_model(kind, seed=seed), tiny_tokenizer(), folder)
    return folder


def saved_adapter(folder: Path, base: Path, config: peft.PeftConfig | None = None) -> Path:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), config or peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def change(folder: Path, file: str, edit) -> None:
    """Apply `edit` to the dictionary of a file of weights."""
    weights = edit(load_file(folder / file))
    save_file(weights, folder / file, metadata={"format": "pt"})


def without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


def renamed(key):
    return lambda weights: {f"{name}_old" if name == key else name: value for name, value in weights.items()}


def with_copy(key):
    return lambda weights: {**weights, f"{key}.old": weights[key].clone()}


def refused(name: Path | str, match: str) -> None:
    for check in (check_model, lambda name: load_model(name, device="cpu")):
        with pytest.raises(UserError, match=match) as error:
            check(name)
        assert "\n" not in str(error.value)


# In the ordinary run each model has one kind of damage.
ORDINARY_DAMAGE = {"llama": renamed, "llama_tied": without, "gpt2": without, "gemma3": renamed}


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param(kind, damage, marks=[] if damage is ordinary else pytest.mark.nightly)
        for kind, ordinary in ORDINARY_DAMAGE.items()
        for damage in (without, renamed)
    ],
)
@pytest.mark.daily(2)
def test_a_weight_that_is_not_there_is_named_whichever_it_is(tmp_path, kind, damage):
    whole = saved(tmp_path / "whole", kind)
    check_model(whole)
    for key in load_file(whole / FILE):
        broken = Path(shutil.copytree(whole, tmp_path / "broken", dirs_exist_ok=True))
        change(broken, FILE, damage(key))
        refused(broken, rf"lacks (lm_head.weight, )?{key}: they would be drawn at random")


@pytest.mark.parametrize(
    ("change_of_config", "match"),
    [
        ({"hidden_size": 64}, "in another size than config.json says"),
        ({"intermediate_size": 160}, r"mlp.down_proj.weight.* in another size .*\(48, 80\) against \(48, 160\)"),
        ({"vocab_size": 120}, "embed_tokens.weight.* in another size"),
        ({"num_key_value_heads": 4}, "k_proj.weight.* in another size"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.* and \d+ more: they would be drawn at random"),
        ({"num_hidden_layers": 1}, r"holds model.layers.1.*for which LlamaForCausalLM has no place"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_of_another_size_is_refused(tmp_path, change_of_config, match):
    folder = saved(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change_of_config}))
    refused(folder, match)


def test_biases_that_the_model_would_not_read_are_refused(tmp_path):
    folder = saved(tmp_path / "m")
    bias = "model.layers.0.self_attn.q_proj.bias"
    change(folder, FILE, lambda weights: {**weights, bias: torch.ones(48)})
    refused(folder, f"holds {bias}, for which LlamaForCausalLM has no place")


def test_an_adapter_among_the_weights_of_a_model_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    folder = saved(tmp_path / "m")
    wrapped = {key.removeprefix("base_model.model."): value.clone() for key, value in model.state_dict().items()}
    change(folder, FILE, lambda weights: {**weights, **{key: wrapped[key] for key in wrapped if "lora_" in key}})
    refused(folder, "an adapter among the weights of a whole model: merge it")


def test_a_head_beside_the_language_model_disturbs_nobody(tmp_path):
    folder = saved(tmp_path / "m")
    change(folder, FILE, lambda weights: {**weights, "v_head.summary.weight": torch.ones(1, 48)})
    check_model(folder)
    assert torch.equal(load_model(folder, device="cpu").lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_reward_model_is_no_language_model(tmp_path, auto):
    base = saved(tmp_path / "base")
    model = auto.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 0
    save_model(model, tiny_tokenizer(), tmp_path / "rm")
    refused(tmp_path / "rm", r"lacks lm_head.weight: .* is it a reward model or a classifier")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_that_no_quantization_explains_are_no_weights(tmp_path, dtype):
    whole = saved(tmp_path / "whole")
    packed = "model.layers.1.mlp.up_proj.weight"
    change(whole, FILE, lambda weights: {**weights, packed: (weights[packed] * 10).to(dtype)})
    refused(whole, f"holds {packed} as whole numbers")


def test_two_models_in_one_folder_are_refused(tmp_path):
    both = saved(tmp_path / "both", seed=1)
    adapter = saved_adapter(tmp_path / "adapter", saved(tmp_path / "base"))
    sharded = saved(tmp_path / "sharded")
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, both)
    refused(both, "holds two models, an adapter .* and the weights of a whole one")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, sharded)
    refused(sharded, "holds two models, model.safetensors and the shards")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_every_weight_of_an_adapter_is_read(tmp_path):
    whole = saved_adapter(tmp_path / "whole", saved(tmp_path / "base"))
    check_model(whole)
    load_model(whole, device="cpu")
    for key in load_file(whole / "adapter_model.safetensors"):
        broken = Path(shutil.copytree(whole, tmp_path / "broken", dirs_exist_ok=True))
        change(broken, "adapter_model.safetensors", without(key))
        refused(broken, rf"lacks (lm_head.weight, )?{key}: they would be drawn at random")
        shutil.copytree(whole, broken, dirs_exist_ok=True)
        change(
            broken,
            "adapter_model.safetensors",
            lambda weights, key=key: {**weights, f"{key}.old": weights[key].clone()},
        )
        refused(broken, f"holds {key}.old, for which its base has no place")
    change(
        broken,
        "adapter_model.safetensors",
        lambda _: {name: value[:2].clone() for name, value in load_file(whole / "adapter_model.safetensors").items()},
    )
    refused(broken, "in another size|does not fit its base model")


def test_the_base_of_an_adapter_is_checked_with_it(tmp_path):
    base = saved(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "adapter", base)
    change(base, FILE, without("lm_head.weight"))
    refused(adapter, "lacks lm_head.weight")


def test_an_adapter_whose_layers_the_base_has_not_is_refused(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", saved(tmp_path / "base"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query_key_value"]}))
    refused(adapter, "does not fit its base model")


@pytest.mark.parametrize("role", ["reference", "oracle", "policy"])
def test_the_dry_run_refuses_a_broken_model_in_every_role(tmp_path, role):
    good, broken = saved(tmp_path / "good"), saved(tmp_path / "broken", seed=1)
    change(broken, FILE, without("model.norm.weight"))
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "Is it red?", "chosen": "Yes, red.", "rejected": "No."}) + "\n")
    sections = {"reference": {"model": str(good)}, "oracle": {}, "policy": {}}
    sections[role]["model"] = str(broken)
    recipe = parse_recipe({"output_dir": str(tmp_path / "run"), "data": {"source": str(data)}, **sections}, "test")
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        check_inputs(recipe)
