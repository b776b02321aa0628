"""Evaluation: gold rewards, generation, accuracy with standard errors, fidelity of token rewards, embedded tasks."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from sepo.data.ragged import SIDES
from sepo.data.splits import prompt_numbers
from sepo.data.tables import make_table
from sepo.data.templates import stop_ids
from sepo.errors import UserError
from sepo.evaluate import generate, gold
from sepo.evaluate.accuracy import oracle_accuracy, preference_accuracy
from sepo.evaluate.fidelity import fidelity
from sepo.evaluate.generate import draw_tokens, generate_responses
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.evaluate.words import token_pieces, token_values, token_words, word_truth
from sepo.forward.attention import ATTENTION
from sepo.forward.scoring import NonFiniteError
from sepo.models.weights import load_model
from sepo.report.statistics import auc
from sepo.study.policy_evaluator import sample_kl
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
EOS = 2  # of the tiny models and their tokenizer


# --- gold reward ----------------------------------------------------------------------------------------------------


def test_vader_scores_have_the_sign_of_the_sentiment_and_see_negation():
    good, bad, plain, empty, negated = gold.vader_scores(
        ["What a wonderful day.", "What a horrible day.", "The table has four legs.", "", "This is not good."]
    )
    assert -1 <= bad < 0 < good <= 1
    assert plain == empty == 0
    assert negated < 0


def test_vader_scores_of_nothing_are_an_empty_array():
    assert gold.vader_scores([]).shape == (0,)


def test_lexicon_valence_ignores_case_and_is_zero_for_other_words():
    assert gold.lexicon_valence("Good") == gold.lexicon_valence("good") > 0
    assert gold.lexicon_valence("HORRIBLE") < 0
    assert gold.lexicon_valence("table") == 0


def test_plain_scores_are_the_share_of_words_that_are_not_long():
    texts = {
        "The tea was fine, and hot.": 1,
        "The landlord was awful; the weather too.": 1 - 1 / 7,  # landlord: eight letters; weather: seven
        "Grandmother's kitchens": 0,
        "A well-known, 'friendly' café - été!": 1 - 2 / 5,  # a dash is no word
        "Überhaupt schön": 1 / 2,
        "A 1234567 a1b2c3d4": 1,  # figures are neither words nor letters
        "": 0,  # an empty response has the lowest reward
        "... !": 0,
    }
    np.testing.assert_allclose(gold.plain_scores(list(texts)), list(texts.values()))
    assert gold.plain_scores([]).shape == (0,)


def test_plain_scores_are_those_of_the_words_that_tokens_belong_to(smollm2_tokenizer):
    text = "Well, the 'unforgettable' mountain-railway (built by hand!) was closed — again."
    words, _ = token_words(smollm2_tokenizer, smollm2_tokenizer(text)["input_ids"])
    assert [gold.plain_valence(word) for word in words].count(-1) == 2
    assert gold.plain_scores([text])[0] == pytest.approx(1 + np.mean([gold.plain_valence(word) for word in words]))


def test_a_word_has_one_sign_under_plain():
    assert [gold.plain_valence(word) for word in ("landlord", "Wonderful", "good", "horribly", "bad")] == [
        -1,
        -1,
        0,
        -1,
        0,
    ]


def test_a_package_adds_a_gold_reward_by_an_entry_point():
    assert gold.gold_reward("details").scores(["Notes: name Mara; age 34."], ["Mara is 34."]).tolist() == [1]
    with pytest.raises(UserError, match=r"'detail' .did you mean 'details'.*expected one of vader, plain, arithmetic"):
        gold.gold_reward("detail")


def test_an_unknown_gold_reward_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'vader'"):
        gold.gold_reward("vadr")


def test_a_missing_vader_package_gives_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    gold._analyzer.cache_clear()
    with pytest.raises(UserError, match="vaderSentiment") as error:
        gold.gold_reward("vader")
    assert "\n" not in str(error.value)
    gold._analyzer.cache_clear()


# --- generation -----------------------------------------------------------------------------------------------------


def _prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 101, size=length).tolist() for length in lengths]


def test_samples_follow_the_softmax_of_the_logits_whatever_the_model_was_saved_with():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=2.0)
    model.generation_config.update(suppress_tokens=list(range(40, 101)), temperature=0.1)
    (prompt,) = _prompts([5])
    count, temperature = 4000, 1.5
    got = generate_responses(
        model, tokenizer, [prompt], samples=count, max_new_tokens=1, temperature=temperature, batch_size=500
    )
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, dim=-1).numpy()
    found = np.bincount([item.response_ids[0] for item in got], minlength=101) / count
    # Expected distance of a sample of this size from its distribution, with some slack; top-k 3 would be far off.
    noise = np.sqrt(2 / np.pi * expected * (1 - expected) / count).sum()
    assert np.abs(found - expected).sum() < 1.5 * noise
    assert np.sort(expected)[-3:].sum() < 0.9
    assert model.generation_config.top_k == 3  # the saved settings are restored


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_padding_and_batching_do_not_change_a_greedy_response(architecture):
    model, tokenizer = tiny_model(architecture, torch.float64), tiny_tokenizer()
    prompts = _prompts([3, 12, 7, 1, 12])
    together = generate_responses(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    for item, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert item.response_ids == alone
        assert item.finished == (alone[-1] == EOS)


def test_generation_works_on_the_packed_attention():
    model, tokenizer = tiny_model("llama", torch.float64), tiny_tokenizer()
    prompts = _prompts([3, 9])
    plain = generate_responses(model, tokenizer, prompts, max_new_tokens=8, temperature=0)
    model.set_attn_implementation(ATTENTION)
    assert generate_responses(model, tokenizer, prompts, max_new_tokens=8, temperature=0) == plain


def test_responses_come_in_prompt_order_and_end_at_their_stop_token():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = _prompts([9, 2, 5, 2])
    got = generate_responses(model, tokenizer, prompts, samples=30, max_new_tokens=25, batch_size=7, temperature=3.0)
    assert [(item.prompt_index, item.sample_index) for item in got] == [(p, s) for p in range(4) for s in range(30)]
    assert any(item.finished for item in got)
    assert any(not item.finished for item in got)
    for item in got:
        assert EOS not in item.response_ids[:-1]
        assert item.finished == (item.response_ids[-1] == EOS)
        assert item.finished or len(item.response_ids) == 25
    assert len({tuple(item.response_ids) for item in got}) > 100  # samples differ


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 1000])
def test_a_token_is_drawn_by_inverting_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(50, vocabulary, generator=generator) ** 8
    weights[torch.rand(50, vocabulary, generator=generator) < 0.5] = 0
    weights[:, vocabulary // 2] += 1e-3
    uniform = torch.rand(50, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    drawn = draw_tokens(weights, uniform).numpy()
    for row, index, number in zip(weights.double().numpy(), drawn, uniform.numpy(), strict=True):
        assert row[index] > 0
        # Sums of blocks are float32: the border between two tokens may be slightly off.
        assert row[:index].sum() / row.sum() <= number + 1e-6
        assert row[: index + 1].sum() / row.sum() >= number - 1e-6


@pytest.mark.parametrize("temperature", [0, 1.0, 2.0])
def test_log_probabilities_of_sampling_equal_those_of_scoring_the_responses(temperature):
    model, tokenizer = tiny_model("llama", torch.float64), tiny_tokenizer()
    prompts = _prompts([3, 12, 7, 1])
    got = generate_responses(model, tokenizer, prompts, samples=9, max_new_tokens=12, temperature=temperature)
    assert len({len(item.response_ids) for item in got}) > 1 or not temperature
    for item in got:
        ids = torch.tensor([prompts[item.prompt_index] + item.response_ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert item.logps == pytest.approx(logps[-len(item.response_ids) :].tolist(), abs=1e-5)  # Transformers: float32


def test_a_model_is_at_no_distance_from_itself_and_at_the_plain_sum_from_another():
    base, policy, tokenizer = tiny_model("llama"), tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    prompts = _prompts([3, 12, 7])
    own = generate_responses(base, tokenizer, prompts, samples=4, max_new_tokens=9)
    assert sample_kl(base, base, prompts, own) == pytest.approx(np.zeros(12), abs=1e-4)
    moved = generate_responses(policy, tokenizer, prompts, samples=4, max_new_tokens=9)
    for item, kl in zip(moved, sample_kl(policy, base, prompts, moved), strict=True):
        ids = torch.tensor([prompts[item.prompt_index] + item.response_ids])
        expected = 0.0
        for model, sign in ((policy, 1), (base, -1)):
            with torch.no_grad():
                logps = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1).gather(-1, ids[0, 1:, None])
            expected += sign * logps[-len(item.response_ids) :].sum().item()
        assert kl == pytest.approx(expected, abs=1e-4)


def test_sampling_is_seeded_and_changes_no_global_state():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.train()
    prompts = _prompts([4, 6])
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = generate_responses(model, tokenizer, prompts, samples=3, max_new_tokens=10, seed=1)
    assert torch.equal(torch.rand(3), expected_next)
    assert model.training
    torch.rand(100)
    assert generate_responses(model, tokenizer, prompts, samples=3, max_new_tokens=10, seed=1) == first
    assert generate_responses(model, tokenizer, prompts, samples=3, max_new_tokens=10, seed=2) != first


def _texts(got):
    return {(item.prompt_index, item.sample_index): item.response_ids for item in got}


def test_a_response_is_the_same_in_any_batch_and_beside_any_other_prompts():
    model, tokenizer = tiny_model("llama", torch.float64), tiny_tokenizer()
    prompts = _prompts([9, 3, 12, 3, 7])

    def draw(prompts, **changes):
        settings = {"samples": 3, "max_new_tokens": 12, "temperature": 2.0, "seed": 4, **changes}
        return _texts(generate_responses(model, tokenizer, prompts, progress=False, **settings))

    whole = draw(prompts)
    assert len({tuple(ids) for ids in whole.values()}) == 15
    for batch_size in (1, 2, 7, 100):
        assert draw(prompts, batch_size=batch_size) == whole
    for kept in ([0], [4, 2], [1, 3, 0]):  # fewer prompts, in another order
        some = draw([prompts[index] for index in kept])
        assert some == {(place, s): whole[index, s] for place, index in enumerate(kept) for s in range(3)}
    assert draw(prompts, samples=2) == {key: ids for key, ids in whole.items() if key[1] < 2}
    shorter = draw(prompts, max_new_tokens=5)
    assert shorter == {key: ids[:5] for key, ids in whole.items()}
    assert draw(prompts, seed=5) != whole


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.daily(3)
def test_a_start_that_prompts_share_is_read_once_and_changes_no_response(architecture, monkeypatch):
    """Except in models with windows of attention, which would count the padding behind the start."""
    # Gemma 2's softmax is in float32, where the padding of a float64 mask is not finite.
    model = tiny_model(architecture, torch.float32 if architecture == "gemma2" else torch.float64)
    tokenizer, start = tiny_tokenizer(), _prompts([12])[0]
    prompts = [[*start, *end] for end in _prompts([5, 1, 7, 3])]  # padding no longer than a window
    read = []
    forward = type(model).forward

    def counted(self, *arguments, **options):
        read.append(options["input_ids"].shape)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(counted))
    settings = {"samples": 2, "max_new_tokens": 12, "temperature": 2.0, "seed": 4, "progress": False}
    together = _texts(generate_responses(model, tokenizer, prompts, **settings))
    windows = architecture in ("mistral", "gemma2", "gemma3")
    assert model.sepo_reads_start_once is not windows
    assert ((8, 19) in read) is windows  # whole prompts
    assert ((8, 7) in read) is not windows  # prompts without the start
    alone = {}
    for number, prompt in enumerate(prompts):
        for (_, sample), ids in _texts(
            generate_responses(model, tokenizer, [prompt], batch_size=1, **settings)
        ).items():
            alone[number, sample] = ids
    assert together == alone


def test_a_model_that_counts_positions_by_its_cache_reads_prompts_whole(monkeypatch):
    """Padding within a row would shift the positions after it, and no config key says so."""
    model, tokenizer = tiny_model("llama", torch.float64), tiny_tokenizer()
    forward = type(model).forward

    def by_cache(self, *arguments, position_ids=None, past_key_values=None, **options):
        if past_key_values is not None and past_key_values.get_seq_length():
            rows, length = options["input_ids"].shape
            position_ids = past_key_values.get_seq_length() + torch.arange(length).expand(rows, length)
        return forward(self, *arguments, position_ids=position_ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(by_cache))
    start = _prompts([12])[0]
    generate_responses(model, tokenizer, [[*start, *end] for end in _prompts([9, 1])], max_new_tokens=3, progress=False)
    assert model.sepo_reads_start_once is False


def test_equal_prompts_are_answered_differently():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    got = generate_responses(model, tokenizer, _prompts([5]) * 6, max_new_tokens=8, temperature=2.0, progress=False)
    assert len({tuple(item.response_ids) for item in got}) == 6


def test_two_models_share_the_random_numbers_of_a_response_to_its_last_token():
    """With the same number per token, a slightly changed policy draws its base's tokens wherever both agree."""
    base, policy, tokenizer = tiny_model("llama"), tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.001)
    prompts = _prompts([3, 12, 7, 20, 5])
    # Batches of 2: the draws of the third must not depend on the lengths of the first two.
    settings = {"samples": 4, "max_new_tokens": 10, "temperature": 1.0, "batch_size": 2, "progress": False}
    one, two = (generate_responses(model, tokenizer, prompts, **settings) for model in (base, policy))
    agree = np.mean([a.response_ids == b.response_ids for a, b in zip(one, two, strict=True)])
    assert agree > 0.8  # 20 responses; with independent numbers almost none would agree


@pytest.mark.parametrize(("lengths", "batches"), [([10], [1]), ([20, 600, 25, 22], [1, 2, 1]), ([5] * 9, [6, 3])])
def test_a_batch_holds_the_prompts_that_fit_its_budget_and_at_least_one(monkeypatch, lengths, batches):
    monkeypatch.setitem(generate.TOKENS_AT_ONCE, "cpu", 60)
    sizes, original = [], generate._generate_batch
    monkeypatch.setattr(generate, "_generate_batch", lambda *a: sizes.append(len(a[1])) or original(*a))
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer()
    generate_responses(model, tokenizer, _prompts(lengths), max_new_tokens=5, progress=False)
    assert sizes == batches


def test_a_batch_that_does_not_fit_the_gpu_names_the_setting(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(generate, "_generate_batch", full)
    with pytest.raises(UserError, match=r"2 responses at once, of up to 20 tokens .* set eval\.batch_size"):
        generate_responses(tiny_model("llama"), tiny_tokenizer(), _prompts([3, 12]), max_new_tokens=8, progress=False)


def test_an_adapter_takes_part_in_generation():
    from peft import LoraConfig, get_peft_model

    tokenizer, prompts = tiny_tokenizer(), _prompts([4, 6])
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    with_adapter = generate_responses(model, tokenizer, prompts, max_new_tokens=10, temperature=0)
    with model.disable_adapter():
        without = generate_responses(model, tokenizer, prompts, max_new_tokens=10, temperature=0)
    assert with_adapter != without
    assert without == generate_responses(tiny_model("llama"), tokenizer, prompts, max_new_tokens=10, temperature=0)


def test_every_end_of_the_model_the_tokenizer_and_the_template_stops_a_response():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert stop_ids(model, tokenizer) == [EOS]
    model.generation_config.eos_token_id = [EOS, 50]
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}\n<|assistant|>{% endfor %}"
    assert stop_ids(model, tokenizer) == [EOS, 5, 50]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_raise_an_error(value, temperature):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        generate_responses(model, tiny_tokenizer(), [[5, 6]], temperature=temperature, progress=False)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        generate_responses(tiny_model("llama"), tiny_tokenizer(), [[5], []])


# --- accuracy and standard errors -----------------------------------------------------------------------------------


def test_accuracy_counts_ties_half_and_is_set_beside_length():
    result = preference_accuracy(
        chosen_scores=[2, 0, 1, 1],
        rejected_scores=[1, 1, 1, 0],
        chosen_lengths=[5, 9, 4, 3],
        rejected_lengths=[4, 4, 4, 8],
    )
    assert result["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert result["pairs"] == 4
    assert result["pairs_not_longer"] == 2  # one of equal length and one shorter
    assert result["accuracy_not_longer"] == 0.75
    assert result["length_baseline"] == (1 + 1 + 0.5 + 0) / 4
    assert result["accuracy_se"] == pytest.approx(np.std([1, 0, 0.5, 1], ddof=1) / 2)


def test_accuracy_without_a_pair_is_undefined_and_a_nan_score_is_no_tie():
    empty = preference_accuracy([], [], [], [])
    assert np.isnan(empty["accuracy"])
    assert np.isnan(empty["length_baseline"])
    assert np.isnan(preference_accuracy([float("nan"), 1], [0, 0], [1, 1], [2, 2])["accuracy"])


def test_accuracy_clusters_its_errors_by_prompt():
    one = preference_accuracy([1, 0, 1], [0, 1, 0], [1, 1, 1], [2, 2, 2])
    repeated = preference_accuracy(
        [1, 0, 1] * 2, [0, 1, 0] * 2, [1, 1, 1] * 2, [2, 2, 2] * 2, groups=["a", "b", "c"] * 2
    )
    assert repeated["accuracy_se"] == pytest.approx(one["accuracy_se"])
    assert repeated["accuracy_not_longer_se"] == pytest.approx(one["accuracy_not_longer_se"])


def test_accuracy_refuses_arrays_of_different_length():
    with pytest.raises(ValueError, match="one length"):
        preference_accuracy([1, 2], [1], [1], [1])


def test_mean_and_se_of_independent_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=50)
    mean, se = mean_and_se(values)
    assert mean == pytest.approx(values.mean())
    assert se == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert mean_and_se(values, groups=list(range(50))) == pytest.approx((mean, se))


def test_clustered_se_of_equal_groups_is_that_of_the_group_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 5))
    groups = np.repeat([f"prompt {i}" for i in range(12)], 5).tolist()
    mean, se = mean_and_se(values.ravel(), groups)
    assert mean == pytest.approx(values.mean())
    assert se == pytest.approx(values.mean(axis=1).std(ddof=1) / np.sqrt(12))
    assert se > 1.5 * mean_and_se(values.ravel())[1]  # ignoring the groups would be overconfident


def test_a_standard_error_needs_two_groups():
    assert np.isnan(mean_and_se([1.0, 2.0], groups=["a", "a"])[1])
    assert np.isnan(mean_and_se([])[0])
    with pytest.raises(ValueError, match="group labels"):
        mean_and_se([1.0, 2.0], groups=["a"])


def test_paired_difference_removes_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    prompt_effect = np.repeat(rng.normal(size=40) * 10, 2)
    base = prompt_effect + rng.normal(size=80) * 0.1
    policy = prompt_effect + 0.5 + rng.normal(size=80) * 0.1
    difference, se = paired_difference(policy, base, np.repeat(np.arange(40), 2).tolist())
    assert difference == pytest.approx(0.5, abs=0.1)
    assert se < 0.05
    with pytest.raises(ValueError, match="policy values"):
        paired_difference([1.0], [1.0, 2.0], [0])


# --- words ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "It was wonderful, truly GREAT!",
    'the user\'s "happy" heart-warming café — naïve 日本語 👩‍👩‍👧 text:) horrible!',
    "  leading\n\nand trailing spaces  ",
    "don't -- stop... 42 times",
]


@pytest.mark.parametrize("text", TEXTS)
def test_token_pieces_put_together_are_the_text(smollm2_tokenizer, text):
    ids = smollm2_tokenizer(text)["input_ids"]
    pieces = list(token_pieces(smollm2_tokenizer, ids))
    assert "".join(piece for _, piece in pieces) == text
    assert sum(count for count, _ in pieces) == len(ids)
    assert "\ufffd" not in "".join(piece for _, piece in pieces)


def test_words_are_split_as_in_the_gold_reward_and_tokens_belong_to_their_word(smollm2_tokenizer):
    ids = smollm2_tokenizer(TEXTS[1] + "<|im_end|>")["input_ids"]
    words, index = token_words(smollm2_tokenizer, ids)
    assert words == ["the", "user's", "happy", "heart-warming", "café", "naïve", "日本語", "text", "horrible"]
    for number, word in enumerate(words):
        tokens = np.flatnonzero(index == number)
        assert word in smollm2_tokenizer.decode([ids[token] for token in tokens])
    assert index[-1] == -1  # end of turn
    assert all(index[i] == -1 for i, token in enumerate(ids) if smollm2_tokenizer.decode([token]).strip() in {"—", "!"})


def test_all_tokens_of_a_long_word_carry_its_valence():
    tokenizer = tiny_tokenizer()  # one token per character
    text = "So good, no? bad"
    worth = word_truth(lambda word: {"good": 2, "bad": -2}.get(word, 0))
    values = token_values(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], worth)
    assert values.shape == (len(text),)
    assert values[3:7].tolist() == [2] * 4
    assert values[-3:].tolist() == [-2] * 3
    assert np.isnan(values[7])  # the comma
    assert np.isnan(values[2])  # a space


def test_special_tokens_separate_words():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("goo", add_special_tokens=False)["input_ids"] + [EOS]
    ids += tokenizer("d", add_special_tokens=False)["input_ids"]
    assert token_words(tokenizer, ids)[0] == ["goo", "d"]


def test_an_end_of_turn_without_a_name_separates_words_too():
    """Gemma's `<end_of_turn>` is a special token, but not in the tokenizer's `all_special_ids`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=True, normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<turn>")
    assert end not in tokenizer.all_special_ids
    words, index = token_words(tokenizer, [*tokenizer("good", add_special_tokens=False)["input_ids"], end])
    assert words == ["good"]
    assert index[-1] == -1


def test_a_response_cut_inside_a_character_still_has_its_words(smollm2_tokenizer):
    ids = smollm2_tokenizer("good 日")["input_ids"][:-1]
    words, index = token_words(smollm2_tokenizer, ids)
    assert words[0] == "good"
    assert len(index) == len(ids)


def test_a_response_without_tokens_has_no_words():
    words, index = token_words(tiny_tokenizer(), [])
    assert words == []
    assert index.shape == (0,)


# --- AUC and fidelity -----------------------------------------------------------------------------------------------

few_values = st.lists(st.integers(-3, 3), min_size=1, max_size=25)  # few distinct values: many ties


@given(few_values, few_values)
def test_auc_is_the_mann_whitney_statistic(targets, others):
    wins = [(t > o) + 0.5 * (t == o) for t in targets for o in others]
    assert auc(targets, others) == pytest.approx(np.mean(wins))


def test_auc_of_an_empty_side_is_undefined():
    assert np.isnan(auc([], [1.0]))


def _valence(word: str) -> float:
    return {"good": 2.0, "bad": -2.0}.get(word, 0.0)


def _columns(tokenizer, reward, pairs: int = 60, seed: int = 0) -> dict[str, list]:
    """Pairs of random words, with `reward(valence, rng)` as the token reward (valence NaN outside words)."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {f"{side}_{what}": [] for side in ("chosen", "rejected") for what in ("ids", "rewards")}
    for side in ("chosen", "rejected"):
        for _ in range(pairs):
            text = " ".join(rng.choice(["good", "bad", "tree", "house", "of", "we"], size=8)) + "."
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
            columns[f"{side}_ids"].append(ids)
            columns[f"{side}_rewards"].append(reward(token_values(tokenizer, ids, word_truth(_valence)), rng))
    return columns


def test_rewards_made_of_valence_and_noise_are_found_faithful():
    tokenizer = tiny_tokenizer()
    clean = _columns(tokenizer, lambda v, rng: np.where(np.isnan(v), 99.0, v))  # tokens outside words must not count
    result = fidelity(tokenizer, clean, truth=word_truth(_valence))
    assert result["auc"] == result["auc_positive"] == result["auc_rejected"] == 1
    assert result["auc_se"] == 0

    noisy = _columns(tokenizer, lambda v, rng: np.nan_to_num(v) + rng.normal(size=len(v)) * 2)
    result = fidelity(tokenizer, noisy, truth=word_truth(_valence))
    # The difference of two such normals has mean 2 and SD 2 * sqrt(2): P(it is above 0) = Phi(0.707) = 0.760.
    assert result["auc"] == pytest.approx(0.760, abs=4 * result["auc_se"])
    assert 0.002 < result["auc_se"] < 0.03

    backwards = _columns(tokenizer, lambda v, rng: -np.nan_to_num(v))
    assert fidelity(tokenizer, backwards, truth=word_truth(_valence))["auc"] == 0


def test_rewards_of_pure_noise_are_found_to_be_chance():
    tokenizer = tiny_tokenizer()
    result = fidelity(
        tokenizer, _columns(tokenizer, lambda v, rng: rng.normal(size=len(v))), truth=word_truth(_valence)
    )
    for key in ("auc", "auc_chosen", "auc_rejected", "auc_positive", "auc_negative"):
        assert result[key] == pytest.approx(0.5, abs=0.05)


def test_a_reward_level_that_differs_between_the_sides_does_not_raise_the_auc():
    tokenizer = tiny_tokenizer()
    columns = _columns(tokenizer, lambda v, rng: np.zeros(len(v)))
    columns["chosen_rewards"] = [row + 5 for row in columns["chosen_rewards"]]
    columns["chosen_ids"] = [tokenizer("good of", add_special_tokens=False)["input_ids"]] * 60
    columns["chosen_rewards"] = [np.full(7, 5.0)] * 60
    assert fidelity(tokenizer, columns, truth=word_truth(_valence))["auc"] == 0.5


def test_sides_and_signs_are_told_apart_and_weighted_by_their_tokens():
    tokenizer = tiny_tokenizer()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    columns = {
        "chosen_ids": [ids("good of")],  # 4 target tokens
        "chosen_rewards": [[1, 1, 1, 1, 0, 0, 0]],
        "rejected_ids": [ids("bad of")],  # 3 target tokens, rewards the wrong way round
        "rejected_rewards": [[1, 1, 1, 0, 0, 0]],
    }
    result = fidelity(tokenizer, columns, truth=word_truth(_valence))
    assert (result["auc_chosen"], result["auc_rejected"]) == (1, 0)
    assert (result["auc_positive"], result["auc_negative"]) == (1, 0)
    assert result["auc"] == pytest.approx(4 / 7)
    assert (result["tokens_positive"], result["tokens_negative"], result["tokens_other"]) == (4, 3, 4)
    assert np.isnan(result["auc_se"])  # one pair


def test_precision_is_the_share_of_selected_tokens_in_words_of_the_right_sign():
    tokenizer = tiny_tokenizer()
    columns = {
        "chosen_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("good", "of bad")],
        "chosen_rewards": [[0.0] * 4, [0.0] * 6],
        "rejected_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("bad!", "good")],
        "rejected_rewards": [[0.0] * 4, [0.0] * 4],
    }
    selection = {"chosen_positions": [[0, 1], [3, 4]], "rejected_positions": [[0, 3], [1, 2]]}
    result = fidelity(tokenizer, columns, selection, truth=word_truth(_valence))
    assert (result["precision_chosen"], result["base_rate_chosen"]) == (0.5, 0.4)
    assert (result["precision_rejected"], result["base_rate_rejected"]) == (0.25, 3 / 8)


def test_fidelity_reads_tables_and_refuses_a_selection_of_other_pairs():
    tokenizer = tiny_tokenizer()
    columns = _columns(tokenizer, lambda v, rng: np.nan_to_num(v).astype(np.float32), pairs=5)
    columns |= {"pair_id": list(range(5)), "prompt_ids": [[5]] * 5}
    table = make_table("scores", columns)
    positions = {f"{side}_{what}": [[0]] * 5 for side in ("chosen", "rejected") for what in ("positions", "weights")}
    selection = make_table("selection", {**columns, **positions})
    result = fidelity(tokenizer, table, selection, truth=word_truth(_valence))
    assert result["auc"] == 1
    others = make_table("selection", {**columns, **positions, "pair_id": list(range(1, 6))})
    with pytest.raises(ValueError, match="pair_id"):
        fidelity(tokenizer, table, others, truth=word_truth(_valence))
    with pytest.raises(ValueError, match="chosen_rewards"):
        fidelity(tokenizer, {**columns, "chosen_rewards": [[0.0]] * 5}, truth=word_truth(_valence))


def test_pairs_of_one_prompt_are_drawn_together():
    tokenizer = tiny_tokenizer()
    columns = _columns(tokenizer, lambda v, rng: np.nan_to_num(v) + rng.normal(size=len(v)) * 3, pairs=40)
    prompts = [[5, number] for number in range(40)]
    one = fidelity(tokenizer, {**columns, "prompt_ids": prompts}, truth=word_truth(_valence))
    assert one["auc_se"] == fidelity(tokenizer, columns, truth=word_truth(_valence))["auc_se"]  # each pair a prompt
    fourfold = {name: values * 4 for name, values in {**columns, "prompt_ids": prompts}.items()}
    again = fidelity(tokenizer, fourfold, truth=word_truth(_valence))
    assert again["auc"] == pytest.approx(one["auc"])
    assert again["auc_se"] == pytest.approx(one["auc_se"])  # the same pairs four times add no information
    # From a table, in random order instead of prompt by prompt.
    order = np.random.default_rng(0).permutation(160)
    mixed = {name: [values[index] for index in order] for name, values in fourfold.items()}
    table = make_table("scores", {**mixed, "pair_id": list(range(160))})
    # Prompts have other numbers, so other draws: 200 draws give the error to 5 %.
    assert fidelity(tokenizer, table, truth=word_truth(_valence))["auc_se"] == pytest.approx(one["auc_se"], rel=0.2)
    same = fidelity(tokenizer, {**columns, "prompt_ids": [[5]] * 40}, truth=word_truth(_valence))
    assert np.isnan(same["auc_se"])  # one prompt


def test_with_words_of_one_sign_only_figures_of_the_other_sign_are_undefined():
    tokenizer = tiny_tokenizer()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    columns = {
        "chosen_ids": [ids("so horrible")],  # 8 tokens of a long word
        "chosen_rewards": [[1, 1, 9] + [0] * 8],
        "rejected_ids": [ids("dreadful bad")],
        "rejected_rewards": [[2] * 8 + [9] + [1] * 3],  # the wrong way round
    }
    selection = {"chosen_positions": [[0, 1, 3, 4]], "rejected_positions": [[0, 9]]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by zero
        result = fidelity(tokenizer, columns, selection, truth=word_truth(gold.plain_valence))
    assert (result["auc_chosen"], result["auc_rejected"]) == (1, 0)
    assert result["auc"] == result["auc_negative"] == pytest.approx(1 / 2)
    assert (result["tokens_positive"], result["tokens_negative"], result["tokens_other"]) == (0, 16, 5)
    assert (result["precision_rejected"], result["base_rate_rejected"]) == (1 / 2, 8 / 12)
    assert result["base_rate_chosen"] == 0
    assert np.isnan(result["auc_positive"])
    assert np.isnan(result["precision_chosen"])  # not 0: there is no such word


def test_fidelity_of_no_pairs_is_undefined():
    empty = {"chosen_ids": [], "chosen_rewards": [], "rejected_ids": [], "rejected_rewards": []}
    result = fidelity(tiny_tokenizer(), empty, truth=word_truth(_valence))
    assert np.isnan(result["auc"])
    assert result["tokens_other"] == 0


# --- the embedded tasks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_rows() -> list[dict]:
    return pq.read_table(ROOT / "src/sepo/assets/sentiment_pairs.parquet").to_pylist()


def test_the_embedded_task_holds_out_whole_prompts(task_rows):
    prompts = {
        split: {row["prompt"][-1]["content"] for row in task_rows if row["split"] == split}
        for split in ("train", "held_out")
    }
    assert not prompts["train"] & prompts["held_out"]
    assert len(prompts["held_out"]) == 84  # as assets/README.md says
    assert sum(row["split"] == "train" for row in task_rows) == 449


def test_the_embedded_task_is_scored_by_the_gold_reward_and_leaves_headroom(task_rows):
    for side in ("chosen", "rejected"):
        texts = [row[side][0]["content"] for row in task_rows]
        scores = np.array([row[f"{side}_gold"] for row in task_rows])
        np.testing.assert_allclose(scores, gold.vader_scores(texts), atol=1e-6)
    chosen, rejected = (np.array([row[f"{side}_gold"] for row in task_rows]) for side in ("chosen", "rejected"))
    assert 0.02 < (chosen < rejected).mean() < 0.3  # labels are noisy, but not random
    assert np.abs(np.mean([chosen, rejected])) < 0.5


@pytest.fixture(scope="module")
def plain_rows() -> list[dict]:
    return pq.read_table(ROOT / "src/sepo/assets/plain_pairs.parquet").to_pylist()


def test_the_plain_task_pairs_the_same_answers_anew_and_holds_out_the_same_prompts(task_rows, plain_rows):
    def answers(rows):
        return {
            (row["split"], row["prompt"][-1]["content"], row[side][0]["content"])
            for row in rows
            for side in ("chosen", "rejected")
        }

    assert answers(plain_rows) <= answers(task_rows)
    used = Counter((row["prompt"][-1]["content"], row[s][0]["content"]) for row in plain_rows for s in SIDES)
    assert max(used.values()) <= 2
    splits = Counter(row["split"] for row in plain_rows)
    prompts = {name: {p for split, p, _ in answers(plain_rows) if split == name} for name in splits}
    assert splits == {"train": 459, "held_out": 182}  # as assets/README.md says
    assert {name: len(found) for name, found in prompts.items()} == {"train": 190, "held_out": 68}


def test_the_plain_task_is_scored_by_its_gold_reward_and_as_noisy_as_the_first(task_rows, plain_rows):
    against = {}
    for name, rows, score in (("sentiment", task_rows, gold.vader_scores), ("plain", plain_rows, gold.plain_scores)):
        chosen, rejected = (score([row[side][0]["content"] for row in rows]) for side in SIDES)
        stored = [[row[f"{side}_gold"] for row in rows] for side in SIDES]
        np.testing.assert_allclose(stored, [chosen, rejected], atol=1e-6)
        against[name] = (chosen < rejected).mean()
    assert np.abs(chosen - rejected).min() >= 0.045
    assert against["plain"] == pytest.approx(against["sentiment"], abs=0.03)


@pytest.mark.parametrize("task", ["sentiment", "plain"])
def test_an_embedded_task_is_small_conversational_and_its_responses_differ(task):
    file = ROOT / f"src/sepo/assets/{task}_pairs.parquet"
    assert file.stat().st_size < 500_000
    for row in pq.read_table(file).to_pylist():
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert row["chosen"][0]["content"] != row["rejected"][0]["content"]
        assert row["split"] in ("train", "held_out")


def _script(name: str = "make_sentiment_task"):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_labels_of_the_task_follow_bradley_terry():
    script = _script()
    a, b = script.Response("a", 3, 0.3), script.Response("b", 3, 0.0)
    rng = np.random.default_rng(0)
    draws = [script.pair_up([a, b], rng, tau=0.3, min_gap=0.1, most=3) for _ in range(2000)]
    assert np.mean([pairs[0][0] is a for pairs in draws]) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.04)
    assert script.pair_up([a, b], rng, tau=0.3, min_gap=0.5, most=3) == []


def test_the_script_pairs_within_prompts_and_writes_a_table_with_its_settings(tmp_path, capsys):
    script = _script()
    rng = np.random.default_rng(0)
    responses = [
        [script.Response(f"{topic} {template} {i}", 5 + i, rng.uniform(-1, 1)) for i in range(9)]
        for topic, template in script.KEYS
    ]
    args = script.parse_args(["--out", str(tmp_path / "new" / "task.parquet")])
    rows = script.make_rows(args, responses)
    script.summarise(rows)
    script.write(rows, args)
    table = pq.read_table(args.out)
    assert table.column_names == ["prompt", "chosen", "rejected", "chosen_gold", "rejected_gold", "split"]
    assert json.loads(table.schema.metadata[b"made_with"])["tau"] == args.tau
    assert "labels against the gold" in capsys.readouterr().out
    texts = [row[side][0]["content"] for row in table.to_pylist() for side in ("chosen", "rejected")]
    assert max(texts.count(text) for text in set(texts)) == 2  # each answer meets its two neighbours
    assert args.min_gap > 0
    for row in table.to_pylist():
        asked = row["prompt"][-1]["content"]
        (topic,) = [t for t in script.TOPICS if row["chosen"][0]["content"].startswith(t + " ")]
        assert topic in asked
        assert row["rejected"][0]["content"].startswith(topic + " ")
        assert abs(row["chosen_gold"] - row["rejected_gold"]) >= args.min_gap - 1e-6
    assert script.make_rows(args, responses) == rows  # seeded


def test_the_script_of_the_plain_task_reproduces_the_embedded_file(monkeypatch, plain_rows):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = _script("make_plain_task")
    made_with = json.loads(pq.read_schema(ROOT / "src/sepo/assets/plain_pairs.parquet").metadata[b"made_with"])
    args = script.parse_args(["--out", "nowhere"])
    assert made_with == {key: value for key, value in vars(args).items() if key != "out"}
    rows = script.make_rows(args, len)
    for made, there in zip(rows, plain_rows, strict=True):
        assert all(made[name] == there[name] for name in ("prompt", "chosen", "rejected", "split"))


def test_answers_of_the_plain_task_are_paired_at_most_twice_and_only_if_they_differ(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = _script("make_plain_task")
    answers = [script.Response(str(i), 3, score) for i, score in enumerate((0.5, 0.55, 0.7, 0.9, 0.9, 1.0))]
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = script.pair_up(answers, rng, tau=1e-3, min_gap=0.1, most=5)
        assert 3 <= len(pairs) <= 5
        assert all(chosen.gold - rejected.gold >= 0.1 - 1e-9 for chosen, rejected in pairs)  # without noise
        assert max(Counter(one.text for pair in pairs for one in pair).values()) <= 2
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert len(script.pair_up(answers, rng, tau=1e-3, min_gap=0.1, most=2)) == 2


def test_smollm2_answers_in_words_and_ends_its_turn(smollm2_dir, smollm2_tokenizer):
    model = load_model(smollm2_dir, dtype="float32", device="cpu")
    prompt = smollm2_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    (answer,) = generate_responses(model, smollm2_tokenizer, [prompt], max_new_tokens=24, temperature=0)
    assert "Paris" in smollm2_tokenizer.decode(answer.response_ids)
    assert answer.finished
    assert smollm2_tokenizer.decode(answer.response_ids[-1:]) == "<|im_end|>"


def test_the_accuracy_of_a_table_in_shards_is_that_of_the_whole_table():
    """To the last bit, with prompts that repeat in other shards by their ids or by their key."""
    draw = np.random.default_rng(0)
    ids = [[int(draw.integers(60))] for _ in range(90)]
    rewards = {f"{side}_rewards": [[float(x)] for x in draw.normal(size=90)] for side in ("chosen", "rejected")}
    columns = {"pair_id": range(90), "prompt_ids": ids, "chosen_ids": [[1]] * 90, "rejected_ids": [[2]] * 90, **rewards}
    keys = [str(draw.integers(80)) for _ in range(90)]
    for more in ({}, {"prompt_key": keys, "conversation": [""] * 90}):
        table = make_table("scores", {name: list(values) for name, values in {**columns, **more}.items()})
        whole = oracle_accuracy(table)
        assert oracle_accuracy(table.slice(start, 40) for start in (0, 40, 80)) == whole
        assert len(set(prompt_numbers(table).tolist())) not in (1, 90)
