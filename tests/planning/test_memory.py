"""The memory that a plan adds up, against what is really kept: weights, gradients, moments, activations, caches."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from pairs import some_pairs
from sepo.evaluate.generate import generate_responses
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import table_pairs
from sepo.kernels.gradients import gradients_in_place
from sepo.models.adapters import new_adapter
from sepo.planning.cost import FrozenMemory, TrainingMemory
from sepo.planning.memory import PARTS, kept_bytes, options_to_fit, parts_of, smallest_change, trainable
from sepo.planning.sizes import model_shape
from sepo.recipe.settings import LoraSettings, TrainingSettings
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}


def need(shape, device="cpu", tokens=512, targets=400, **settings):
    given = {key: settings.pop(key) for key in ("lora", "quantization", "processes", "sharded") if key in settings}
    return TrainingMemory(shape, TrainingSettings(**settings), device, tokens, targets, 64, **given)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|v_proj|c_attn|qkv_proj|query_key_value)"])
def test_a_config_gives_the_weights_and_the_adapters_of_the_model(architecture, targets):
    model = tiny_model(architecture)
    shape = model_shape(CONFIGS[architecture]())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.head == model.get_output_embeddings().weight.numel()
    lora = LoraSettings(r=3, target_modules=targets)
    adapted = new_adapter(model, lora)
    assert trainable(need(shape, lora=lora)) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_gradients_and_moments_are_those_of_the_optimizer():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    parts = parts_of(need(model_shape(model)))
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert parts["AdamW"] == sum(value.nbytes for value in moments)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("llama_tied", "mistral"))]
)
@pytest.mark.daily(1)
def test_activations_are_those_that_a_packed_row_keeps(architecture, checkpointing):
    """Bytes that the allocator has given out and not got back when the forward pass is done."""
    model = tiny_model(architecture, sliding_window=None, **WIDE)
    prepare_model(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack(table_pairs(some_pairs(40)))
    with gradients_in_place(), torch.profiler.profile(profile_memory=True) as profiler:
        logps = token_logps(model, batch)
    held = sum(event.self_cpu_memory_usage for event in profiler.events())
    shape = model_shape(model)
    one = need(shape, tokens=batch.num_tokens, targets=len(batch.target_ids), activation_checkpointing=checkpointing)
    expected = kept_bytes(one)
    if checkpointing:  # the block that is computed anew comes later
        expected = 4 * (shape.layers + 1) * batch.num_tokens * shape.hidden
    head = 4 * len(batch.target_ids) * (shape.vocab + shape.hidden)
    assert held - head == pytest.approx(expected, rel=0.15)
    assert logps.requires_grad


def test_the_cache_is_that_of_generation():
    model = tiny_model("llama", initializer_range=0.02)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(_[-1].past_key_values), always_call=True)
    generate_responses(model, tiny_tokenizer(), [[5, 6, 7, 8]] * 3, max_new_tokens=6, progress=False)
    layers = seen[-1].layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    # The last token drawn is never read.
    frozen = FrozenMemory(model_shape(model), "cpu", 4, 512, 10, responses=3, length=4 + 6 - 1, prompt=4)
    assert held == parts_of(frozen)["cache"]


@pytest.mark.parametrize(
    ("shape", "tokens", "share", "measured"),
    [
        (LLAMA_1B, 16384, 0.25, 40.9), (LLAMA_1B, 16384, 0.85, 42.8),
        (SMOLLM2, 32768, 0.25, 18.7), (SMOLLM2, 32768, 0.85, 20.7),
    ],
    ids=["llama sepo", "llama dpo", "smollm2 sepo", "smollm2 dpo"],
)  # fmt: skip
def test_predictions_hold_what_was_measured_on_a_gpu(shape, tokens, share, measured):
    """results/gpu.md: gigabytes of PyTorch's allocator, which holds no context. A row is at most its budget long, so
    the prediction is from a little below to a quarter above."""
    parts = parts_of(need(model_shape(shape), "cuda", tokens, round(share * tokens)))
    assert 0.95 * measured < (sum(parts.values()) - parts["other"]) / 1e9 < 1.25 * measured


def test_the_prediction_holds_the_resident_memory_of_a_training_on_a_cpu():
    """docs/performance.md: a DPO step of SmolLM2 whose longest pair has 878 tokens, 3.73 and 3.81 GB."""
    total = sum(parts_of(need(model_shape(SMOLLM2), "cpu", 878, 750)).values()) / 1e9
    assert total == pytest.approx(3.77, rel=0.1)


def test_sharding_adapters_and_four_bits_count_what_they_save():
    shape = model_shape(LLAMA_1B)
    whole = parts_of(need(shape, "cuda", processes=8))
    cut = parts_of(need(shape, "cuda", processes=8, sharded=True))
    assert cut["AdamW"] == whole["AdamW"] / 8
    assert cut["weights"] < whole["weights"] / 2
    lora = LoraSettings(r=16)
    adapted = need(shape, "cuda", lora=lora)
    assert parts_of(adapted)["AdamW"] == 8 * trainable(adapted)
    assert parts_of(adapted)["weights"] == 2 * shape.parameters + 4 * trainable(adapted)
    small = parts_of(need(shape, "cuda", lora=lora, quantization="4bit"))
    assert small["weights"] < 0.5 * parts_of(adapted)["weights"]


@pytest.mark.parametrize("gigabytes", [4, 8, 16, 24, 40, 80])
@pytest.mark.parametrize("processes", [1, 4])
def test_what_is_proposed_fits(gigabytes, processes):
    one = need(model_shape(LLAMA_1B), "cuda", 16384, 14000, processes=processes)
    words = smallest_change(one, gigabytes * 1e9)
    choices = [dict(group) for group in options_to_fit(one)]
    for said in words.split(" or "):
        found = [group[said] for group in choices if said in group]
        assert found, said
        assert sum(parts_of(found[0]).values()) <= gigabytes * 1e9


def test_a_frozen_model_that_is_cut_up_fits_where_a_whole_one_does_not():
    shape = model_shape(LLAMA_1B)
    whole = FrozenMemory(shape, "cuda", 4, 4096, 2000, responses=64, length=512, prompt=256, processes=8)
    cut = replace(whole, sharded=True)
    assert parts_of(whole)["weights"] == 4 * shape.parameters
    # Two blocks and the embedding, whole, beside the part.
    assert parts_of(cut)["weights"] == 4 * (shape.parameters / 8 + 2 * shape.block + shape.embedding)
    assert {name for name in PARTS if parts_of(cut)[name] != parts_of(whole)[name]} == {"weights"}
    pass_over_pairs = replace(whole, responses=0)
    room = sum(parts_of(replace(pass_over_pairs, sharded=True)).values()) + 1e6
    assert smallest_change(pass_over_pairs, room) == "FSDP over 8"
    for one in (whole, cut):
        for gigabytes in (3, 4, 6, 8):
            for words in smallest_change(one, gigabytes * 1e9).split(" or "):
                found = [dict(group)[words] for group in options_to_fit(one) if words in dict(group)]
                assert not found or sum(parts_of(found[0]).values()) <= gigabytes * 1e9


def test_all_parts_are_named():
    shape = model_shape(LLAMA_1B)
    assert tuple(parts_of(need(shape))) == tuple(parts_of(FrozenMemory(shape, "cuda", 2, 512, 100))) == PARTS


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "falcon_mamba", "gemma4_text", "xlstm", "jamba"])
def test_models_without_attention_or_with_other_numbers_in_each_layer_have_a_shape(model_type):
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    try:
        model = AutoConfig.for_model(model_type, **sizes)
    except (TypeError, ValueError) as error:
        pytest.skip(f"not made from these sizes: {error}")
    shape = model_shape(model)
    assert 0 < shape.block <= shape.parameters
    assert shape.keys > 0
