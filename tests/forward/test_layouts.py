"""The layout of each kind of model, and that its results equal those of the model's own forward, text by text."""

import copy
import itertools
import random
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GptOssConfig,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    SeedOssConfig,
    XGLMConfig,
)

from pairs import attention_inputs, awkward_pairs, config, pairs_table, plain_logps, random_ids
from sepo import processes
from sepo.data.tables import read_table, write_table
from sepo.errors import UserError
from sepo.forward import prepare
from sepo.forward.attention import packed_attention_forward
from sepo.forward.logps import segment_sums, token_logps
from sepo.forward.packing import Pair, fill_padded_rows, pack, pad
from sepo.forward.prepare import prepare_model, training_noise
from sepo.forward.scoring import dataset_logps, make_batches, table_pairs
from sepo.stages.logps import logps_pass
from sepo.training.batches import PairCollator, PairDataset
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model

BASE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FOUR = {**BASE, "num_hidden_layers": 4}
NO_GROUPS = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
# Length of a window, of a chunk, or of the pre-training.
STEP = 16


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": STEP, **more}


def dynamic_rope():
    return LlamaConfig(
        **{**BASE, "max_position_embeddings": STEP},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )


def llama4(**changes):
    return Llama4TextConfig(**FOUR, intermediate_size_mlp=80, head_dim=16, num_local_experts=2, **changes)


def longrope():
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    return Phi3Config(**BASE, original_max_position_embeddings=STEP, rope_parameters=rope("longrope", **factors))


# The config, and the layout of texts beyond STEP.
BEYOND = {
    "longrope": (longrope, "unbatched"),
    "yarn": (lambda: LlamaConfig(**BASE, rope_parameters=rope("yarn")), "packed"),
    "llama3": (
        lambda: LlamaConfig(**BASE, rope_parameters=rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        "packed",
    ),
    "scaled queries": (
        lambda: Ministral3Config(**BASE, head_dim=16, rope_parameters=rope("yarn", llama_4_scaling_beta=0.5)),
        "packed",
    ),
    "dynamic with alpha": (
        lambda: HunYuanDenseV1Config(
            **{**BASE, "max_position_embeddings": STEP}, head_dim=16,
            rope_parameters={"rope_type": "dynamic", "alpha": 100.0, "factor": 1.0, "rope_theta": 1e4},
        ),
        "packed",
    ),
    "window in the mask": (
        lambda: PhimoeConfig(**BASE, sliding_window=STEP, num_local_experts=4, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4}),
        "padded",
    ),
    "chunks": (lambda: llama4(attention_chunk_size=STEP, floor_scale=4096), "padded"),
    "mistral": (lambda: MistralConfig(**BASE, sliding_window=STEP), "packed"),
    "qwen2": (
        lambda: Qwen2Config(**BASE, use_sliding_window=True, sliding_window=STEP, max_window_layers=1), "packed"
    ),
    "gemma2": (lambda: Gemma2Config(**BASE, head_dim=16, sliding_window=STEP), "packed"),
    "gemma3": (lambda: Gemma3TextConfig(**BASE, head_dim=16, sliding_window=STEP), "packed"),
    "cohere2": (lambda: Cohere2Config(**FOUR, sliding_window=STEP), "packed"),
    "olmo3": (lambda: Olmo3Config(**FOUR, sliding_window=STEP), "packed"),
    "sinks": (
        lambda: GptOssConfig(**BASE, head_dim=16, sliding_window=STEP, num_local_experts=4, num_experts_per_tok=2,
                             rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "padded",
    ),
    "recurrent": (
        lambda: RecurrentGemmaConfig(**{**FOUR, "num_key_value_heads": 1}, lru_width=48, attention_window_size=STEP),
        "padded",
    ),
    "state space": (
        lambda: MambaConfig(vocab_size=101, hidden_size=48, num_hidden_layers=2, state_size=4), "padded"
    ),
}  # fmt: skip


def model_of(settings, seed=0):
    """A random model with this config, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(settings).eval()


def pairs_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [Pair(i, *(random_ids(rng, size) for size in row)) for i, row in enumerate(sizes)]


# Tokens of prompt, chosen and rejected: short texts, and some longer than STEP on one side or both.
MIXED = pairs_of([(3, 5, 4), (2, 40, 3), (30, 4, 18), (25, 20, 7), (10, 8, 50), (5, 12, 9), (5, 11, 12), (1, 1, 1)])
SHORT = pairs_of([(3, 5, 4), (2, 9, 3), (6, 4, 8), (4, 7, 7)] * 8)


def longest(pairs):
    return max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)


def logps_in_rows(model, pairs, layout, tokens_per_row):
    """Log-probabilities in the order of `plain_logps`, from batches of a layout."""
    logps = {}
    for batch in make_batches(pairs, layout, tokens_per_row):
        values = token_logps(model, batch)
        for index, pair_id in enumerate(batch.pair_ids):
            logps[pair_id] = torch.cat([values[batch.segments == 2 * index + side] for side in (0, 1)])
    return torch.cat([logps[pair.pair_id] for pair in pairs])


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.daily(4)
def test_texts_beyond_a_window_or_the_original_length_give_what_each_gives_alone(name):
    build, expected_layout = BEYOND[name]
    model = model_of(build())
    expected = plain_logps(copy.deepcopy(model), MIXED)
    layout = prepare_model(model, longest=longest(MIXED), tokens_per_row=200)
    assert layout == expected_layout
    torch.testing.assert_close(logps_in_rows(model, MIXED, layout, 200), expected, atol=1e-3, rtol=0)


def test_texts_read_one_at_a_time_have_the_gradients_of_the_models_own_forward():
    model, plain = model_of(longrope()), model_of(longrope())
    assert prepare_model(model, longest=longest(MIXED)) == "unbatched"
    for logps in (plain_logps(plain, MIXED), logps_in_rows(model, MIXED, "unbatched", 64)):
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got.grad / scale, expected.grad / scale, atol=1e-4, rtol=0, msg=name)


def test_short_texts_of_the_same_models_are_packed():
    for name in ("longrope", "window in the mask", "mistral"):
        model = model_of(BEYOND[name][0]())
        expected = plain_logps(copy.deepcopy(model), SHORT)
        assert prepare_model(model, longest=STEP, tokens_per_row=200) == "packed"
        torch.testing.assert_close(logps_in_rows(model, SHORT, "packed", 200), expected, atol=1e-3, rtol=0)


def test_a_model_that_counts_places_in_a_row_itself_is_padded_where_rows_are_long():
    """Llama 4 scales queries by their place in the row, not by their position in the text."""
    settings = llama4(attention_chunk_size=4096, floor_scale=64, attn_scale=2.0)
    model = model_of(settings)
    expected = plain_logps(copy.deepcopy(model), SHORT)
    assert prepare_model(model, longest=STEP, tokens_per_row=20) == "packed"
    assert prepare_model(model, longest=STEP, tokens_per_row=200) == "padded"
    torch.testing.assert_close(logps_in_rows(model, SHORT, "padded", 200), expected, atol=1e-4, rtol=0)


def test_frequencies_of_the_longest_text_so_far_are_refused_beyond_the_original_length():
    model = model_of(dynamic_rope())
    assert prepare_model(model, longest=STEP) == "packed"
    with pytest.raises(UserError, match=r"depend on what it read before.* lower max_length to 16"):
        prepare_model(model, longest=longest(MIXED))


def test_a_batch_longer_than_what_was_tried_is_refused():
    for name, tried in (("longrope", STEP), ("window in the mask", STEP), ("mistral", STEP), ("longrope", 42)):
        model = model_of(BEYOND[name][0]())
        prepare_model(model, longest=tried)
        token_logps(model, pack(SHORT[:2]))
        with pytest.raises(UserError, match="longest text has 41"):
            token_logps(model, pack(MIXED[:2]))


def test_a_required_layout_that_does_not_work_changes_nothing():
    model = without_layout(tiny_model("llama"))
    for _ in range(2):
        with pytest.raises(UserError, match="layout=padded"):
            prepare_model(model, "packed")
        assert prepare_model(model) == "padded"
    model = model_of(longrope())
    assert prepare_model(model, "padded", longest=STEP) == "padded"
    assert prepare_model(model, longest=STEP) == "padded"
    assert prepare_model(model, "padded", longest=longest(MIXED)) == "unbatched"
    assert prepare_model(model, "packed", longest=STEP) == "packed"
    with pytest.raises(UserError, match=r"packed rows of [0-9]+ tokens .*use layout=padded"):
        prepare_model(model, longest=longest(MIXED))
    with pytest.raises(UserError, match="expected auto, packed or padded"):
        prepare_model(model, "unbatched")


def test_scoring_takes_the_layout_that_each_table_needs_in_any_order():
    short, mixed = SHORT[:4], MIXED
    for name, tables in (("longrope", (short, mixed, short)), ("window in the mask", (mixed, short, mixed))):
        model = model_of(BEYOND[name][0]())
        plain = copy.deepcopy(model)
        for pairs in tables:
            table = dataset_logps(model, pairs_table(pairs), tokens_per_row=100)
            got = [row[side] for row in table.to_pylist() for side in ("chosen_logps", "rejected_logps")]
            expected = plain_logps(plain, pairs).detach().numpy()
            np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["mistral", "longrope"])
def test_a_table_of_several_shards_is_tried_once_beyond_a_window(name, tmp_path, monkeypatch):
    """Every shard has a longer text than the one before; the first has none beyond the window."""
    model_of(BEYOND[name][0]()).save_pretrained(tmp_path / "model")
    pairs = [Pair(i, (5, 6, 7), tuple(range(20, 25 + 2 * i)), (8, 9)) for i in range(7)]
    write_table(tmp_path / "pairs", pairs_table(pairs), rows_per_shard=1)
    tried, try_layouts = [], prepare._try_layouts
    monkeypatch.setattr(
        prepare, "_try_layouts", lambda *arguments: tried.append(arguments[-2:]) or try_layouts(*arguments)
    )
    logps_pass(str(tmp_path / "model"), tmp_path / "pairs", tmp_path / "logps", device="cpu", tokens_per_row=64)
    assert len(tried) == len(set(tried)) <= 3  # short texts, beyond the window, and short texts in long rows
    assert len({document for document, _ in tried}) == 2
    plain = model_of(BEYOND[name][0]())
    table = read_table(tmp_path / "logps", "logps")
    got = [row[side] for row in table.to_pylist() for side in ("chosen_logps", "rejected_logps")]
    np.testing.assert_allclose(np.concatenate(got), plain_logps(plain, pairs).detach().numpy(), atol=1e-3)


DEEPER = {**BASE, "intermediate_size": 64, "num_hidden_layers": 3}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**DEEPER, num_local_experts=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **DEEPER, head_dim=12, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def mixture(kind: str, seed: int):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(MIXTURES[kind]()).to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.daily(1)
def test_a_choice_of_experts_that_rounding_changes_is_no_reason_to_pad(kind, capsys, monkeypatch):
    monkeypatch.setattr(processes, "_logged", set())
    for seed in range(10):
        model = mixture(kind, seed)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert prepare_model(model) == "packed"
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert model.dtype == torch.bfloat16
    assert "rounding changes its choice of experts" in capsys.readouterr().err  # of at least one of the ten


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.daily(1)
def test_a_mixture_that_ignores_the_layout_is_padded_in_half_precision_too(kind):
    for seed in range(10):
        assert prepare_model(without_layout(mixture(kind, seed))) == "padded"


def test_a_training_reads_texts_as_long_as_its_data(tmp_path):
    for evaluated in (False, True):
        model = model_of(longrope())
        short, mixed = pairs_table(SHORT[:4]), pairs_table(MIXED)
        trainer = PreferenceTrainer(
            model,
            config(tmp_path, objective="dpo", max_steps=1),
            train_dataset=short if evaluated else mixed,
            eval_dataset=mixed if evaluated else None,
        )
        assert trainer.data_collator.layout == "unbatched"
        trainer.train()
        first = next(row for row in trainer.state.log_history if "loss" in row)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


# --- messages and refusals ------------------------------------------------------------------------------------------


def without_layout(model):
    """A model whose attention ignores the layout."""
    for layer in model.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, original=original, layout=None, **kwargs: original(*args, **kwargs)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: without_layout(tiny_model("llama")), "log-probabilities differ by [0-9.]+ nats"),
        (lambda: model_of(BEYOND["sinks"][0]()), "attention sinks"),
        (lambda: model_of(BEYOND["state space"][0]()), "unpack"),
    ],
)
def test_a_padded_model_is_named_with_the_reason_once(build, reason, capsys, monkeypatch):
    monkeypatch.setattr(processes, "_logged", set())
    for _ in range(2):
        assert prepare_model(build()) == "padded"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(reason, said)


def test_a_kernel_that_cannot_be_built_is_the_reason_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr(processes, "_logged", set())

    def no_compiler(*args, **kwargs):
        raise RuntimeError("Cannot find a working\ntriton installation")

    monkeypatch.setattr("sepo.forward.attention.BlockAttention.apply", no_compiler)
    assert prepare_model(tiny_model("llama")) == "padded"
    assert "(Cannot find a working triton installation): it is read in padded batches" in capsys.readouterr().err


def test_no_message_about_a_model_that_is_packed_or_padded_on_request(capsys):
    prepare_model(tiny_model("llama"))
    prepare_model(tiny_model("llama"), "padded")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("parameter", "value"), [("model.norm.weight", "nan"), ("model.embed_tokens.weight", "inf")])
def test_weights_that_are_not_finite_are_named_first(parameter, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(parameter)[-1] = float(value)  # in the embedding, a line that the short texts do not read
    with pytest.raises(UserError, match=rf"its weights are not finite \({parameter}\)"):
        prepare_model(model)


@pytest.mark.parametrize(
    ("dtype", "value", "advice"),
    [(torch.float16, 6e4, "use another dtype than float16"), (torch.float32, 1e36, r"its training diverged \(lower")],
)
def test_values_that_overflow_the_type_of_the_weights_are_named(dtype, value, advice):
    model = tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
        model.lm_head.weight.mul_(1000)
    with pytest.raises(UserError, match=f"not finite, though its weights are: {advice}"):
        prepare_model(model)


@pytest.mark.parametrize("kind", ["meta", "empty"])
def test_weights_that_are_elsewhere_are_refused_in_one_line(kind):
    model = tiny_model("llama")
    if kind == "meta":
        model.to("meta")
    else:  # as under DeepSpeed's zero.Init
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
    with pytest.raises(UserError, match=r"not in this process \(model.embed_tokens.weight\).*load it whole"):
        prepare_model(model)


def test_what_changes_the_logits_is_named_by_its_key():
    model = tiny_model("llama")
    model.config.lm_head_multiplier = 1.5
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(UserError, match=r"lm_head_multiplier=1\.5"):
        prepare_model(model)


def test_a_model_that_cannot_read_is_refused_in_one_line():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(UserError, match="cannot read texts"):
        prepare_model(model)


@pytest.mark.parametrize("size", [1, 2, 7, 17])
def test_a_vocabulary_smaller_than_the_ids_of_the_tried_texts_works(size):
    model = tiny_model("llama", vocab_size=size, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    assert prepare_model(model) == "packed"


def test_the_decoder_is_found_whatever_attribute_holds_it():
    model = model_of(llama4(attention_chunk_size=64, floor_scale=4096))
    assert model.base_model is model  # base_model_prefix names an attribute that it does not have
    expected = plain_logps(copy.deepcopy(model), SHORT[:4])
    layout = prepare_model(model, longest=STEP, tokens_per_row=60)
    torch.testing.assert_close(logps_in_rows(model, SHORT[:4], layout, 60), expected, atol=1e-4, rtol=0)


def test_a_model_is_where_it_was_after_it_was_tried_elsewhere():
    model = tiny_model("gemma2")  # head and embedding are tied
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    with prepare._moved(model, "meta"):
        assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model(torch.tensor([[5]], device="meta")).logits.shape == (1, 1, 101)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- dropout and other noise in training ----------------------------------------------------------------------------

OFF = {
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "residual_dropout": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "router_jitter_noise": 0.0,
}  # fmt: skip
OPT = {
    "vocab_size": 101, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3,
}  # fmt: skip
NOISY = {
    "dropout of functions": lambda **off: SeedOssConfig(**BASE, head_dim=16, **{"attention_dropout": 0.0, **off}),
    "dropout, OPT": lambda **off: OPTConfig(**{**OPT, "attention_dropout": 0.0, **off}),
    "layers left out alone": lambda **off: OPTConfig(**{**OPT, "dropout": 0.0, "layerdrop": 0.1, **off}),
    "padded": lambda **off: XGLMConfig(
        vocab_size=101, d_model=48, ffn_dim=80, num_layers=2, attention_heads=4, max_position_embeddings=64,
        init_std=0.3, **off,
    ),
    "jitter": lambda **off: MixtralConfig(**BASE, num_local_experts=4, **{"router_jitter_noise": 0.1, **off}),
    "attention, GPT-BigCode": lambda **off: GPTBigCodeConfig(
        vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **off
    ),
    "attention, BioGPT": lambda **off: BioGptConfig(**NO_GROUPS, **off),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_whatever_a_model_does_in_training_alone_is_noise(name):
    noisy = model_of(NOISY[name]())
    prepare_model(noisy)
    assert training_noise(noisy) > 0.01
    known = NOISY[name]().to_dict().keys()
    quiet = model_of(NOISY[name](**{key: value for key, value in OFF.items() if key in known}))
    prepare_model(quiet)
    assert training_noise(quiet) < 1e-5


def test_measuring_noise_leaves_modes_and_random_states_alone():
    model = model_of(NOISY["jitter"]())
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert training_noise(model) > 0.01  # prepared on the way
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_noise_drawn_outside_of_torch_is_seen(source):
    model = tiny_model("llama")
    draw = random.random if source == "python" else np.random.random

    def sometimes(module, inputs, output):
        return output * 2 if module.training and draw() < 0.2 else output

    model.model.layers[0].mlp.register_forward_hook(sometimes)
    assert training_noise(model) > 0.01


def test_the_dropout_of_an_adapter_is_not_noise():
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.5, init_lora_weights=False)
    )
    assert training_noise(adapted) < 1e-5
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj, nn.Dropout(0.5))
    assert training_noise(get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))) > 0.01


def test_packed_attention_refuses_dropout():
    query, key, value, layout = attention_inputs(awkward_pairs())
    with pytest.raises(NotImplementedError):
        packed_attention_forward(nn.Identity(), query, key, value, None, dropout=0.1, layout=layout)


# --- padded batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 40, 100, 512, 4000])
def test_padded_batches_keep_to_the_budget_and_hold_every_pair_once(budget):
    rng = np.random.default_rng(budget)
    for number in (0, 1, 7, 150):
        sizes = np.clip(rng.lognormal(3, 1, (number, 3)), 1, 400).astype(int)
        pairs = pairs_of(sizes.tolist(), seed=number)
        rows = fill_padded_rows(pairs, budget)
        assert sorted(pair.pair_id for row in rows for pair in row) == list(range(number))
        tokens = [pad(row).num_tokens for row in rows]
        assert all(size <= budget or len(row) == 1 for size, row in zip(tokens, rows, strict=True))
        # Rows are full: one more pair would not fit.
        for row, following in itertools.pairwise(rows):
            assert pad([*row, following[0]]).num_tokens > budget


def test_padded_batches_of_selected_tokens_count_what_is_read():
    pairs = [Pair(i, (1, 2), tuple(range(4, 64)), tuple(range(4, 64)), (0, 3), (1,)) for i in range(6)]
    assert [pad(row).num_tokens for row in fill_padded_rows(pairs, 60)] == [60]


@pytest.mark.parametrize("layout", ["packed", "padded", "unbatched"])
def test_sums_do_not_depend_on_the_layout_or_the_budget(layout):
    pairs = [*awkward_pairs(), *pairs_of([(8, 30, 2), (1, 2, 40)], seed=4)]
    model = tiny_model("llama")
    prepare_model(model)
    lengths = [len(ids) if positions is None else len(positions) for ids, positions, _ in
               (pair.side(side) for pair in pairs for side in (0, 1))]  # fmt: skip
    expected = [part.sum().item() for part in plain_logps(tiny_model("llama"), pairs).split(lengths)]
    for budget in (30, 200, 5000):
        got = {}
        for batch in make_batches(pairs, layout, budget):
            sums = segment_sums(token_logps(model, batch), batch)
            for index in range(batch.num_pairs):
                got[len(got)] = None
                got[batch.pair_ids[index], 0], got[batch.pair_ids[index], 1] = (side[index].item() for side in sums)
        values = [got[pair.pair_id, side] for pair in pairs[:6] for side in (0, 1)]
        np.testing.assert_allclose(values, expected[:12], atol=1e-3)


# --- pairs of a table -----------------------------------------------------------------------------------------------


def selection_table(chunks=1):
    rng = np.random.default_rng(0)
    columns = {"pair_id": list(range(3, 33))}
    for part in ("prompt", "chosen", "rejected"):
        columns[f"{part}_ids"] = [random_ids(rng, int(size)) for size in rng.integers(1, 30, 30)]
    for side in ("chosen", "rejected"):
        kept = [sorted(rng.choice(len(ids), max(1, len(ids) // 2), replace=False)) for ids in columns[f"{side}_ids"]]
        columns[f"{side}_positions"] = [[int(at) for at in row] for row in kept]
        columns[f"{side}_weights"] = [rng.random(len(row)).tolist() for row in kept]
    types = {name: pa.int64() if name == "pair_id" else pa.list_(pa.float32() if "weights" in name else pa.int32())
             for name in columns}  # fmt: skip
    whole = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    size = -(-len(whole) // chunks)
    return pa.concat_tables([whole.slice(start, size) for start in range(0, len(whole), size)])


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_pairs_of_a_table_are_its_rows(chunks):
    table = selection_table(chunks).slice(2, 20)
    pairs = table_pairs(table)
    assert len(pairs) == 20
    for pair, row in zip(pairs, table.to_pylist(), strict=True):
        assert {name: getattr(pair, name) if name == "pair_id" else getattr(pair, name).tolist() for name in row} == row
    assert [pair.pair_id for pair in pairs[3:7]] == [pair.pair_id for pair in (pairs[i] for i in range(3, 7))]
    assert pairs[-1].pair_id == table.column("pair_id").to_pylist()[-1]
    with pytest.raises(IndexError):
        pairs[20]
    assert pairs.longest == max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in table.to_pylist()
    )


def test_pairs_are_views_of_the_table_and_cost_nothing():
    table = selection_table()
    buffers = table.column("chosen_ids").chunk(0).values.buffers()[1]
    ids = table_pairs(table)[5].chosen_ids
    assert buffers.address <= ids.ctypes.data < buffers.address + buffers.size
    dataset = PairDataset(table)
    assert not any(isinstance(value, list | dict) and len(value) > 20 for value in vars(dataset).values())


def test_arrays_and_tuples_are_packed_alike():
    as_tuples = awkward_pairs()
    as_arrays = [
        Pair(pair.pair_id, *(None if value is None else np.asarray(value) for value in list(vars(pair).values())[1:]))
        for pair in as_tuples
    ]
    for lay_out in (pack, pad):
        one, other = lay_out(as_tuples), lay_out(as_arrays)
        for name, value in vars(one).items():
            same = torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else True
            assert same, name
        assert one.layout == other.layout


def test_the_pair_that_fills_up_is_looked_for_once(tmp_path):
    dataset = PairDataset(pairs_table(MIXED))
    assert dataset.pairs[dataset.shortest].pair_id == 7
    dataset.pairs = None  # a second search would fail
    assert dataset.shortest == 7


def test_a_worker_lays_out_the_same_batches():
    dataset, collate = PairDataset(selection_table()), PairCollator("packed", 100)
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate, num_workers=workers)
        for workers in (0, 1)
    ]
    for one, other in zip(*loaders, strict=True):
        for a, b in zip(one["batches"], other["batches"], strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.target_ids, b.target_ids)
            assert a.pair_ids == b.pair_ids


@pytest.mark.parametrize("architecture", ["gemma3", "mistral", "gemma2", "llama"])
def test_a_model_that_was_tried_with_short_texts_is_tried_again_with_long_ones(architecture):
    model = tiny_model(architecture)
    assert prepare_model(model, longest=0, tokens_per_row=0) == "packed"
    assert prepare_model(model, longest=40, tokens_per_row=512) == "packed"
    assert training_noise(model) < 1e-3
