"""Layers that replace a model's own: same values, same gradients, same names and weights."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import spawn
from pairs import awkward_pairs, plain_logps
from sepo.forward.logps import last_mlp, rows_only, token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.kernels import gradients, layers
from sepo.kernels.gradients import gradients_in_place, matmul_nt, may_accumulate_in_place
from sepo.kernels.layers import FastEmbedding, FastGatedMLP, FastLinear, FastRMSNorm, use_fast_layers
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings
from tiny_models import TINY_MODELS, tiny_model

# The models with a replaced MLP, and with replaced norms, on a CPU.
GATED = {"llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "cohere", "granite"}
WITH_RMS_NORM = GATED - {"cohere"} | {"phi3"}


def kinds(model):
    return {kind for kind in (FastLinear, FastRMSNorm, FastGatedMLP) for m in model.modules() if isinstance(m, kind)}


def backward(model, pairs, in_place, dtype=None):
    """Gradients of a fixed loss, accumulated over two packed rows."""
    model.zero_grad()
    for row in (pairs[:3], pairs[3:]):
        with gradients_in_place(in_place), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logps = token_logps(model, pack(row))
            weights = torch.linspace(-1, 2, len(logps))
            (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.daily(3)
def test_gradients_in_place_are_those_of_autograd(name):
    model = TINY_MODELS[name]()
    prepare_model(model)
    expected = backward(model, awkward_pairs(), in_place=False)
    assert_same_gradients(backward(model, awkward_pairs(), in_place=True), expected)


def test_the_expected_layers_are_in_place():
    for name in TINY_MODELS:
        model = tiny_model(name)
        assert prepare_model(model) == "packed"
        expected = {FastGatedMLP} if name in GATED else set()
        expected |= {FastRMSNorm} if name in WITH_RMS_NORM else set()
        expected |= {FastLinear} if name != "gpt2" else set()
        assert kinds(model) == expected, name
        assert isinstance(model.get_input_embeddings(), FastEmbedding)


def test_names_weights_and_generation_stay(tmp_path):
    plain, model = tiny_model("gemma3"), tiny_model("gemma3")
    prepare_model(model)
    assert next(type(m).__name__ for m in model.modules() if isinstance(m, FastRMSNorm)) == "Gemma3RMSNorm"
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    clone = copy.deepcopy(model)
    assert kinds(clone) == kinds(model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "eps"), [(LlamaRMSNorm, 1e-5), (Gemma3RMSNorm, 1e-6), (nn.RMSNorm, None)])
def test_norms_agree_in_values_and_gradients(kind, eps):
    torch.manual_seed(0)
    norm = kind(24, eps=eps)
    with torch.no_grad():
        norm.weight.add_(torch.randn(24))
    holder = _holder(norm)
    x = torch.randn(3, 7, 24) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    x[0, 0] = 0  # a row of zeros: the divisor is sqrt(eps)
    use_fast_layers(holder)
    assert isinstance(norm, FastRMSNorm)
    plain = _double(kind, norm, eps)
    results = []
    for module, one in ((norm, x.clone().requires_grad_()), (plain, x.double().requires_grad_())):
        out = module(one)
        results.append((out, *torch.autograd.grad((out * out.cos()).sum(), (one, module.weight))))
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-6)  # rows of very different size
        torch.testing.assert_close(got.double() / scale, expected / scale, atol=1e-5, rtol=0)


def _double(kind, norm, eps):
    """The formula in float64 (the library's classes always compute in float32)."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(norm.weight.detach().double())

        def forward(self, x):
            small = torch.finfo(torch.float32).eps if eps is None else eps
            offset = 1.0 if kind is Gemma3RMSNorm else 0.0
            return x / (x.square().mean(-1, keepdim=True) + small).sqrt() * (self.weight + offset)

    return Plain()


def _holder(module):
    """A tiny model with one more module in it."""
    model = tiny_model("gpt2")
    model.extra = module
    return model


@pytest.mark.parametrize("frozen", [(), ("first",), ("first", "second")])
def test_the_output_of_a_norm_is_recomputed_and_not_kept(frozen):
    torch.manual_seed(0)
    layer = nn.ModuleDict(
        {"norm": LlamaRMSNorm(24), "first": nn.Linear(24, 16, bias=False), "second": nn.Linear(24, 8)}
    )
    for name in frozen:
        layer[name].requires_grad_(False)
    plain = copy.deepcopy(layer)
    use_fast_layers(_holder(layer))
    x = torch.randn(2, 16, 24)

    def run(layer, x, times):
        normed = layer["norm"](x)
        loss = (layer["first"](normed).cos().sum() + layer["second"](normed).square().sum()).clone()
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        for _ in range(times):
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True)
        return normed, gradients

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        normed, got = run(layer, x.clone().requires_grad_(), times=2)
    assert not any(tensor.shape[-1] == 24 and torch.equal(tensor.flatten(), normed.flatten()) for tensor in saved)
    assert getattr(normed, layers._MADE_OF)[0].rows is None  # the last reader has dropped it
    _, expected = run(plain, x.clone().requires_grad_(), times=1)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_frozen_weights_keep_no_input():
    """With LoRA most weights are frozen: the backward pass does not need their inputs."""
    layer = FastLinear(24, 16).requires_grad_(False)
    x = torch.randn(20, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum().backward()
    assert [tuple(tensor.shape) for tensor in saved] == [(16, 24)]
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(20, 24))


def test_a_norm_that_does_something_else_is_left_alone():
    class TwiceRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class BiasedRMSNorm(LlamaRMSNorm):
        def __init__(self, size):
            super().__init__(size)
            self.bias = nn.Parameter(torch.ones(size))

        def forward(self, hidden_states):
            return super().forward(hidden_states) + self.bias

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

    for norm in (TwiceRMSNorm(8), BiasedRMSNorm(8), GatedRMSNorm(8)):
        use_fast_layers(_holder(norm))
        assert not isinstance(norm, FastRMSNorm)
        assert not hasattr(norm, "weight_offset")


def test_an_mlp_that_does_something_else_is_left_alone():
    mlp = copy.deepcopy(tiny_model("llama").model.layers[0].mlp)
    mlp.act_fn = nn.ReLU()
    use_fast_layers(_holder(mlp))
    assert isinstance(mlp.up_proj, FastLinear)
    assert not isinstance(mlp, FastGatedMLP)


def test_an_adapter_put_on_later_is_used_and_frozen_weights_get_no_gradient():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    prepare_model(model)
    before = token_logps(model, pack(awkward_pairs())).detach()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    after = token_logps(adapted, pack(awkward_pairs()))
    assert (after - before).abs().max() > 1e-2
    expected = backward(adapted, awkward_pairs(), in_place=False)
    got = backward(adapted, awkward_pairs(), in_place=True)
    assert all("lora" in name for name in got)
    assert len(got) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert_same_gradients(got, expected)


def test_lora_from_the_loader_trains_in_place_as_by_autograd(tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu", train=True, lora=LoraSettings(r=4))
    prepare_model(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = backward(model, awkward_pairs(), in_place=False)
    assert_same_gradients(backward(model, awkward_pairs(), in_place=True), expected)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(name):
    model = tiny_model(name)
    prepare_model(model)
    expected = backward(model, awkward_pairs(), in_place=False)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(backward(model, awkward_pairs(), in_place=True), expected)


def test_bfloat16_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    model = tiny_model("llama_tied")
    prepare_model(model)
    exact = backward(model, awkward_pairs(), in_place=False)
    expected = backward(model, awkward_pairs(), in_place=False, dtype=torch.bfloat16)
    got = backward(model, awkward_pairs(), in_place=True, dtype=torch.bfloat16)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    # Not to the last digit: the sum of two rows is rounded once instead of twice.
    assert_same_gradients(got, expected, tolerance=0.02)
    error = max(float((got[n] - g).abs().max() / g.abs().max()) for n, g in exact.items())
    assert 1e-4 < error < 0.3


def test_copies_of_weights_last_one_step_only():
    model = tiny_model("llama")
    prepare_model(model)
    pairs = awkward_pairs()
    first = backward(model, pairs, in_place=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected = backward(model, pairs, in_place=False, dtype=torch.bfloat16)
    second = backward(model, pairs, in_place=True, dtype=torch.bfloat16)
    assert_same_gradients(second, expected, tolerance=0.02)
    with pytest.raises(AssertionError):
        assert_same_gradients(second, first, tolerance=0.02)


def test_the_embedding_leaves_its_padding_line_alone():
    embedding = nn.Embedding(9, 4, padding_idx=2)
    ids, weights = torch.tensor([[2, 3, 3], [8, 2, 0]]), torch.randn(2, 3, 4)
    (embedding(ids) * weights).sum().backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    embedding.__class__ = FastEmbedding
    with gradients_in_place():
        (embedding(ids) * weights).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, expected)
    assert not embedding.weight.grad[2].any()


def test_hooks_on_weights_keep_gradients_in_autograd():
    model = tiny_model("llama")
    assert may_accumulate_in_place(model)
    handle = next(model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    assert not may_accumulate_in_place(model)
    handle.remove()
    next(model.parameters()).register_hook(lambda gradient: gradient)
    assert not may_accumulate_in_place(model)


def test_rows_only_computes_the_given_rows_and_removes_its_hooks():
    model = tiny_model("llama")
    mlp = last_mlp(model)
    assert mlp is model.model.layers[-1].mlp
    x, rows = torch.randn(1, 12, 48, requires_grad=True), torch.tensor([2, 3, 9])
    with rows_only(mlp, rows):
        out = mlp(x)
    torch.testing.assert_close(out[:, rows], mlp(x)[:, rows])
    assert not out[:, [0, 1, 4, 5, 6, 7, 8, 10, 11]].any()
    assert mlp(x)[:, 0].any()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0].any(1).nonzero()[:, 0].tolist() == rows.tolist()


def test_matmuls_of_either_library_agree_with_float64(monkeypatch):
    torch.manual_seed(0)
    x, w = torch.randn(40, 30), torch.randn(20, 30)
    for has_onednn in (True, False):
        if not has_onednn:
            monkeypatch.setattr(gradients, "_has_onednn", lambda: False)
        for rows in (0, 1, 15, 16, 40):
            expected = x[:rows].double() @ w.double().t()
            torch.testing.assert_close(matmul_nt(x[:rows], w).double(), expected, atol=1e-4, rtol=0)
        # a transposed view, as in the backward pass
        torch.testing.assert_close(matmul_nt(x, w.t().contiguous().t()), x @ w.t(), atol=1e-4, rtol=0)


def test_a_model_in_lower_precision_keeps_its_own_layers():
    model = tiny_model("llama", dtype=torch.bfloat16)
    prepare_model(model)
    assert kinds(model) == set()
    batch = pack(awkward_pairs())
    expected = token_logps(tiny_model_on(model), batch)
    torch.testing.assert_close(token_logps(model, batch), expected, atol=0.5, rtol=0)


def tiny_model_on(model):
    wide = copy.deepcopy(model).float()
    prepare_model(wide)
    return wide


# In a process of its own, without the memory of other tests. It multiplies once before the model is prepared, as a
# program would that first uses the library for something else.
MANY_LENGTHS = """
import importlib, sys
import sepo.kernels
importlib.reload(sepo.kernels)  # the process imported it with other variables
import numpy as np, psutil, torch
from sepo.forward.packing import Pair, pack
torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 40, 16))
torch.ops.mkldnn._linear_pointwise(torch.ones(20, 30), torch.ones(40, 30), None, "none", [], "")
from pairs import random_ids
from sepo.forward.logps import token_logps
from sepo.forward.prepare import prepare_model
from tiny_models import tiny_model

model = tiny_model("llama")
prepare_model(model)
rng = np.random.default_rng(0)

def passes(lengths):
    for length in lengths:
        pair = Pair(0, random_ids(rng, length), random_ids(rng, 5), random_ids(rng, 3))
        with torch.no_grad():
            token_logps(model, pack([pair]))
    return psutil.Process().memory_info().rss

before = passes(range(20, 120))
print(passes(range(120, 120 + int(sys.argv[1]))) - before)
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_rows_of_many_lengths_leave_no_memory_behind(nightly_run):
    """oneDNN caches compiled code by shape; scoring rows of every length must not use ever more memory."""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = spawn.run(["-c", MANY_LENGTHS, "500" if nightly_run else "200"], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 40e6  # 200 MB with oneDNN's default limit of 1,024 shapes


IN_PLACE = {"norm": LlamaRMSNorm, "mlp": LlamaMLP, "linear": nn.Linear, "embedding": nn.Embedding}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.daily(4)
def test_outputs_that_a_model_changes_in_place_have_the_right_gradients(kind, in_place):
    def changed(model):
        for module in model.modules():
            if isinstance(module, IN_PLACE[kind]) and module is not model.lm_head:
                module.register_forward_hook(lambda module, inputs, output: output.mul_(1.5))
        return model

    plain, model = changed(tiny_model("llama")), changed(tiny_model("llama"))
    assert prepare_model(model) == "packed"
    assert any(isinstance(module, FastRMSNorm) for module in model.modules())
    pairs = awkward_pairs()
    got = backward(model, pairs, in_place)
    for row in (pairs[:3], pairs[3:]):
        logps = plain_logps(plain, row)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    assert_same_gradients(got, {name: p.grad for name, p in plain.named_parameters()}, tolerance=1e-4)


def test_a_gated_mlp_with_its_activation_under_another_name_is_used_for_few_rows_too():
    class Other(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.activation_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.activation_fn(self.gate_proj(x)) * self.up_proj(x))

    mlp = Other(copy.deepcopy(tiny_model("llama").model.layers[0].mlp))
    x = {rows: torch.randn(1, rows, 48) for rows in (1, 3, 40)}
    expected = {rows: mlp(values) for rows, values in x.items()}
    use_fast_layers(_holder(mlp))
    assert isinstance(mlp, FastGatedMLP)
    for rows, values in x.items():
        torch.testing.assert_close(mlp(values), expected[rows])
