"""Policy and base are scored in the same types: a model's KL to itself is 0, to the last bit."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pairs import config, some_pairs
from sepo.credit.rewards import response_sums
from sepo.data.tables import provenance_of, with_provenance, write_table
from sepo.evaluate import measure
from sepo.evaluate.generate import generate_responses
from sepo.evaluate.gold import GOLD_REWARDS, GoldReward, lexicon_valence
from sepo.evaluate.measure import Evaluation, own_logps, response_logps
from sepo.evaluate.words import word_truth
from sepo.forward.scoring import Types, dataset_logps, read_like
from sepo.recipe.reading import parse_recipe
from sepo.recipe.settings import EvalSettings
from sepo.stages.logps import logps_pass
from sepo.stages.stage import Model
from sepo.study import stages as measured
from sepo.study.policy_evaluator import Checkpoints, PolicyEvaluator, sample_kl, start_of
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

SETTINGS = EvalSettings(prompts=6, samples=2, max_new_tokens=9)


def prompts_of(pairs, number=6):
    return pairs.column("prompt_ids").to_pylist()[:number]


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_table(tmp_path / "pairs", some_pairs(40))
    return tmp_path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", None])
@pytest.mark.daily(3)
def test_a_model_does_not_differ_from_itself_whatever_was_stored(folder, dtype, stored):
    model = str(folder / "model")
    if stored:
        logps_pass(model, folder / "pairs", folder / "logps", device="cpu", types=Types(stored))
    metrics = Evaluation(
        model, model, folder / "pairs", folder / "eval", SETTINGS,
        base_logps=folder / "logps" if stored else None, device="cpu", dtype=dtype,
    ).measure()  # fmt: skip
    assert metrics["policy/accuracy"] == 0.5  # margins of exactly 0: ties
    assert metrics["policy/accuracy_se"] == 0
    kl = pq.read_table(folder / "eval" / "generations.parquet").column("policy_kl").to_numpy()
    if dtype == "bfloat16":
        assert np.array_equal(kl, np.zeros(12))
    else:  # log-probabilities of sampling against those of scoring
        assert np.abs(kl).max() < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_in_bfloat16_a_policy_reads_its_responses_again(architecture):
    model, tokenizer = tiny_model(architecture, torch.bfloat16), tiny_tokenizer()
    prompts = prompts_of(some_pairs(40))
    own = generate_responses(model, tokenizer, prompts, samples=3, max_new_tokens=9, progress=False)
    kept = np.array([sum(one.logps) for one in own])
    assert np.abs(kept - response_logps(model, prompts, own)).max() > 0.01  # the reason
    assert np.array_equal(sample_kl(model, model, prompts, own), np.zeros(18))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_in_float32_log_probabilities_of_sampling_equal_those_of_scoring(architecture):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    prompts = prompts_of(some_pairs(40))
    own = generate_responses(model, tokenizer, prompts, samples=3, max_new_tokens=9, progress=False)
    assert own_logps(model, prompts, own) == pytest.approx(response_logps(model, prompts, own), abs=2e-4)


def test_stored_log_probabilities_are_used_only_where_the_numerics_are_equal():
    pairs, model = some_pairs(40), tiny_model("llama")
    logps = dataset_logps(model, pairs)
    assert provenance_of(logps)["dtype"] == "float32"
    assert provenance_of(logps)["device"] == "cpu"
    assert read_like(logps, model)
    assert not read_like(logps, tiny_model("llama", torch.bfloat16))
    assert not read_like(with_provenance(logps, "logps", {}), model)  # unknown numerics
    assert not read_like(with_provenance(logps, "logps", {"dtype": "float32", "device": "cuda"}), model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dataset_logps(model, pairs)
        assert read_like(rounded, model)
        assert not read_like(logps, model)
    assert not read_like(rounded, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_unchanged_policy_has_no_kl_and_an_accuracy_of_one_half(dtype):
    base, policy, tokenizer = tiny_model("llama", dtype), tiny_model("llama", dtype), tiny_tokenizer()
    pairs = some_pairs(40)
    asked = pairs.slice(0, 6)
    stored = dataset_logps(tiny_model("llama"), pairs)  # float32, as scoring stores them
    judge = PolicyEvaluator(
        base, tokenizer, asked, SETTINGS, 0, start_of(base, tokenizer, asked, SETTINGS, 0), pairs, stored
    )
    figures = judge.measure(policy)
    assert (figures["accuracy"], figures["accuracy_se"]) == (0.5, 0)
    assert figures["kl"] == pytest.approx(0, abs=0 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.daily(1)
def test_a_policy_in_mixed_precision_that_does_not_move_has_no_kl(tmp_path, lora, monkeypatch):
    """Sampling uses the wrapped forward in bfloat16; scoring bypasses it, in float32."""
    lengths = GoldReward(
        lambda questions, texts: np.array([float(len(text)) for text in texts]), word_truth(lexicon_valence)
    )
    monkeypatch.setitem(GOLD_REWARDS, "vader", lengths)
    base, policy, tokenizer, pairs = tiny_model("llama"), tiny_model("llama"), tiny_tokenizer(), some_pairs(8)
    if lora:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(target_modules="all-linear"))
    asked, settings = pairs.slice(0, 6), SETTINGS.model_copy(update={"gold": "vader"})
    judge = PolicyEvaluator(base, tokenizer, asked, settings, 0, start_of(base, tokenizer, asked, settings, 0), pairs)
    watch = Checkpoints(judge, [1.0], tmp_path / "points.json", len(pairs))
    trainer = PreferenceTrainer(
        policy, config(tmp_path, bf16=True, learning_rate=0.0, objective="simpo"), pairs, callbacks=[watch]
    )
    trainer.train()
    assert (watch.points[-1]["kl"], watch.points[-1]["kl_se"]) == (0, 0)


def test_policy_and_base_are_not_in_memory_together(folder, monkeypatch):
    loaded, load = [], measure.load_model

    def watched(*arguments, **settings):
        gc.collect()
        assert [model for model in loaded if model() is not None] == []
        model = load(*arguments, **settings)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measure, "load_model", watched)
    Evaluation(
        str(folder / "model"), str(folder / "model"), folder / "pairs", folder / "eval", SETTINGS, device="cpu"
    ).measure()
    assert len(loaded) == 2


def test_the_start_of_a_comparison_is_read_in_the_types_that_its_policy_trains_in(folder, monkeypatch):
    monkeypatch.setattr(measured, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **settings: True)
    start = Model(str(folder / "model"), "")
    for policy, dtype, quantization in (
        ({}, "float32", None),
        ({"lora": {}}, "bfloat16", None),
        ({"lora": {}, "quantization": "4bit"}, "bfloat16", "4bit"),
    ):
        for scoring in ("auto", "float32", "bfloat16"):  # the types of scoring do not matter
            recipe = parse_recipe({"policy": policy, "dtype": scoring}, "test")
            assert measured.training_types(recipe, start) == {"dtype": dtype, "quantization": quantization}


def test_sums_of_stored_and_of_new_log_probabilities_are_equal_to_the_last_bit(folder):
    """Stored and new log-probabilities come from the same rows, so a tie stays a tie."""
    logps_pass(str(folder / "model"), folder / "pairs", folder / "logps", device="cpu", types=Types("float32"))
    table = pq.read_table(folder / "logps" / "part-00000.parquet")
    again = dataset_logps(tiny_model("llama"), some_pairs(40))
    for one, other in zip(response_sums(table, "logps"), response_sums(again, "logps"), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(("number", "read"), [(None, 40), (10, 10), (0, 0)])
def test_policy_and_base_score_the_set_number_of_pairs(folder, monkeypatch, number, read):
    seen = []
    monkeypatch.setattr(
        measure, "dataset_logps", lambda model, pairs, **_: seen.append(len(pairs)) or dataset_logps(model, pairs)
    )
    model = str(folder / "model")
    logps_pass(model, folder / "pairs", folder / "logps", device="cpu")
    settings = SETTINGS.model_copy(update={"pairs": number})
    metrics = Evaluation(
        model, model, folder / "pairs", folder / "eval", settings, base_logps=folder / "logps", device="cpu"
    ).measure()
    assert metrics.get("policy/pairs", 0) == read
    assert [count for count in seen if count != 12] == ([read] if read else [])  # 12 are the responses


def test_examples_are_some_of_the_prompts_at_their_own_temperature(folder):
    model = str(folder / "model")
    cold = SETTINGS.model_copy(update={"examples": 3, "examples_temperature": 1e-3, "gold": "vader"})
    Evaluation(model, model, folder / "pairs", folder / "eval", cold, device="cpu").measure()
    rows = pq.read_table(folder / "eval" / "examples.parquet").to_pylist()
    assert len(rows) == 3
    assert all(row["base"] == row["policy"] and row["base_gold"] == row["policy_gold"] for row in rows)
    tokenizer, prompts = tiny_tokenizer(), prompts_of(some_pairs(40), 40)
    plain = generate_responses(tiny_model("llama"), tokenizer, prompts, max_new_tokens=9, temperature=0, progress=False)
    assert {row["policy"] for row in rows} <= set(measure.decoded(tokenizer, plain))  # the most likely tokens
    none = SETTINGS.model_copy(update={"examples": 0})
    Evaluation(model, model, folder / "pairs", folder / "other", none, device="cpu").measure()
    assert not (folder / "other" / "examples.parquet").exists()
