"""The inputs of the GPU's attention kernels, checked on any machine; tests/cuda tests the kernels."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pairs import attention_inputs, awkward_pairs, many_rows
from sepo.forward import attention
from sepo.forward.packing import pack
from sepo.kernels import attention_cuda

NIGHTLY = pytest.mark.nightly


def reference_varlen(query, key, value, q_starts, k_starts, max_q, max_k, *, scale, window_size, **kwargs):
    """The kernel in plain float64: one sequence at a time, with the mask aligned to the ends of queries and keys."""
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for i in range(len(q_starts) - 1):
        qs, ks = slice(q_starts[i], q_starts[i + 1]), slice(k_starts[i], k_starts[i + 1])
        q, k, v = (x.transpose(0, 1) for x in (query[qs], key[ks], value[ks]))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        n, m = q.shape[1], k.shape[1]
        assert n <= max_q
        assert m <= max_k
        distance = (torch.arange(n)[:, None] + m - n) - torch.arange(m)[None]
        allowed = distance >= 0
        if window_size[0] >= 0:
            allowed &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf)
        out[qs] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("row", range(4))
@pytest.mark.daily(3)
def test_the_sequences_given_to_the_flash_kernel_are_the_packed_row_forward_and_backward(monkeypatch, row, window):
    monkeypatch.setattr(attention_cuda, "varlen_attn", reference_varlen)
    monkeypatch.setattr(attention_cuda, "_grouped", dict)
    query, key, value, layout = attention_inputs(many_rows()[row])
    got = attention_cuda._flash(query, key, value, layout, 0.3, window)
    expected = attention.plain_packed_attention(query, key, value, layout, 0.3, window)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(got, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_heads_of_an_odd_width_are_padded_for_the_kernel(monkeypatch):
    monkeypatch.setattr(attention_cuda, "varlen_attn", reference_varlen)
    monkeypatch.setattr(attention_cuda, "_grouped", dict)
    query, key, value, layout = attention_inputs(awkward_pairs(), dim=13)
    got = attention_cuda._flash(query, key, value, layout, 0.3, None)
    torch.testing.assert_close(got, attention.plain_packed_attention(query, key, value, layout, 0.3))


# The long rows, 1 and 3, are for the nightly run.
DOCUMENTS = [
    pytest.param(*case, marks=[] if case[0] in (0, 2) else NIGHTLY)
    for case in product(range(4), (None, 5.0), (None, 8, 100))
]


@pytest.mark.parametrize(("row", "softcap", "window"), DOCUMENTS)
@pytest.mark.daily(6)
def test_flex_attention_sees_the_same_documents(row, window, softcap):
    query, key, value, layout = attention_inputs(many_rows()[row], dtype=torch.float32)
    query, key, value = query.detach(), key.detach(), value.detach()
    got = attention_cuda.flex_packed_attention(query, key, value, layout, 0.3, window, softcap, kernel=flex_attention)
    expected = attention.plain_packed_attention(query, key, value, layout, 0.3, window, softcap)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 8, 100, 300])
@pytest.mark.parametrize("row", range(4))
@pytest.mark.daily(6)
def test_tiles_of_the_block_mask_miss_nothing_and_whole_ones_are_whole(row, window):
    layout = pack(many_rows()[row]).layout
    coordinates = layout.token_coordinates()
    document, branch, position = coordinates
    seen = (document[:, None] == document[None]) & ((branch[None] < 0) | (branch[:, None] == branch[None]))
    seen &= position[None] <= position[:, None]
    if window is not None:
        seen &= position[:, None] - position[None] < window
    partly, wholly = attention_cuda.visible_tiles(*coordinates, window)
    tile = attention_cuda._TILE
    for q, k in np.ndindex(partly.shape):
        block = seen[q * tile : (q + 1) * tile, k * tile : (k + 1) * tile]
        assert partly[q, k] or not block.any()
        assert not wholly[q, k] or block.all()
    ours = attention_cuda.block_mask(layout, layout.length, window, torch.device("cpu"))
    dense = create_block_mask(ours.mask_mod, None, None, layout.length, layout.length, device="cpu")
    assert ours.sparsity() <= dense.sparsity()


@pytest.mark.slow
@pytest.mark.nightly
def test_every_kind_of_flex_call_keeps_its_graph(monkeypatch, nightly_run):
    """Different numbers of heads, two types, with and without a window, short and long rows: all are compiled."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attention_cuda._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: torch._dynamo.optimize(counting, dynamic=dynamic)(f))
    kinds = 0
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for (heads, kv_heads), dtype, window in product(
            ((2, 1), (4, 2), (6, 3)), (torch.float32, torch.bfloat16), (None, 8)
        ):
            if not nightly_run and (heads > 4 or (heads > 2) + (dtype is torch.bfloat16) + (window == 8) > 1):
                continue  # each difference alone
            before = len(graphs)
            for row in many_rows()[:2]:
                *inputs, layout = attention_inputs(row, heads, kv_heads, dtype=dtype)
                query, key, value = (x.detach() for x in inputs)
                with torch.no_grad():
                    attention_cuda.flex_packed_attention(query, key, value, layout, 0.3, window, 5.0)
            kinds += 1
            assert len(graphs) - before <= 2  # no new graph for a row's length or documents
    assert len(graphs) >= kinds >= (12 if nightly_run else 4)
    attention_cuda._compiled_flex.cache_clear()
    torch._dynamo.reset()
