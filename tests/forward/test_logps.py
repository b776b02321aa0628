"""The forward path against a plain float64 forward of one sequence at a time: values and gradients."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pairs import attention_inputs, awkward_pairs, pairs_table, plain_logps, random_ids
from sepo.errors import UserError
from sepo.forward import attention
from sepo.forward.logps import segment_sums, segment_weights, token_logps
from sepo.forward.packing import Pair, fill_rows, pack, pad
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import NonFiniteError, dataset_logps, make_batches
from sepo.kernels import attention_cpu, lm_head
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings
from tiny_models import SLIDING_WINDOW, TINY_MODELS, tiny_model

LAYOUTS = {"packed": pack, "padded": pad}


def gradients(model, logps, weights):
    model.zero_grad()
    (logps * weights.to(logps.dtype)).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.daily(7)
def test_values_and_gradients_agree_with_a_plain_float64_forward(name, layout):
    pairs = awkward_pairs()
    assert max(len(p.prompt_ids) + len(p.chosen_ids) for p in pairs) > 2 * SLIDING_WINDOW
    plain_model, model = TINY_MODELS[name](dtype=torch.float64), TINY_MODELS[name]()
    assert prepare_model(model, layout) == layout
    expected = plain_logps(plain_model, pairs)
    got = token_logps(model, LAYOUTS[layout](pairs))
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=len(expected)))
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)
    expected_gradients, got_gradients = gradients(plain_model, expected, weights), gradients(model, got, weights)
    assert got_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got_gradients[parameter] / scale, gradient / scale, atol=1e-4, rtol=0)


def test_float64_packed_rows_agree_to_rounding():
    pairs = awkward_pairs(1)
    model = tiny_model("llama", dtype=torch.float64)
    expected = plain_logps(model, pairs)
    prepare_model(model, "packed")
    torch.testing.assert_close(token_logps(model, pack(pairs)), expected, atol=1e-9, rtol=0)


def test_every_architecture_takes_packed_rows_by_default():
    assert {name: prepare_model(build()) for name, build in TINY_MODELS.items()} == dict.fromkeys(TINY_MODELS, "packed")


def test_every_response_token_gets_a_log_probability_the_first_included():
    pairs = awkward_pairs()
    model = tiny_model("gpt_neox")
    table = dataset_logps(model, pairs_table(pairs), tokens_per_row=64)
    expected = plain_logps(tiny_model("gpt_neox"), [Pair(*(getattr(p, n) for n in table_ids)) for p in pairs])
    got = np.concatenate([row[side] for row in table.to_pylist() for side in ("chosen_logps", "rejected_logps")])
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4)


table_ids = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")


def test_stored_log_probabilities_do_not_depend_on_how_pairs_fall_into_rows():
    pairs = pairs_table(awkward_pairs())
    model = tiny_model("gemma3")
    tables = [dataset_logps(model, pairs, tokens_per_row=budget).to_pylist() for budget in (16, 100, 10_000)]
    for table in tables[1:]:
        for row, other in zip(table, tables[0], strict=True):
            np.testing.assert_allclose(row["chosen_logps"], other["chosen_logps"], atol=1e-5)
            np.testing.assert_allclose(row["rejected_logps"], other["rejected_logps"], atol=1e-5)


def test_a_model_that_is_not_finite_is_named_with_its_pair():
    model = tiny_model("llama")
    prepare_model(model)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(NonFiniteError, match="pair 10"):
        dataset_logps(model, pairs_table(awkward_pairs()))


def test_an_empty_table_gives_an_empty_table():
    pairs = pairs_table(awkward_pairs()).slice(0, 0)
    assert dataset_logps(tiny_model("llama"), pairs).num_rows == 0


def test_logits_changed_in_an_unknown_way_are_refused():
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(UserError, match="changes its logits"):
        prepare_model(model)


def test_a_model_with_its_own_attention_falls_back_to_the_padded_layout():
    model = tiny_model("llama")
    for layer in model.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, original=original, layout=None, **kwargs: original(*args, **kwargs)
    assert prepare_model(model) == "padded"
    pairs = awkward_pairs()
    expected = plain_logps(tiny_model("llama"), pairs)
    torch.testing.assert_close(token_logps(model, pad(pairs)), expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="layout=padded"):
        prepare_model(model, "packed")


def test_generation_still_works_on_a_prepared_model():
    for name in ("llama", "gemma2", "gemma3"):
        plain, model = tiny_model(name), tiny_model(name)
        prepare_model(model, "packed")
        tokens = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
        options = {"attention_mask": tokens.ne(0).long(), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))


def test_a_disabled_adapter_gives_the_reference(tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    model = load_model(str(folder), lora=LoraSettings(r=4), train=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    prepare_model(model)
    pairs = awkward_pairs()
    adapted = token_logps(model, pack(pairs))
    assert adapted.requires_grad
    with model.disable_adapter():
        torch.testing.assert_close(
            token_logps(model, pack(pairs)), plain_logps(tiny_model("llama"), pairs), atol=1e-4, rtol=0
        )
    assert (adapted - plain_logps(tiny_model("llama"), pairs)).abs().max() > 0.1


def test_segment_sums_and_weights_follow_the_pairs():
    pairs = awkward_pairs()
    batch = pack(pairs)
    values = torch.arange(len(batch.segments), dtype=torch.float32)
    chosen, rejected = segment_sums(values, batch, weighted=True)
    at = 0
    for index, pair in enumerate(pairs):
        for sums, side in ((chosen, 0), (rejected, 1)):
            ids, positions, weights = pair.side(side)
            size = len(ids) if positions is None else len(positions)
            expected = sum(w * (at + i) for i, w in enumerate(weights or [1.0] * size))
            assert sums[index].item() == pytest.approx(expected)
            at += size
    counts = segment_weights(batch)
    assert counts[0].tolist() == [17, 1, 2, 17, 0.5, 1]
    assert counts[1].tolist() == [9, 1, 1, 17, 2.25, 17]


# --- packing --------------------------------------------------------------------------------------------------------


def test_a_prompt_and_a_shared_response_are_stored_once():
    prompt, one, two = (1, 2, 3), (4, 5, 6, 7), (8, 9)
    batch = pack([Pair(0, prompt, one, two), Pair(1, prompt, two, one)])
    # The last token of a response predicts no target and is cut.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3]]
    assert batch.target_positions.tolist() == [2, 3, 4, 5, 2, 6, 2, 6, 2, 3, 4, 5]
    assert batch.target_ids.tolist() == [*one, *two, *two, *one]
    assert batch.segments.tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 4


def test_nothing_is_read_after_the_last_target():
    pair = Pair(0, (1, 2), tuple(range(10, 30)), tuple(range(40, 60)), (0, 3), (0,))
    assert pack([pair]).input_ids.tolist() == [[1, 2, 10, 11, 12]]


def test_rows_hold_every_pair_once_within_the_budget():
    rng = np.random.default_rng(3)
    pairs = [Pair(i, random_ids(rng, 1 + i % 7), random_ids(rng, 1 + i % 11), random_ids(rng, 5)) for i in range(50)]
    rows = fill_rows(pairs, 40)
    assert sorted(pair.pair_id for row in rows for pair in row) == list(range(50))
    sizes = [pack(row).num_tokens for row in rows]
    assert max(sizes) <= 40
    assert sum(sizes) / (40 * len(rows)) > 0.85
    long = Pair(99, random_ids(rng, 100), (5,), (6,))
    assert sorted(len(row) for row in fill_rows([long, pairs[0]], 40)) == [1, 1]


def test_empty_sides_and_positions_outside_the_response_are_refused():
    with pytest.raises(UserError, match="at least one token"):
        pack([Pair(0, (), (1,), (2,))])
    with pytest.raises(UserError, match="outside"):
        pack([Pair(0, (1,), (1,), (2,), (1,))])


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_queries", [1, 3, 128])
def test_block_attention_agrees_with_a_masked_softmax_forward_and_backward(monkeypatch, backward_queries):
    monkeypatch.setattr(attention_cpu, "_BACKWARD_QUERIES", backward_queries)
    query, key, value, layout = attention_inputs(awkward_pairs())
    fast = attention_cpu.BlockAttention.apply(query, key, value, layout, 0.3)
    plain = attention.plain_packed_attention(query, key, value, layout, 0.3)
    torch.testing.assert_close(fast, plain)
    upstream = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad(fast, (query, key, value), upstream),
        torch.autograd.grad(plain, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


# --- LM head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_bytes", [0, 2**12, 2**30])
@pytest.mark.parametrize("transform", [lm_head.LogitTransform(), lm_head.LogitTransform(0.3, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_lm_head_agrees_with_log_softmax_whatever_is_kept(monkeypatch, keep_bytes, transform, bias):
    # The smallest block: 7 targets by 64 tokens of the vocabulary.
    monkeypatch.setattr(lm_head, "CPU_LIMITS", lm_head.HeadLimits(1, 7, keep_bytes))
    torch.manual_seed(0)
    head = torch.nn.Linear(12, 150, bias=bias, dtype=torch.float64)
    hidden = torch.randn(23, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 150, (23,))
    upstream = torch.randn(23, dtype=torch.float64)
    inputs = [hidden, *head.parameters()]
    plain = transform.apply(head(hidden)).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(plain, inputs, upstream)
    fast = lm_head.target_logps(hidden, head, targets, transform)
    torch.testing.assert_close(fast, plain)
    for got, wanted in zip(torch.autograd.grad(fast, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    wrapped = torch.nn.Sequential(head)  # not a plain Linear: the chunked fallback
    slow = lm_head.target_logps(hidden, wrapped, targets, transform)
    for got, wanted in zip(torch.autograd.grad(slow, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def peak_bytes(run):
    """Most bytes allocated at a time while `run` runs, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def test_lm_head_holds_a_block_of_logits_and_its_budget_not_all_of_them(monkeypatch):
    """Forward and backward, with the gradient of the head: 600 targets, 8,000 tokens, 19 MB of logits."""
    torch.manual_seed(0)
    block, kept = 2**20, 2 * 2**20
    monkeypatch.setattr(lm_head, "CPU_LIMITS", lm_head.HeadLimits(block, 1024, kept))
    head = torch.nn.Linear(16, 8000, bias=False)
    hidden, targets = torch.randn(600, 16, requires_grad=True), torch.randint(0, 8000, (600,))
    logits, weights = 4 * 600 * 8000, head.weight.nbytes

    def plain():
        head(hidden).log_softmax(-1).gather(1, targets[:, None]).sum().backward()

    def fast():
        lm_head.target_logps(hidden, head, targets, lm_head.LogitTransform()).sum().backward()

    for run in (plain, fast):
        run()  # allocates the gradients
    assert peak_bytes(plain) > 2 * logits
    # Beside the budget: blocks of logits and their gradients, the head's gradient, and `[targets, hidden]` tensors.
    assert peak_bytes(fast) < kept + 3 * block + 2 * weights + 8 * hidden.nbytes < logits / 2


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("transform", [lm_head.LogitTransform(), lm_head.LogitTransform(softcap=300.0)])
def test_lm_head_is_exact_where_exponentials_vanish(monkeypatch, keep_bytes, transform):
    """Logits hundreds apart, a target among the lowest, and a block of the vocabulary with all logits -inf."""
    monkeypatch.setattr(lm_head, "CPU_LIMITS", lm_head.HeadLimits(1, 7, keep_bytes))
    head = torch.nn.Linear(2, 200)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 400).view(200, 2))
        head.bias[64:128] = float("-inf")
    hidden = torch.tensor([[150.0, 150.0], [0.1, -0.2]], requires_grad=True)
    targets = torch.tensor([1, 199])
    upstream = torch.tensor([1.0, -2.0])
    plain = transform.apply(head(hidden).double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert plain[0] < -200
    fast = lm_head.target_logps(hidden, head, targets, transform)
    torch.testing.assert_close(fast, plain.float())
    inputs = [hidden, head.weight]
    expected = torch.autograd.grad(plain, inputs, upstream.double())
    for got, wanted in zip(torch.autograd.grad(fast, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_no_targets_give_no_log_probabilities():
    head = torch.nn.Linear(4, 9, bias=False)
    empty = torch.zeros(0, dtype=torch.long)
    assert lm_head.target_logps(torch.zeros(0, 4), head, empty, lm_head.LogitTransform()).shape == (0,)


# --- a real model ---------------------------------------------------------------------------------------------------


def test_smollm2_scores_real_pairs_as_its_own_forward_does(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    texts = [
        ("The capital of France is", " Paris, on the Seine.", " a city."),
        ("The capital of France is", " Rome.", " Paris, on the Seine."),
        ("Write one word:", " yes", " no, I would rather write a whole sentence about something else"),
    ]
    pairs = [Pair(i, *(tuple(tokenizer(text).input_ids) for text in row)) for i, row in enumerate(texts)]
    model = load_model(smollm2_dir, device="cpu")
    expected = plain_logps(model, pairs)
    assert prepare_model(model) == "packed"
    batches = make_batches(pairs, "packed", 64)
    got = {}
    with torch.no_grad():
        for batch in batches:
            chosen, rejected = segment_sums(token_logps(model, batch), batch)
            got |= dict(zip(batch.pair_ids, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    sums = [part.sum().item() for part in expected.split(lengths)]
    np.testing.assert_allclose([value for i in range(3) for value in got[i]], sums, atol=1e-3)
    table = dataset_logps(model, pairs_table(pairs))
    assert table.column("pair_id") == pa.chunked_array([[0, 1, 2]])
