"""What trains is what was tried: under the training's autocast, with a backward pass."""

import pytest
import torch

from pairs import config, some_pairs
from sepo import processes
from sepo.errors import UserError
from sepo.kernels.attention_cpu import BlockAttention
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model


def fails_in_half_precision(monkeypatch, where):
    """Break the packed kernel where a trial in float32, without gradients, does not come."""
    forward, backward = BlockAttention.forward, BlockAttention.backward

    def broken_forward(ctx, query, *args):
        if where == "error" and query.dtype == torch.bfloat16:
            raise RuntimeError("no kernel for\nbfloat16")
        output = forward(ctx, query, *args)
        return output * 3 if where == "numbers" and query.dtype == torch.bfloat16 else output

    def broken_backward(ctx, *grads):
        if where == "backward":
            raise RuntimeError("no backward kernel")
        results = backward(ctx, *grads)
        return (results[0] * torch.nan, *results[1:]) if where == "gradients" else results

    monkeypatch.setattr(BlockAttention, "forward", staticmethod(broken_forward))
    monkeypatch.setattr(BlockAttention, "backward", staticmethod(broken_backward))


@pytest.mark.parametrize("objective", ["simpo", "dpo", "tdpo2"])
@pytest.mark.parametrize("where", ["error", "numbers", "backward", "gradients"])
@pytest.mark.daily(2)
def test_a_kernel_that_fails_only_in_training_is_found_before_the_first_step(
    tmp_path, monkeypatch, capsys, where, objective
):
    monkeypatch.setattr(processes, "_logged", set())
    fails_in_half_precision(monkeypatch, where)
    settings = config(tmp_path, objective=objective, max_steps=1, bf16=True)
    model = tiny_model("llama")
    trainer = PreferenceTrainer(model, settings, some_pairs(6))
    assert trainer.data_collator.layout == "padded"
    assert capsys.readouterr().err.count("cannot be trained in packed rows") == 1
    trainer.train()
    settings.layout = "packed"
    with pytest.raises(UserError, match="cannot be trained in packed rows"):
        PreferenceTrainer(tiny_model("llama"), settings, some_pairs(6))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt2", "cohere"])
def test_models_that_train_keep_their_layout_and_have_no_gradient_left(tmp_path, name, bf16):
    model = tiny_model(name)
    trainer = PreferenceTrainer(model, config(tmp_path, objective="simpo", bf16=bf16), some_pairs(6))
    assert trainer.data_collator.layout == "packed"
    assert all(parameter.grad is None for parameter in model.parameters())
