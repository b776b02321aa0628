"""Machines where GPU kernels cannot be built, and modules that the fast classes do not reproduce."""

import pytest
import torch
from torch import nn

from pairs import awkward_pairs, plain_logps
from sepo import processes
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.kernels import layers, layers_cuda
from sepo.kernels.layers import use_fast_layers
from tiny_models import tiny_model


def no_compiler(*args, **kwargs):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_kernel_that_cannot_be_built_leaves_the_models_own_layers_and_is_said_once(capsys, monkeypatch, architecture):
    """A CPU that passes for a GPU: no kernel runs there."""
    monkeypatch.setattr(processes, "_logged", set())
    monkeypatch.setattr(layers_cuda, "available", lambda x: True)
    for name in ("norm_forward", "gated_forward", "rotate"):
        monkeypatch.setattr(layers_cuda, name, no_compiler)
    for _ in range(2):
        model = tiny_model(architecture)
        kinds = {name: type(module) for name, module in model.named_modules()}
        assert prepare_model(model) == "packed"
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                assert type(module) is kinds[name]
    said = capsys.readouterr().err
    assert said.count("cannot be built") == said.count("\n") == 1
    with torch.no_grad():
        got = token_logps(model, pack(awkward_pairs()))
        torch.testing.assert_close(got, plain_logps(tiny_model(architecture), awkward_pairs()), atol=1e-4, rtol=0)


def test_a_kernel_is_tried_once_a_process(capsys, monkeypatch):
    monkeypatch.setattr(processes, "_logged", set())
    monkeypatch.setattr(layers_cuda, "norm_forward", no_compiler)
    layers_cuda.can_build.cache_clear()
    try:
        assert not any(layers_cuda.can_build(torch.device("cpu")) for _ in range(3))
    finally:
        layers_cuda.can_build.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1


class ClampedMLP(nn.Module):
    """A gated MLP that clamps large values, as gpt-oss does."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(("limit", "fast"), [(1.0, False), (7.0, False), (30.0, False), (float("inf"), True)])
def test_an_mlp_that_clamps_is_not_replaced(limit, fast):
    torch.manual_seed(0)
    model = tiny_model("llama")
    model.model.layers[0].mlp = ClampedMLP(limit)
    use_fast_layers(model)
    assert isinstance(model.model.layers[0].mlp, layers.FastGatedMLP) == fast
