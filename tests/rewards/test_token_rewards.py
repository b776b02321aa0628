"""`token_rewards`: the numbers of the models' own forwards, offsets in the given text, and any tokenizer."""

from __future__ import annotations

import peft
import pytest
import torch

import sepo
from sepo.errors import UserError
from sepo.rewards import TokenRewards
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import KINDS, tiny_tokenizer_of

CHAT = [{"role": "user", "content": "What is it?"}]
TEXTS = ["Yes, 世界 café is ☕.", " no way ", "Yes, <|end|> it is."]


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", seed=1), tiny_model("llama")


def of_logits(oracle, reference, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The formula in float64: log π_oracle − log π_reference of each token, from the logits of one plain sequence."""
    ids = torch.tensor([[*prompt, *response]])
    logps = []
    for model in (oracle, reference):
        with torch.no_grad():
            logits = model.double()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1)[torch.arange(len(response)), ids[0, len(prompt) :]])
    return logps[0] - logps[1]


def test_the_rewards_are_the_difference_of_the_models_own_log_probabilities(models):
    tokenizer = tiny_tokenizer()
    prompts = ["Is it?", CHAT, "Is it?"]
    groups = [[" Yes!", " no"], ["It is.", "Not at all", "maybe"], [" Yes!"]]
    rewards = sepo.token_rewards(*models, prompts, groups, oracle_tokenizer=tokenizer, tokens_per_row=32)
    assert [len(group) for group in rewards] == [2, 3, 1]
    plain = [tiny_model("llama", seed=1), tiny_model("llama")]
    prompt_ids = [tokenizer("Is it?")["input_ids"], tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)]
    prompt_ids[1] = prompt_ids[1]["input_ids"] if not isinstance(prompt_ids[1], list) else prompt_ids[1]
    for number, group in enumerate(rewards):
        for result, text in zip(group, groups[number], strict=True):
            expected = of_logits(*plain, prompt_ids[number % 2], result.ids)
            torch.testing.assert_close(torch.tensor(result.rewards), expected.float(), rtol=1e-4, atol=1e-4)
            assert result.total == pytest.approx(expected.sum().item(), abs=1e-3)
            assert "".join(result.texts) == text + "</s>"
            assert [text[a:b] for a, b in result.offsets] == [*text, ""]


def test_one_prompt_gives_a_list_and_an_adapter_is_its_own_reference():
    base = tiny_model("llama")
    oracle = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    (result,) = sepo.token_rewards(oracle, None, "Is it?", [" Yes!"], oracle_tokenizer=tiny_tokenizer())
    assert isinstance(result, TokenRewards)
    assert result.total != 0
    merged = sepo.token_rewards(
        oracle.merge_and_unload(), tiny_model("llama"), "Is it?", [" Yes!"], oracle_tokenizer=tiny_tokenizer()
    )
    assert result.total == pytest.approx(merged[0].total, abs=1e-4)
    assert sepo.token_rewards(base, tiny_model("llama"), "Is it?", [], oracle_tokenizer=tiny_tokenizer()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_point_into_the_bytes_of_the_text_under_every_kind_of_tokenizer(kind):
    tokenizer = tiny_tokenizer_of(kind)
    oracle, reference = (tiny_model("llama", seed=seed, vocab_size=len(tokenizer)) for seed in (1, 0))
    for result in sepo.token_rewards(oracle, reference, CHAT, TEXTS, oracle_tokenizer=tokenizer):
        assert len(result.ids) == len(result.texts) == len(result.rewards)
        if result.offsets is None:
            assert kind == "wordpiece"  # it has no token for 世
            continue
        data = result.response.encode()
        assert [a for a, _ in result.offsets][1:] == [b for _, b in result.offsets][:-1]
        assert (result.offsets[0][0], result.offsets[-1][1]) == (0, len(data))
        if kind in ("gpt2", "qwen"):
            assert "".join(result.texts) == result.response + "<|end|>"
            whole = [i for i, text in enumerate(result.texts) if text.isascii() and text and text != "<|end|>"]
            assert all(data[slice(*result.offsets[i])].startswith(result.texts[i].encode()) for i in whole)


@pytest.mark.parametrize("allocation", ["bytes", "group", "first"])
def test_rewards_carried_to_another_tokenizer_keep_their_sum(allocation):
    source, target = tiny_tokenizer_of("gpt2"), tiny_tokenizer_of("llama2")
    oracle, reference = (tiny_model("llama", seed=seed, vocab_size=len(source)) for seed in (1, 0))
    texts, options = ["Yes, café is wonderful.", "no, 世界"], {"oracle_tokenizer": source}
    before = sepo.token_rewards(oracle, reference, CHAT, texts, **options)
    after = sepo.token_rewards(oracle, reference, CHAT, texts, tokenizer=target, allocation=allocation, **options)
    for a, b in zip(before, after, strict=True):
        assert b.total == pytest.approx(a.total, abs=1e-4)
        assert a.ids != b.ids
        known = set(target.get_vocab().values())
        assert set(b.ids) <= known
    with pytest.raises(UserError, match="response 2 of prompt 1 is another text under `tokenizer`"):
        sepo.token_rewards(oracle, reference, CHAT, texts, tokenizer=tiny_tokenizer_of("wordpiece"), **options)


def test_a_result_shows_itself_in_a_notebook_without_running_what_it_holds(models):
    (result,) = sepo.token_rewards(*models, "a", ["<script>x</script>"], oracle_tokenizer=tiny_tokenizer())
    page = result._repr_html_()
    assert "<script" not in page
    assert page.count("<span") == len(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": " Yes!"}, "responses is of type str"),
        ({"responses": [1]}, "responses is"),
        ({"prompt": 3}, "prompt is of type int"),
        ({"prompt": ["a", "b"]}, "2 prompts and 1 lists"),
        ({"responses": ["ok", "  "]}, "response 2 of prompt 1 cannot be scored: no response"),
        ({"responses": ["\ud800"]}, "response 1 of prompt 1 cannot be scored: invalid Unicode"),
        ({"reference": None}, "the reference is missing"),
        ({"reference": 3}, "the reference is of type int"),
        ({"oracle": 3}, "the oracle is of type int"),
        ({"oracle": "nowhere/at-all"}, "nowhere/at-all"),
        ({"oracle_tokenizer": None}, "pass oracle_tokenizer"),
        ({"allocation": "x"}, "allocation is 'x'"),
    ],
)
def test_what_cannot_be_scored_is_named_in_one_line(models, change, message):
    call = {
        "oracle": models[0], "reference": models[1], "prompt": "a", "responses": ["b"],
        "oracle_tokenizer": tiny_tokenizer(),
    }  # fmt: skip
    call |= change
    if change.get("oracle") in (3, "nowhere/at-all"):
        call["oracle_tokenizer"] = None
    with pytest.raises(UserError, match=message) as caught:
        sepo.token_rewards(**call)
    assert "\n" not in str(caught.value)


def test_models_that_read_differently_are_refused(models):
    with pytest.raises(UserError, match="the same model"):
        sepo.token_rewards(models[0], models[0], "a", ["b"], oracle_tokenizer=tiny_tokenizer())
    half = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="dtype is float32, the reference's bfloat16"):
        sepo.token_rewards(models[0], half, "a", ["b"], oracle_tokenizer=tiny_tokenizer())
