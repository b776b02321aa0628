"""A seed determines the result to the byte, for full models and adapters, uninterrupted or resumed."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from transformers import TrainerCallback

from pairs import some_pairs
from sepo.files import file_digest
from sepo.models.saving import save_model
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings, TrainingSettings
from sepo.training.fit import train_model
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trained(folder, model, seed=0, stop=None, lora=None):
    settings = TrainingSettings(
        batch_size=4, num_train_epochs=2, learning_rate=1e-2, save_minutes=1e-9 if stop else 0, warmup_ratio=0
    )
    arguments = {"lora": lora, "seed": seed, "device": "cpu", "objective": "dpo"}
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train_model(str(model), some_pairs(14), folder, settings, callbacks=[Stop(stop)], **arguments)
    results = train_model(str(model), some_pairs(14), folder, settings, **arguments)
    assert results["steps"] == 8
    return file_digest(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoraSettings(r=4), marks=pytest.mark.nightly), LoraSettings(r=4, dropout=0.2)]
)
def test_a_seed_gives_the_same_bytes_undisturbed_and_continued(tmp_path, lora, nightly_run):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    one = trained(tmp_path / "one", tmp_path / "m", lora=lora)
    assert trained(tmp_path / "two", tmp_path / "m", lora=lora) == one
    assert trained(tmp_path / "other", tmp_path / "m", lora=lora, seed=1) != one
    # At and after the incomplete batch that ends the first epoch.
    for step in (4, 6) if nightly_run else (4,) if lora is None else (6,):
        assert trained(tmp_path / f"stopped-{step}", tmp_path / "m", lora=lora, stop=step) == one


def test_a_new_adapter_is_drawn_from_its_seed_and_leaves_the_random_state(tmp_path):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    before = torch.random.get_rng_state()

    def drawn(seed):
        model = load_model(tmp_path / "m", device="cpu", lora=LoraSettings(r=4), seed=seed, train=True)
        return [p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n]

    one, two, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_shorter_than_its_logging_has_a_loss_all_the_same(tmp_path):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    settings = TrainingSettings(batch_size=7, learning_rate=1e-9, arguments={"logging_steps": 10}, save_minutes=0)
    results = train_model(
        str(tmp_path / "m"), some_pairs(14), tmp_path / "out", settings, device="cpu", objective="dpo"
    )
    assert results["steps"] == 2
    assert results["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_finished_training_gives_its_memory_back(tmp_path, monkeypatch):
    """Without waiting for the cyclic garbage collector, which is off here."""
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    models = []

    class Remember(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            models.append(weakref.ref(model))

    settings = TrainingSettings(batch_size=7, learning_rate=1e-3, save_minutes=0)
    gc.disable()
    try:
        train_model(
            str(tmp_path / "m"), some_pairs(14), tmp_path / "out", settings, device="cpu", objective="dpo",
            callbacks=[Remember()],
        )  # fmt: skip
        assert models[0]() is None
    finally:
        gc.enable()


def test_a_run_of_one_step_takes_it(tmp_path):
    """Warm-up, a share of the steps rounded up, would give the only step a learning rate of 0."""
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    settings = TrainingSettings(batch_size=14, learning_rate=1e-2, save_minutes=0)
    train_model(str(tmp_path / "m"), some_pairs(14), tmp_path / "out", settings, device="cpu", objective="dpo")
    before, after = (load_model(tmp_path / name, device="cpu").lm_head.weight for name in ("m", "out"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(("minutes", "written"), [(10.0, 0), (1e-9, 3)])
def test_the_last_step_writes_no_checkpoint_beside_the_model(tmp_path, monkeypatch, minutes, written):
    """The checkpoint would be three times as large as the model, which is saved right after it."""
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    saved = []
    save = PreferenceTrainer._save_checkpoint

    def watched(self, *arguments, **settings):
        saved.append(self.state.global_step)
        return save(self, *arguments, **settings)

    monkeypatch.setattr(PreferenceTrainer, "_save_checkpoint", watched)
    settings = TrainingSettings(batch_size=4, max_steps=4, save_minutes=minutes)
    train_model(str(tmp_path / "m"), some_pairs(14), tmp_path / "out", settings, device="cpu", objective="simpo")
    assert len(saved) == written
    assert (tmp_path / "out" / "model.safetensors").is_file()
