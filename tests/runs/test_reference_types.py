"""The reference of a training is read once, in the types of the training, and stored as any other stage."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

import tiny_run
from pairs import some_pairs
from sepo.api import run_recipe
from sepo.cli import main
from sepo.data.tables import make_table, provenance_of, read_table, write_table
from sepo.errors import Interrupted
from sepo.models import devices
from sepo.models.adapters import new_adapter
from sepo.models.saving import save_model
from sepo.recipe.reading import load_recipe
from sepo.recipe.settings import LoraSettings, PolicySettings, TrainingSettings
from sepo.stages import logps
from sepo.stages.logps import logps_pass
from sepo.training import fit, trainer
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

RECIPE = """
device: cpu
data: {source: FOLDER/prefs.jsonl, as_chat: true, held_out: 4}
reference: {model: FOLDER/model}
oracle: {training: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 4, bf16: true}}
policy: {objective: dpo, training: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 4, bf16: true}}
eval: {prompts: 0, examples: 0}
"""


def losses(folder) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_a_run_that_is_interrupted_reads_the_reference_once_in_each_type(tmp_path, monkeypatch):
    tiny_run.prepare(tmp_path, RECIPE.replace("FOLDER", str(tmp_path)))
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'run'}"])
    read, again = [], logps.logps_of_parts
    step, stops = PreferenceTrainer.training_step, [("oracle", 1), ("oracle", 2), ("policy", 1)]

    def counted(model, parts, **settings):
        for tables in again(model, parts, **settings):
            read.append((sum(map(len, tables)), torch.is_autocast_enabled("cpu")))
            yield tables

    def interrupted(self, *arguments, **keywords):
        if (str(self.args.output_dir).split("/")[-2], self.state.global_step) in stops[:1]:
            del stops[0]
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **keywords)

    def never(*arguments):
        raise AssertionError("a trainer reads its reference itself")

    monkeypatch.setattr(logps, "logps_of_parts", counted)
    monkeypatch.setattr(trainer, "_logps_of_start", never)
    monkeypatch.setattr(PreferenceTrainer, "training_step", interrupted)
    for _ in range(3):
        with pytest.raises(Interrupted):
            run_recipe(recipe)
    run_recipe(recipe)
    assert not stops
    names = ["reference", "oracle_start", "oracle"]
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert [name for name in stages if name.endswith("_logps")] == [f"{name}_logps" for name in names]
    assert [one for one in read if one[0] == 20] == [(20, False), (20, True), (20, False)]
    tables = [read_table(tmp_path / "run" / "logps" / name, "logps") for name in names]
    assert [provenance_of(table).get("autocast") for table in tables] == [None, "bfloat16", None]
    for model in ("oracle", "policy"):
        first, *_, last = losses(tmp_path / "run" / model)
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert last != first


def test_a_training_by_a_command_reads_its_reference_once_through_interruptions(tmp_path, monkeypatch):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")
    pairs = some_pairs(12)
    everything = {
        f"{side}_{part}": [value(len(ids)) for ids in pairs.column(f"{side}_ids").to_pylist()]
        for side in ("chosen", "rejected")
        for part, value in (("positions", lambda n: list(range(n))), ("weights", lambda n: [1.0] * n))
    }
    columns = {name: pairs.column(name).to_pylist() for name in pairs.column_names}
    write_table(tmp_path / "selection", make_table("selection", columns | everything, provenance_of(pairs)))
    command = ["train", "--policy", tmp_path / "model", "--selection", tmp_path / "selection", "--out",
               tmp_path / "out", "--objective", "dpo", "--device", "cpu", "max_steps=3", "batch_size=4"]  # fmt: skip
    read, again, step = [], logps.logps_of_parts, PreferenceTrainer.training_step
    stops = [1, 2]

    def counted(model, parts, **settings):
        read.append(1)
        yield from again(model, parts, **settings)

    def interrupted(self, *arguments, **keywords):
        if self.state.global_step in stops[:1]:
            del stops[0]
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(logps, "logps_of_parts", counted)
    monkeypatch.setattr(PreferenceTrainer, "training_step", interrupted)
    codes = [main([str(word) for word in command]) for _ in range(3)]
    assert codes == [130, 130, 0]
    assert len(read) == 1
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "selection"]


@pytest.mark.parametrize("bf16_is_fast", [False, True])
@pytest.mark.parametrize("policy", [
    {}, {"training": {"bf16": True}}, {"training": {"bf16": False}}, {"training": {"arguments": {"bf16": True}}},
    {"lora": {"r": 4}}, {"lora": {"r": 4}, "training": {"bf16": True}}, {"adapter": True},
])  # fmt: skip
@pytest.mark.daily(3)
def test_the_types_of_a_training_are_known_before_it_starts(tmp_path, monkeypatch, policy, bf16_is_fast):
    """Its stored reference is accepted, and the first loss is ln 2. Where bfloat16 is fast, adapters train on it."""
    monkeypatch.setattr(devices, "fast_bfloat16", lambda device: bf16_is_fast)
    monkeypatch.setattr(fit, "fast_bfloat16", lambda device: bf16_is_fast)
    model, pairs = tmp_path / "model", some_pairs(12)
    save_model(tiny_model("llama"), tiny_tokenizer(), model)
    if policy.get("adapter"):
        model = tmp_path / "adapter"
        start = new_adapter(tiny_model("llama"), LoraSettings(r=4))
        start.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
        start.save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    training = TrainingSettings(max_steps=1, batch_size=12, **policy.get("training", {}))
    settings = PolicySettings(objective="dpo", training=training, lora=policy.get("lora"))
    write_table(tmp_path / "pairs", pairs, rows_per_shard=5)
    types = fit.training_types(settings, str(model), "cpu")
    logps_pass(str(model), tmp_path / "pairs", tmp_path / "logps", device="cpu", types=types)
    stored = read_table(tmp_path / "logps", "logps")
    results = fit.train_model(
        str(model), pairs, tmp_path / "out", training, reference_logps=stored, lora=settings.lora, device="cpu",
        objective="dpo",
    )  # fmt: skip
    assert results["loss"] == pytest.approx(math.log(2), abs=2e-3)
