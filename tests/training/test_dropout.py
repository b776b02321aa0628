"""Before training, the policy equals its reference: DPO's first loss is ln 2, for every kind of dropout."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PrinterCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pairs import config, some_pairs
from sepo.errors import UserError
from sepo.forward.scoring import dataset_logps
from sepo.models.adapters import new_adapter
from sepo.models.saving import save_model
from sepo.recipe.settings import LoraSettings, TrainingSettings
from sepo.training.fit import train_model
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate|jitter")
SIZES = {
    "vocab_size": 101, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "word_embed_proj_dim": 64,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "ffn_hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "rotary_dim": 4,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "init_std": 0.3,
}  # fmt: skip
# Common decoders, each with its own kind of dropout. `python tests/training/test_dropout.py` tries all of the library.
COMMON = [
    "biogpt", "bloom", "codegen", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "llama", "mixtral", "mpt", "olmo", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "seed_oss", "stablelm", "starcoder2", "xglm",
]  # fmt: skip


def noisy(model_type: str) -> PreTrainedModel:
    """A tiny model of an architecture with all dropout at 0.1."""
    cls = CONFIG_MAPPING[model_type]
    known = getattr(cls, "__dataclass_fields__", None) or inspect.signature(cls.__init__).parameters
    made = cls(**{name: value for name, value in SIZES.items() if name in known or name in cls.attribute_map})
    for name, value in vars(made).items():
        if NOISE.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(made, name, 0.1)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(made).parameters()) < 5e6, "not tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(made)


def first_loss(tmp_path, model: PreTrainedModel) -> float:
    settings = config(tmp_path, objective="dpo", learning_rate=1e-12, max_steps=1, disable_tqdm=True)
    trainer = PreferenceTrainer(model, settings, some_pairs(6))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMMON)
@pytest.mark.daily(5)
def test_the_first_loss_of_dpo_is_ln_2_with_all_noise_set(tmp_path, model_type):
    assert first_loss(tmp_path, noisy(model_type)) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "tdpo2"])
def test_a_reference_of_another_model_is_found_at_the_first_step(tmp_path, capfd, objective):
    table = some_pairs(6)
    other = dataset_logps(tiny_model("llama", seed=1), table)
    trainer = PreferenceTrainer(
        tiny_model("llama"), config(tmp_path, objective=objective, max_steps=1), table, reference_logps=other
    )
    trainer.train()
    assert "the reference is another model than the policy" in capfd.readouterr().err
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    settings = TrainingSettings(max_steps=1, batch_size=6)
    with pytest.raises(UserError, match="before training, the policy's log-probability of a response differs by"):
        train_model(
            str(tmp_path / "m"), table, tmp_path / "out", settings, reference_logps=other, device="cpu",
            objective=objective,
        )  # fmt: skip


def test_a_model_is_saved_as_it_was_configured(tmp_path):
    model = tiny_model("gpt2", resid_pdrop=0.1, attn_pdrop=0.2)
    trainer = PreferenceTrainer(model, config(tmp_path, max_steps=1), some_pairs(6))
    trainer.train()
    assert model.config.resid_pdrop == 0
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (saved.resid_pdrop, saved.attn_pdrop, saved.embd_pdrop) == (0.1, 0.2, 0.0)


def test_the_dropout_of_an_adapter_stays(tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        model = new_adapter(tiny_model("gpt2"), LoraSettings(r=4, dropout=dropout))
        trainer = PreferenceTrainer(model, config(tmp_path, objective="dpo", max_steps=3), some_pairs(6))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0][0] == losses[1][0] == pytest.approx(math.log(2), abs=1e-6)  # B is zero
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("types", ["bfloat16", "autocast"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_start_read_in_another_type_is_refused(tmp_path, types, seed):
    """Adapters on bfloat16 weights, or autocast: stored float32 log-probabilities do not fit, whichever model's."""
    table = some_pairs(6)
    stored = dataset_logps(tiny_model("llama", seed=seed), table)
    low = torch.bfloat16 if types == "bfloat16" else torch.float32
    model = new_adapter(tiny_model("llama", low), LoraSettings(r=4))
    settings = config(tmp_path, objective="dpo", max_steps=1, bf16=types == "autocast")
    with pytest.raises(UserError, match=r"reference_logps were computed in (dtype|autocast) .*training's types"):
        PreferenceTrainer(model, settings, table, reference_logps=stored, reference_is_start=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_start_read_in_the_types_of_the_training_is_used(tmp_path, seed):
    """Its first loss is ln 2; that of another model is refused."""
    table, model = some_pairs(6), new_adapter(tiny_model("llama", torch.bfloat16), LoraSettings(r=4))
    stored = dataset_logps(tiny_model("llama", torch.bfloat16, seed=seed), table)
    settings = config(tmp_path, objective="dpo", max_steps=1)
    trainer = PreferenceTrainer(model, settings, table, reference_logps=stored, reference_is_start=True)
    trainer.remove_callback(PrinterCallback)
    if seed:
        with pytest.raises(UserError, match="the reference is another model"):
            trainer.train()
        return
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("types", ["bfloat16", "autocast"])
@pytest.mark.parametrize("objective", ["dpo", "ipo", "tbpo", "selective_dpo"])
@pytest.mark.daily(3)
def test_a_reference_of_another_model_is_used_as_given_in_any_type(tmp_path, capfd, types, objective):
    table, low = some_pairs(6), torch.bfloat16 if types == "bfloat16" else torch.float32
    other = dataset_logps(tiny_model("llama", seed=1), table)
    losses = []
    for dtype, bf16 in ((torch.float32, False), (low, types == "autocast")):
        settings = config(tmp_path, objective=objective, max_steps=1, bf16=bf16, disable_tqdm=True)
        trainer = PreferenceTrainer(tiny_model("llama", dtype), settings, table, reference_logps=other)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    own = PreferenceTrainer(tiny_model("llama", low), settings, table)
    assert np.abs(own.train_dataset.reference - trainer.train_dataset.reference).max() > 1
    assert capfd.readouterr().err.count("they are used as they are") == 1


def test_the_dropout_of_any_adapter_is_the_users(tmp_path):
    """The adapter's weights are not zero, so its dropout changes the output; the model is accepted all the same."""
    adapter = peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], vera_dropout=0.5, d_initial=2.0)
    model = peft.get_peft_model(tiny_model("llama"), adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    trainer = PreferenceTrainer(model, config(tmp_path, max_steps=1), some_pairs(4))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.state.global_step == 1


if __name__ == "__main__":
    import sys
    import tempfile
    from pathlib import Path

    for model_type in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = noisy(model_type)
        except Exception as error:
            print(f"{model_type:28} not made: {type(error).__name__}: {str(error)[:80]}".replace("\n", " "), flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{model_type:28} {first_loss(Path(folder), model):.7f}", flush=True)
            except Exception as error:
                kind = "refused" if isinstance(error, UserError) else type(error).__name__
                print(f"{model_type:28} {kind}: {str(error)[:150]}".replace("\n", " "), flush=True)
