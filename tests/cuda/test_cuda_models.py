"""Whole models on a GPU: values and gradients against a plain float64 forward, training, scoring, generation."""

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from pairs import awkward_pairs, pairs_table, plain_logps
from sepo.evaluate.generate import generate_responses
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack, pad
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps
from sepo.kernels.gradients import gradients_in_place
from sepo.models.adapters import new_adapter
from sepo.recipe.settings import LoraSettings
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

NAMES = ("llama", "llama_tied", "qwen3", "gemma3", "mistral", "gpt2", "phi3", "cohere")
# Relative error of each weight's gradient, and error of a log-probability in nats.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.12, 0.4)}


def gradients(model, logps, weights):
    model.zero_grad()
    (logps * weights.to(logps)).sum().backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def agree(name, precision, layout="packed", in_place=False, checkpointing=False, **changes):
    pairs = awkward_pairs()
    # The weights' variance is smaller than on a CPU, because bfloat16's error grows with it.
    plain_model = tiny_model(name, dtype=torch.float64, **changes)
    model = tiny_model(name, **changes).cuda()
    assert prepare_model(model, layout) == layout
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    expected = plain_logps(plain_model, pairs)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=len(expected)))
    wanted = gradients(plain_model, expected, weights)
    batch = {"packed": pack, "padded": pad}[layout](pairs).to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"), gradients_in_place(in_place):
        got = token_logps(model, batch)
        got_gradients = gradients(model, got, weights)
    value_tolerance, gradient_tolerance = TOLERANCE[precision][1], TOLERANCE[precision][0]
    worst = (got.double().cpu() - expected).abs().max().item()
    assert worst < value_tolerance, f"log-probabilities differ by {worst}"
    assert got_gradients.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        error = (got_gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < gradient_tolerance, f"gradient of {parameter} differs by {error}"


NARROW = {"initializer_range": 0.1}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, precision):
    agree(name, precision, **(NARROW if precision == "bfloat16" else {}))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["llama_tied", "gemma3"])
def test_gradients_added_in_place(name, precision):
    agree(name, precision, in_place=True, **NARROW)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_residual_stream_wide_enough_for_norms_in_half_precision(name, in_place):
    agree(name, "bfloat16", in_place=in_place, hidden_size=512, initializer_range=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_half_precision_weights(name):
    """Scoring may use them; compared with float64 on the same rounded weights."""
    pairs = awkward_pairs()
    model = tiny_model(name, dtype=torch.bfloat16, **NARROW).cuda()
    assert prepare_model(model) == "packed"
    expected = plain_logps(tiny_model(name, dtype=torch.bfloat16, **NARROW).double(), pairs)
    with torch.no_grad():
        got = token_logps(model, pack(pairs).to("cuda"))
    assert (got.double().cpu() - expected).abs().max().item() < 0.4


@pytest.mark.parametrize("in_place", [False, True])
def test_activation_checkpointing(in_place):
    agree("llama", "bfloat16", in_place=in_place, checkpointing=True, **NARROW)


def test_the_padded_layout():
    agree("llama", "float32", layout="padded")


def test_an_adapter_gets_its_gradients():
    model = new_adapter(tiny_model("llama"), LoraSettings(r=4)).cuda()
    prepare_model(model, "packed")
    batch = pack(awkward_pairs()).to("cuda")
    with torch.autocast("cuda", torch.bfloat16), gradients_in_place():
        token_logps(model, batch).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) > 4
    assert all(grad is not None for grad in grads.values())
    assert any(bool(grad.abs().max() > 0) for grad in grads.values())


def test_rows_of_different_lengths_give_the_same_bits_again():
    model = tiny_model("llama").cuda()
    pairs = awkward_pairs()
    prepare_model(model)
    with torch.autocast("cuda", torch.bfloat16):
        first = [token_logps(model, pack(pairs[i : i + 2]).to("cuda")) for i in range(4)]
        again = [token_logps(model, pack(pairs[i : i + 2]).to("cuda")) for i in range(4)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


def test_scores_are_those_of_a_cpu():
    pairs = pairs_table(awkward_pairs())
    here, there = (dataset_logps(tiny_model("llama").to(device), pairs).to_pylist() for device in ("cuda", "cpu"))
    for one, two in zip(here, there, strict=True):
        for side in ("chosen_logps", "rejected_logps"):
            np.testing.assert_allclose(one[side], two[side], atol=1e-4)


def colours():
    def turn(role, text):
        return [{"role": role, "content": text}]

    words = ("red", "green", "blue", "pink", "grey", "black", "white")
    rows = [
        {
            "prompt": turn("user", f"Is it {word}?"),
            "chosen": turn("assistant", f"Yes, {word}!"),
            "rejected": turn("assistant", f"No {word} here."),
        }
        for word in words
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_dpo_starts_at_ln_2_and_learns(tmp_path, name, bf16):
    config = PreferenceConfig(
        str(tmp_path), objective="dpo", learning_rate=3e-3, max_steps=8, per_device_train_batch_size=7, bf16=bf16,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, tokens_per_row=64,
    )  # fmt: skip
    model = tiny_model(name, initializer_range=0.1)
    trainer = PreferenceTrainer(model, config, train_dataset=colours(), processing_class=tiny_tokenizer())
    assert trainer.args.n_gpu == 1
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert abs(losses[0] - math.log(2)) < (5e-3 if bf16 else 1e-6)
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize(
    ("name", "with_positions"),
    [("gpt2", True), *((name, given) for name in ("llama", "qwen3", "gemma3") for given in (True, False))],
)
def test_a_prepared_model_generates_the_same_on_a_gpu_and_a_cpu(monkeypatch, name, with_positions):
    """Also without `position_ids`, which a wrapper with hidden arguments does not get: padding then shifts positions,
    which does not change rotary attention.
    """
    prompts = [[1, 9, 12], [1, 40, 41, 42, 43], [1, *range(20, 34)]]
    written = []
    for device in ("cpu", "cuda"):
        model = tiny_model(name).to(device)
        prepare_model(model)
        if not with_positions:
            forward = model.forward
            monkeypatch.setattr(model, "forward", lambda *args, forward=forward, **kwargs: forward(*args, **kwargs))
        written.append(
            generate_responses(model, tiny_tokenizer(), prompts, samples=2, max_new_tokens=6, seed=3, progress=False)
        )
    for one, other in zip(*written, strict=True):
        assert one.response_ids == other.response_ids
        assert one.logps == pytest.approx(other.logps, abs=1e-3)


class Writes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        prompts = [[1, 9, 12], [1, 40, 41, 42, 43]]
        self.seen = generate_responses(model, tiny_tokenizer(), prompts, max_new_tokens=6, progress=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_generates_in_the_middle_of_its_training(tmp_path, bf16):
    model, writes = tiny_model("llama").cuda(), Writes()
    config = PreferenceConfig(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", bf16=bf16)
    PreferenceTrainer(
        model, config, train_dataset=colours(), processing_class=tiny_tokenizer(), callbacks=[writes]
    ).train()
    assert all(np.isfinite(one.logps).all() for one in writes.seen)
