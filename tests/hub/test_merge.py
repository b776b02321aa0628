"""`sepo merge`: the whole model computes what the adapter computes, and older readers understand its config."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sepo.cli import main
from sepo.models.saving import save_model, with_older_rotary
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

TOKENS = torch.tensor([[1, 40, 41, 60, 61, 70]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base in bfloat16 with its tokenizer, and an adapter of it with a generation config of its own."""
    folder = tmp_path_factory.mktemp("merge")
    save_model(tiny_model("llama_tied", dtype=torch.bfloat16), tiny_tokenizer(), folder / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    GenerationConfig(eos_token_id=[2, 5], max_new_tokens=7).save_pretrained(folder / "adapter")
    return folder / "adapter"


@torch.no_grad()
def logps(model):
    return model.eval().float()(input_ids=TOKENS).logits.log_softmax(-1)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_merged_model_computes_what_the_adapter_computes_and_is_whole(adapter, tmp_path, dtype, capsys):
    out = tmp_path / "whole"
    options = [] if dtype is None else ["--dtype", dtype]
    assert main(["merge", "--adapter", str(adapter), "--out", str(out), "--device", "cpu", *options]) == 0
    assert f"merged model: {out}" in capsys.readouterr().out
    expected = logps(peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == (torch.bfloat16 if dtype is None else torch.float32)  # as the base is stored
    torch.testing.assert_close(logps(merged), expected, atol=0.1 if dtype is None else 1e-4, rtol=0)
    assert merged.generation_config.eos_token_id == [2, 5]
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    assert not (out / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--adapter": "base"}, "there is nothing to merge"),
        ({"--out": "adapter"}, "is the model that is read"),
        ({"--out": "base"}, "is the model that is read"),
        ({"--out": ""}, "holds files, which the merged model would replace"),
        ({"--base": "nowhere"}, "no such model"),
        ({"--base": "adapter"}, "is an adapter itself"),
        ({"--dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"--device": "tpu"}, "device 'tpu'"),
    ],
)
def test_what_cannot_be_merged_ends_in_one_line(adapter, tmp_path, capsys, change, says):
    folder = shutil.copytree(adapter.parent, tmp_path / "all")
    options = {"--adapter": "adapter", "--out": "whole", "--base": "base"} | change
    words = [str(folder / word) if name in ("--adapter", "--out", "--base") else word for name, word in options.items()]
    assert main(["merge", *(word for pair in zip(options, words, strict=True) for word in pair)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "whole").exists()


OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}


@pytest.mark.parametrize("architecture", [*CONFIGS, "scaled"])
def test_a_saved_config_has_the_rotary_settings_under_their_older_names_too(architecture, tmp_path):
    """The older names alone give the same settings: of `rope_parameters` older releases read nothing."""
    scaled = architecture == "scaled"
    model = tiny_model("llama", rope_parameters=SCALED) if scaled else tiny_model(architecture)
    save_model(model, None, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    rotary = AutoConfig.from_pretrained(tmp_path / "model").to_dict().get("rope_parameters")
    assert rotary == model.config.to_dict().get("rope_parameters")
    if rotary is None:
        assert not set(OLDER) & set(stored)
        return
    older = {key: value for key, value in stored.items() if key != "rope_parameters"}
    assert type(model.config).from_dict(older).to_dict()["rope_parameters"] == rotary
    assert len(set(OLDER) & set(stored)) >= 2
    if scaled:
        assert stored["rope_theta"] == 5e5
        assert stored["rope_scaling"]["factor"] == 4.0


def test_rotary_settings_are_added_inside_a_text_config_and_replace_nothing():
    inner = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_theta": 7.0}
    assert with_older_rotary({"text_config": inner}) == {"text_config": {**inner, "rope_scaling": None}}
    assert with_older_rotary({"model_type": "gpt2"}) == {"model_type": "gpt2"}
