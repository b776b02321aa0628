"""Edges of a training: no logged loss, negative token weights, checkpoints of another number of processes."""

import json

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pairs import awkward_pairs, config, plain_logps, some_pairs
from sepo import processes
from sepo.data.tables import make_table
from sepo.errors import UserError
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.models.saving import save_model
from sepo.recipe.settings import TrainingSettings
from sepo.training.checkpoints import last_checkpoint
from sepo.training.fit import train_model
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer


def test_a_training_without_a_logged_loss_is_not_done_again(tmp_path, capsys):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    settings = TrainingSettings(batch_size=4, max_steps=1)
    made = train_model(str(tmp_path / "m"), some_pairs(4), tmp_path / "out", settings, device="cpu", objective="simpo")
    state = tmp_path / "out" / "trainer_state.json"
    stored = json.loads(state.read_text())
    stored["results"]["loss"] = None
    state.write_text(json.dumps(stored))
    again = train_model(str(tmp_path / "m"), some_pairs(4), tmp_path / "out", settings, device="cpu", objective="simpo")
    assert again == {**made, "loss": None}
    assert "reused" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0, -1e-3])
def test_token_rewards_of_any_sign_pass_the_check_of_the_start(tmp_path, scale):
    pairs = some_pairs(6)
    columns = {name: pairs.column(name) for name in pairs.column_names}
    for side in ("chosen", "rejected"):
        ids = pairs.column(f"{side}_ids").to_pylist()
        columns[f"{side}_positions"] = [list(range(len(row))) for row in ids]
        columns[f"{side}_weights"] = [[scale * (1 + i % 3) for i in range(len(row))] for row in ids]
    table = make_table("selection", columns)
    settings = config(tmp_path, objective="tgdpo", max_steps=1)
    trainer = PreferenceTrainer(tiny_model("llama"), settings, table)
    trainer.reference_is_start = True
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_checkpoints_of_deepspeed_with_another_number_of_processes_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(processes, "size", lambda: 4)
    assert last_checkpoint(tmp_path, {"a": 1}) is None
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir()
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(UserError, match="of 4 processes, and DeepSpeed cannot continue them with 2"):
        last_checkpoint(tmp_path, {"a": 1})
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()
    assert last_checkpoint(tmp_path, {"a": 2}) is None  # other settings: removed as before


@pytest.mark.parametrize("kind", ["hyperclovax", "granite"])
def test_logits_that_are_multiplied_or_divided_by_their_scale_are_reproduced(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "initializer_range": 0.3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "logits_scaling": 4.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    with torch.no_grad():
        expected = plain_logps(model, awkward_pairs())
        assert prepare_model(model) == "packed"
        torch.testing.assert_close(token_logps(model, pack(awkward_pairs())), expected, atol=1e-3, rtol=0)
