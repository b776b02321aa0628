"""Models with fewer layers, for all architectures and as the reference of a recipe."""

from __future__ import annotations

import json

import pytest
import torch

from sepo.api import run_recipe
from sepo.errors import UserError
from sepo.models.names import check_model, load_config
from sepo.models.saving import save_model
from sepo.models.shrink import layers_kept, shrink_model
from sepo.models.weights import load_model
from sepo.recipe.reading import parse_recipe
from sepo.runs.pipeline import check_inputs
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer


def saved(folder, kind, **changes):
    save_model(tiny_model(kind, **changes), tiny_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2", "gpt_neox"])
def test_the_remaining_layers_keep_their_weights_and_order(tmp_path, kind):
    kinds = {"layer_types": ["full_attention"] * 5} if getattr(CONFIGS[kind](), "layer_types", None) else {}
    whole = saved(tmp_path / "whole", kind, num_hidden_layers=5, **kinds)
    assert shrink_model(whole, 3, tmp_path / "cut") == [0, 2, 4]
    check_model(tmp_path / "cut")
    before, after = load_model(whole, device="cpu"), load_model(tmp_path / "cut", device="cpu")
    assert load_config(tmp_path / "cut").num_hidden_layers == 3
    for place, index in enumerate([0, 2, 4]):
        theirs = before.get_decoder().layers[index].state_dict()
        assert all(
            torch.equal(value, theirs[name]) for name, value in after.get_decoder().layers[place].state_dict().items()
        )
    ids = torch.tensor([[1, 4, 40, 50, 2, 5]])
    written = [after.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)  # each layer has its own entry of the cache


def test_layers_of_two_kinds_keep_their_kinds(tmp_path):
    whole = saved(tmp_path / "whole", "gemma3")  # window, full, window
    assert shrink_model(whole, 2, tmp_path / "cut") == [0, 2]
    assert load_config(tmp_path / "cut").layer_types == ["sliding_attention", "sliding_attention"]


def test_impossible_numbers_and_models_without_a_list_of_layers_are_refused(tmp_path):
    whole = saved(tmp_path / "whole", "llama")
    for layers in (1, 3):
        with pytest.raises(UserError, match=f"reference.layers is {layers}: expected 2 to 2"):
            layers_kept(load_config(whole), layers)
    with pytest.raises(UserError, match="has no list of layers"):
        shrink_model(saved(tmp_path / "gpt2", "gpt2"), 2, tmp_path / "cut")


def test_a_recipe_trains_an_oracle_of_some_layers_and_a_policy_of_all(tmp_path):
    whole = saved(tmp_path / "whole", "llama", num_hidden_layers=4)
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i} {i}.", "rejected": f"No {i}."} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"batch_size": 4, "learning_rate": 1e-2}
    values = {
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"source": str(data), "as_chat": True, "held_out": 2},
        "reference": {"model": str(whole), "layers": 2},
        "oracle": {"training": training},
        "policy": {"model": str(whole), "training": training},
        "eval": {"prompts": 1, "max_new_tokens": 4},
    }
    run_recipe(parse_recipe(values, "test"))
    layers = {
        name: load_config(tmp_path / "run" / name).num_hidden_layers for name in ("reference", "oracle", "policy")
    }
    assert layers == {"reference": 2, "oracle": 2, "policy": 4}
    del values["policy"]["model"]
    with pytest.raises(UserError, match=r"set policy\.model, the model to align"):
        check_inputs(parse_recipe(values, "test"))
