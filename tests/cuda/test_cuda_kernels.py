"""The GPU's kernels against plain float64: attention over packed rows and the LM head, values and gradients."""

from functools import partial

import pytest
import torch

from pairs import attention_inputs, many_rows
from sepo.forward import attention
from sepo.kernels import attention_cuda, layers, layers_cuda, lm_head
from sepo.kernels.gradients import gradients_in_place

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def relative(got, expected):
    return ((got.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compare_attention(call, row, dtype, heads=(6, 2), dim=64, window=None, softcap=None):
    query, key, value, layout = attention_inputs(row, *heads, dim)
    expected = attention.plain_packed_attention(query, key, value, layout, 0.2, window, softcap)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in (query, key, value)]
    got = call(*inputs, layout, 0.2, window, softcap)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert relative(got, expected) < TOLERANCE[dtype]
    for one, other in zip(torch.autograd.grad(got, inputs, upstream.to("cuda", dtype)), gradients, strict=True):
        assert relative(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_flash(dtype, window, row):
    compare_attention(attention_cuda.packed_attention, many_rows()[row], dtype, window=window)


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
@pytest.mark.parametrize("dim", [16, 20, 96, 128, 256])
def test_variable_length_flash_at_other_shapes(heads, dim):
    compare_attention(attention_cuda.packed_attention, many_rows()[3], torch.bfloat16, heads, dim)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_float32(dim, row):
    compare_attention(attention_cuda.packed_attention, many_rows()[row], torch.float32, dim=dim)


def test_attention_gives_the_same_bits_again():
    query, key, value, layout = attention_inputs(many_rows()[3], dim=64)
    inputs = [x.detach().to("cuda", torch.bfloat16) for x in (query, key, value)]
    one, two = (attention_cuda.packed_attention(*inputs, layout, 0.2, None, None) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("targets", [1, 23, 700])
@pytest.mark.parametrize("transform", [lm_head.LogitTransform(), lm_head.LogitTransform(0.5, 8.0)])
@pytest.mark.parametrize("keep_bytes", [0, 2**20, 2**30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_place", [False, True])
def test_lm_head(monkeypatch, dtype, keep_bytes, transform, targets, in_place):
    monkeypatch.setattr(lm_head, "GPU_LIMITS", lm_head.HeadLimits(2**20, 512, keep_bytes))
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False, device="cuda", dtype=torch.float32)
    with torch.no_grad():  # values that half precision represents exactly, so that only the computation differs
        head.weight.copy_((20 * head.weight).bfloat16())
    hidden = torch.randn(targets, 64, device="cuda").bfloat16().to(dtype).requires_grad_()
    ids = torch.randint(0, 5000, (targets,), device="cuda")
    upstream = torch.randn(targets, device="cuda")
    wide = [hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    plain = transform.apply(wide[0] @ wide[1].t()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    expected = [x.cpu() for x in torch.autograd.grad(plain, wide, upstream.double())]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), gradients_in_place(in_place):
        fast = lm_head.target_logps(hidden, head, ids, transform)
        fast.backward(upstream)
    assert fast.dtype == torch.float32
    # Products of bfloat16 numbers are exact in float32: log-probabilities are as exact as those of a float32 model.
    assert (fast.double() - plain).abs().max().item() < 2e-4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(hidden.grad, expected[0]) < tolerance
    assert relative(head.weight.grad, expected[1]) < tolerance


@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 517, 576), (2, 300, 2048), (1, 40, 9000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype, offset, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], device="cuda", requires_grad=True)
    upstream = torch.randn(shape, device="cuda").to(dtype)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (wide_weight + offset)
    plain.backward(upstream.double())
    got = layers._FusedRMSNormFunction.apply(x, weight, 1e-5, offset, dtype)
    got.backward(upstream)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    for one, other in ((got, plain), (x.grad, wide.grad), (weight.grad, wide_weight.grad)):
        assert relative(one, other.detach().cpu()) < tolerance


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_activation(dtype, activation):
    gate, up, upstream = (torch.randn(37, 333, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    act = torch.nn.functional.silu if activation == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")
    plain = act(wide[0]) * wide[1]
    expected = torch.autograd.grad(plain, wide, upstream.double())
    got = layers._GatedFunction.apply(gate, up, activation)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    assert relative(got, plain.detach().cpu()) < tolerance
    for one, other in zip(torch.autograd.grad(got, (gate, up), upstream), expected, strict=True):
        assert relative(one, other.cpu()) < tolerance
    _, _, product = layers_cuda.gated_backward(activation, gate.detach(), up.detach(), upstream.detach(), True)
    assert relative(product, plain.detach().cpu()) < tolerance


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_with_soft_capping(dtype, window):
    """Gemma 2's attention: the compiled kernel, forward and backward."""
    for row in (0, 3):
        compare_attention(
            attention_cuda.flex_packed_attention, many_rows()[row], dtype, (4, 2), 64, window, softcap=5.0
        )
