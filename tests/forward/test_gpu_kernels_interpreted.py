"""The GPU's Triton kernels on a CPU, by Triton's interpreter: their arithmetic, forward and backward.

tests/cuda tests what needs a GPU: speed, half-precision matmuls, the compiled kernels.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sepo.kernels import layers_cuda, lm_head_cuda, rotary

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested in tests/cuda")


def laid_out(x, how):
    """`x` in another memory layout; "broadcast" repeats its first row."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided":
        return torch.stack([x, torch.full_like(x, 77)], dim=-1)[..., 0]
    if how == "broadcast":
        return x[:1].expand_as(x)
    return x


LAYOUTS = ("transposed", "strided", "broadcast")


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", ["one for all", *LAYOUTS])
@pytest.mark.daily(6)
def test_rotary_embedding_with_angles_in_any_memory_layout(monkeypatch, how, batch, length):
    """Without `position_ids` a model makes one row of angles for the whole batch; a generation step has one token."""
    monkeypatch.setattr(layers_cuda, "available", lambda x: True)
    torch.manual_seed(0)
    query, key = torch.randn(batch, 6, length, 24), torch.randn(batch, 2, length, 24)
    angles = torch.randn(2, 1 if how == "one for all" else batch, length, 24)
    cos, sin = (laid_out(x, how) for x in angles)
    fused = rotary._rotary(apply_rotary_pos_emb)
    for one, other in zip(fused(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", LAYOUTS)
def test_norms_and_gates_of_tensors_in_any_memory_layout(how):
    torch.manual_seed(0)
    x, up, upstream = (laid_out(x, how) for x in torch.randn(3, 7, 4, 33))
    weight = laid_out(torch.randn(33, 2), how)[:, 0]
    plain = [x.contiguous(), weight.contiguous(), upstream.contiguous(), up.contiguous()]
    results = []
    for a, w, g, b in ((x, weight, upstream, up), plain):
        y, inverses = layers_cuda.norm_forward(a, w, 1e-5, 0.0, torch.float32)
        gated = layers_cuda.gated_forward("silu", a, b)
        backward = layers_cuda.gated_backward("silu", a, b, g, product=True)
        results.append([y, *layers_cuda.norm_backward(a, w, inverses, g, 0.0), gated, *backward])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_block_of_logits_in_any_memory_layout(how):
    torch.manual_seed(0)
    raw, targets, upstream = laid_out(torch.randn(5, 300), how), torch.tensor([3, 299, 17, 210, 0]), torch.randn(5)
    if how != "transposed":
        targets, upstream = laid_out(targets, how), laid_out(upstream, how)
    results = []
    for logits, ids, grads in (
        (raw, targets, upstream),
        (raw.contiguous(), targets.contiguous(), upstream.contiguous()),
    ):
        target_logits = torch.zeros(5)
        shift, sums, _ = lm_head_cuda.block_forward(logits, ids, target_logits, 0, 1.0, None, None)
        normalisers = sums.log() + shift
        gradient = lm_head_cuda.block_backward(
            logits.clone(), ids, None, normalisers, grads, 0, 1.0, None, torch.float32
        )
        results.append([shift, sums, target_logits, gradient])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("keep", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cap", [None, 8.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.daily(6)
def test_a_block_of_logits_is_reduced_and_turned_into_its_gradient(scale, cap, keep):
    torch.manual_seed(0)
    raw = 6 * torch.randn(5, 2500)
    raw[0, 100:200] = -torch.inf
    targets = torch.tensor([3, 2499, 17, 2100, 0])
    target_logits = torch.zeros(5)
    wide = raw.double().requires_grad_()
    logits = wide * scale if cap is None else cap * torch.tanh(wide * scale / cap)
    plain = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    upstream = torch.randn(5)
    plain.backward(upstream.double())

    shift, sums, kept = lm_head_cuda.block_forward(raw.clone(), targets, target_logits, 0, scale, cap, keep)
    normalisers = sums.log() + shift
    torch.testing.assert_close(target_logits - normalisers, plain.float(), atol=1e-5, rtol=0)
    gradient = lm_head_cuda.block_backward(
        raw.clone() if kept is None else kept, targets, None if kept is None else shift, normalisers, upstream, 0,
        scale, cap, keep or torch.float32,
    )  # fmt: skip
    tolerance = 1e-2 if keep == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), wide.grad.nan_to_num(), atol=tolerance, rtol=0)


def test_a_block_without_its_target_and_one_of_only_minus_infinity():
    raw = torch.stack([torch.randn(300), torch.full((300,), -torch.inf)])
    target_logits = torch.full((2,), 7.0)
    shift, sums, _ = lm_head_cuda.block_forward(raw, torch.tensor([5, 900]), target_logits, 300, 1.0, None, None)
    assert target_logits.tolist() == [7.0, 7.0]  # both targets are in other blocks
    torch.testing.assert_close(sums[0].log() + shift[0], raw[0].logsumexp(0))
    assert sums[1] == 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    torch.manual_seed(0)
    x, weight, upstream = 2 * torch.randn(37, 100), torch.randn(100), torch.randn(37, 100)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (wide_weight + offset)
    plain.backward(upstream.double())
    got, inverses = layers_cuda.norm_forward(x, weight, 1e-5, offset, torch.float32)
    d_x, d_weight = layers_cuda.norm_backward(x, weight, inverses, upstream, offset)
    for one, other in ((got, plain), (d_x, wide.grad), (d_weight, wide_weight.grad)):
        torch.testing.assert_close(one.double(), other.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation):
    torch.manual_seed(0)
    gate, up, upstream = torch.randn(3, 7, 333).unbind(0)
    wide = [x.double().requires_grad_() for x in (gate, up)]
    act = torch.nn.functional.silu if activation == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")
    plain = act(wide[0]) * wide[1]
    plain.backward(upstream.double())
    inputs = gate.contiguous(), up.contiguous()
    got = layers_cuda.gated_forward(activation, *inputs)
    d_gate, d_up, again = layers_cuda.gated_backward(activation, *inputs, upstream.contiguous(), product=True)
    for one, other in ((got, plain), (d_gate, wide[0].grad), (d_up, wide[1].grad), (again, plain)):
        torch.testing.assert_close(one.double(), other.detach(), atol=1e-5, rtol=0)


def test_the_fused_rotary_embedding_has_the_values_and_gradients_of_the_models(monkeypatch):
    monkeypatch.setattr(layers_cuda, "available", lambda x: True)
    torch.manual_seed(0)
    query = torch.randn(2, 5, 6, 24).transpose(1, 2).requires_grad_()
    key = torch.randn(2, 5, 2, 24).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    results = []
    for function in (apply_rotary_pos_emb, rotary._rotary(apply_rotary_pos_emb)):
        outputs = function(query, key, cos, sin)
        results.append([*outputs, *torch.autograd.grad([x.sin().sum() for x in outputs], (query, key))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert outputs[0].transpose(1, 2).is_contiguous()  # the memory layout that the flash kernel reads
