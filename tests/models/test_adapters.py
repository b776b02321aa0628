"""Adapters of every kind in PEFT, with weights that have an effect: same results as PEFT, or refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from pairs import config as trainer_config
from pairs import some_pairs
from sepo.errors import UserError
from sepo.evaluate.generate import generate_responses
from sepo.forward.scoring import dataset_logps
from sepo.models.adapters import check_lora, new_adapter
from sepo.models.names import check_model, load_config, resolve_model
from sepo.models.saving import save_model
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

# Settings that a kind needs to fit a tiny Llama.
NEEDS = {
    "ADALORA": {"total_step": 10, "target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "FOURIERFT": {"n_frequency": 20, "target_modules": ["q_proj"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]},
    "BONE": {"r": 4, "target_modules": ["q_proj"]},
    "MISS": {"r": 4, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 4, "target_modules": ["q_proj"]},
    "HRA": {"r": 4, "target_modules": ["q_proj"]},
    "ROAD": {"group_size": 4, "target_modules": ["q_proj"]},
    "VBLORA": {"num_vectors": 4, "vector_length": 4, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 20, "target_modules": ["q_proj"]},
    "SHIRA": {"r": 4, "target_modules": ["q_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [5, 40, 41], "target_modules": ["embed_tokens"]},
    "XLORA": {"adapters": {}},
    "CPT": {"cpt_token_ids": [4, 40, 41], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
}
PROMPTS = {"num_virtual_tokens": 4, "target_modules": ["q_proj", "v_proj"], "r": 4}
LORA = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "biases": {"bias": "all"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole norms": {"modules_to_save": ["input_layernorm"]},
    "tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 40, 41]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


# Kinds outside of the layers, or with an additional forward pass.
NOT_OF_THE_LAYERS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "llama_tied"):
        save_model(tiny_model(kind), tiny_tokenizer(), folder / kind)
    return {kind: folder / kind for kind in ("llama", "llama_tied")}


def saved_adapter(base: Path, config: peft.PeftConfig, folder: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def own_logps(folder: Path, table) -> torch.Tensor:
    """Log-probabilities of the responses from PEFT's forward."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    parts = []
    for row in table.to_pylist():
        for side in ("chosen_ids", "rejected_ids"):
            tokens = torch.tensor([[*row["prompt_ids"], *row[side]]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0, -len(row[side]) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, torch.tensor(row[side])[:, None])[:, 0])
    return torch.cat(parts)


def our_logps(folder: Path, table) -> torch.Tensor:
    return values_of(dataset_logps(load_model(folder, device="cpu"), table))


def values_of(columns) -> torch.Tensor:
    rows = zip(columns.column("chosen_logps").to_pylist(), columns.column("rejected_logps").to_pylist(), strict=True)
    return torch.tensor([value for row in rows for side in row for value in side])


def computed_or_refused(base: Path, config: peft.PeftConfig, folder: Path) -> str:
    table = some_pairs(4)
    try:
        saved_adapter(base, config, folder)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        pytest.skip(f"PEFT itself does not make or save it: {error}")
    try:
        ours = our_logps(folder, table)
    except UserError as error:
        return f"refused: {error}"
    torch.testing.assert_close(ours, own_logps(folder, table), atol=2e-4, rtol=1e-4)
    check_model(folder)
    try:
        save_model(load_model(folder, device="cpu"), None, folder / "merged", merge_adapter=True)
    except UserError as error:
        return f"computed, not merged: {error}"
    torch.testing.assert_close(our_logps(folder / "merged", table), ours, atol=2e-3, rtol=1e-3)
    return "computed and merged"


def config_of(kind: str) -> peft.PeftConfig:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = inspect.signature(cls).parameters
    return cls(
        task_type="CAUSAL_LM", **{key: value for key, value in PROMPTS.items() if key in known} | NEEDS.get(kind, {})
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
@pytest.mark.daily(7)
def test_an_adapter_of_any_kind_is_computed_as_peft_does_or_refused(tmp_path, bases, kind):
    try:
        config = config_of(kind)
    except (ValueError, TypeError, ImportError) as error:
        pytest.skip(f"not made from defaults: {error}")
    outcome = computed_or_refused(bases["llama_tied"], config, tmp_path / "adapter")
    assert outcome.startswith("refused") == (kind in NOT_OF_THE_LAYERS), outcome


# In the ordinary run a form has both bases only where it touches the embedding or the head.
BOTH_BASES = {kind for kind, form in LORA.items() if any(word in repr(form) for word in ("embed", "head", "token"))}
FORMS = [
    pytest.param(kind, base, marks=[] if base == "llama_tied" or kind in BOTH_BASES else pytest.mark.nightly)
    for kind in LORA
    for base in ("llama", "llama_tied")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "base"), FORMS)
@pytest.mark.daily(3)
def test_lora_in_any_form_is_computed_as_peft_does_and_merged(tmp_path, bases, base, kind):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **LORA[kind])
    assert computed_or_refused(bases[base], config, tmp_path / "adapter") == "computed and merged"


def test_a_prompt_adapter_is_refused_before_anything_is_loaded(tmp_path, bases):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    saved_adapter(bases["llama"], config, tmp_path / "prefix")
    for check in (check_model, lambda folder: load_model(folder, device="cpu")):
        with pytest.raises(UserError, match=r"\(PREFIX_TUNING\) changes the model's input"):
            check(tmp_path / "prefix")


BEYOND_WEIGHTS = {
    "alora": ({"alora_invocation_tokens": [4]}, "invocation tokens"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "other adapters"),
    "random": ({"sample_at_inference": True}, "random numbers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BEYOND_WEIGHTS)
def test_an_adapter_that_acts_by_position_or_by_other_adapters_is_refused_in_every_role(tmp_path, bases, kind):
    """As oracle, reference, start, judge (they read a folder) and where a model is in memory."""
    settings, reason = BEYOND_WEIGHTS[kind]
    made_by_peft = settings if kind == "alora" else {}  # the others need more adapters, or another kind of layer
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **made_by_peft)
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model = peft.get_peft_model(base, config)
    for name, value in settings.items():
        setattr(model.peft_config["default"], name, value)
    folder = tmp_path / kind
    model.save_pretrained(folder)
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**stored, **settings}))
    for read in (
        check_model,
        resolve_model,
        load_config,
        lambda folder: load_model(folder, device="cpu"),
        lambda folder: load_model(folder, device="cpu", train=True),
        lambda folder: load_model(bases["llama"], device="cpu", adapter=folder),
        lambda folder: check_lora(str(folder), LoraSettings(), "policy.lora"),
        lambda folder: dataset_logps(model, some_pairs(4)),
        lambda folder: PreferenceTrainer(model, trainer_config(tmp_path, objective="simpo"), some_pairs(4)),
        lambda folder: generate_responses(model, tiny_tokenizer(), [[5, 6]], max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=reason) as refused:
            read(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_on_the_upper_layers_are_those_of_a_pattern_and_no_others(architecture):
    """Same modules, same first weights, and no gradient below them."""
    layers = tiny_model(architecture).config.num_hidden_layers
    upper = new_adapter(tiny_model(architecture), LoraSettings(r=2, upper=1 / layers), seed=3)
    names = {name for name, parameter in upper.named_parameters() if parameter.requires_grad}
    assert names
    assert all(f".{layers - 1}." in name for name in names)
    everywhere = new_adapter(tiny_model(architecture), LoraSettings(r=2), seed=3)
    of_all = {name for name, parameter in everywhere.named_parameters() if parameter.requires_grad}
    assert names == {name for name in of_all if f".{layers - 1}." in name}
    one = "q_proj" if architecture == "llama" else "c_attn"
    few = new_adapter(tiny_model(architecture), LoraSettings(r=2, upper=1 / layers, target_modules=[one]))
    assert len([name for name, parameter in few.named_parameters() if parameter.requires_grad]) == 2
    with pytest.raises(ValueError, match="pattern names the layers itself"):
        LoraSettings(upper=0.5, target_modules=".*q_proj")


def lora_model(base: Path, name: str = "default", **settings) -> peft.PeftModel:
    """A base with an adapter that changes it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "v_proj"], **settings})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=name)
    return changed(model)


def changed(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def one_of_two(base: Path) -> peft.PeftModel:
    model = lora_model(base)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    return changed(model)


def after_a_third(base: Path) -> peft.PeftModel:
    model = one_of_two(base)
    model.add_adapter("third", model.peft_config["default"])
    return model


MANY = {
    "the second of two": one_of_two,
    "the second of three": after_a_third,
    "a name of its own": lambda base: lora_model(base, "mine"),
    "a name with a dot": lambda base: lora_model(base, "v1_2"),
    "merged into its base and not unloaded": lambda base: merged_in_place(lora_model(base)),
}


def merged_in_place(model: peft.PeftModel) -> peft.PeftModel:
    model.merge_adapter()
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("merge", [False, True])
def test_the_adapter_that_is_active_is_saved_whatever_its_name(tmp_path, bases, kind, merge):
    """PEFT saves all adapters, each with another name than "default" in a folder that is not read."""
    model, table = MANY[kind](bases["llama"]), some_pairs(4)
    before = in_memory(model, table)
    save_model(model, None, tmp_path / "saved", merge_adapter=merge)
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    torch.testing.assert_close(our_logps(tmp_path / "saved", table), before, atol=1e-4, rtol=1e-4)


def in_memory(model, table) -> torch.Tensor:
    return values_of(dataset_logps(model, table))


@pytest.mark.filterwarnings("ignore")
def test_several_active_adapters_are_merged_or_refused(tmp_path, bases):
    model, table = one_of_two(bases["llama"]), some_pairs(4)
    model.base_model.set_adapter(["default", "second"])
    before = in_memory(model, table)
    with pytest.raises(UserError, match="default, second are active"):
        save_model(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_model(model, None, tmp_path / "merged", merge_adapter=True)
    torch.testing.assert_close(our_logps(tmp_path / "merged", table), before, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_adapters_is_told_to_name_one(tmp_path, bases):
    lora_model(bases["llama"], "mine").save_pretrained(tmp_path / "saved")
    for read in (check_model, lambda folder: load_model(folder, device="cpu")):
        with pytest.raises(UserError, match="adapters are in its folders mine: name one"):
            read(tmp_path / "saved")
    assert check_model(tmp_path / "saved" / "mine") is not None


# Starts of LoRA: those that change the base must do it in the same way when the adapter is read, or be refused.
STARTS = ["pissa", "olora", "orthogonal", "gaussian", "eva", False, "pissa_niter_4", "corda", "lora_ga"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.daily(4)
def test_an_adapter_that_changes_its_base_is_read_again_as_it_was_trained_or_refused(tmp_path, bases, start):
    base, table = AutoModelForCausalLM.from_pretrained(bases["llama"]), some_pairs(4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=start)
    arguments = trainer_config(tmp_path, objective="simpo")
    if start in ("pissa_niter_4", "corda", "lora_ga"):
        with pytest.raises(UserError, match=r"cannot be repeated|does not fit the model"):
            PreferenceTrainer(base, arguments, table, peft_config=config)
        return
    trainer = PreferenceTrainer(base, arguments, table, peft_config=config)
    model = changed(trainer.model)
    save_model(model, None, tmp_path / "saved")
    torch.testing.assert_close(our_logps(tmp_path / "saved", table), in_memory(model, table), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_transformers_are_checked_as_those_of_peft(tmp_path, bases):
    """`AutoModelForCausalLM.from_pretrained(ADAPTER)` gives no PeftModel."""
    lora_model(bases["llama"], alora_invocation_tokens=[4]).save_pretrained(tmp_path / "alora")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alora")
    with pytest.raises(UserError, match="invocation tokens"):
        dataset_logps(model, some_pairs(2))
    lora_model(bases["llama"]).save_pretrained(tmp_path / "plain")
    model, table = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), some_pairs(4)
    torch.testing.assert_close(in_memory(model, table), own_logps(tmp_path / "plain", table), atol=1e-4, rtol=1e-4)
    for merge in (False, True):
        with pytest.raises(UserError, match="added by Transformers"):
            save_model(model, None, tmp_path / "saved", merge_adapter=merge)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [96, 104])
def test_an_adapter_with_embeddings_of_another_vocabulary_is_refused_before_it_is_loaded(tmp_path, bases, size):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(size)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    with pytest.raises(UserError, match=f"of {size} tokens, but its base has 101"):
        check_model(tmp_path / "saved")


def test_a_peft_config_that_does_not_fit_is_one_line(tmp_path):
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["nosuch"]),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="nosuch"),
    ):
        with pytest.raises(UserError, match="peft_config does not fit the model") as caught:
            PreferenceTrainer(tiny_model("llama"), trainer_config(tmp_path), some_pairs(2), peft_config=config)
        assert "\n" not in str(caught.value)
