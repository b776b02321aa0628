"""Steering: log π_start + α (log π_oracle − log π_reference), token by token in float64."""

import json

import numpy as np
import pytest
import torch

from sepo.cli import main
from sepo.evaluate.generate import generate_responses, uniforms
from sepo.judging.steering import Steered, steered_logps, steered_responses
from tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [(1, 4, *range(20, 20 + i), 2, 5) for i in (3, 9, 5)]


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("own_reference", [False, True])
def test_each_token_is_drawn_from_the_steered_distribution(own_reference):
    start, oracle, reference = (tiny_model("llama", torch.float64, seed=seed) for seed in (0, 1, 2))
    steered = Steered(start, oracle, reference if own_reference else None, 0.4)
    answers, ratios = steered_responses(steered, tiny_tokenizer(), PROMPTS, max_new_tokens=7, temperature=0.8, seed=5)
    for prompt, answer, ratio in zip(PROMPTS, answers, ratios, strict=True):
        ids = [*prompt, *answer.response_ids]
        own, better, base = (log_probabilities(model, ids) for model in (start, oracle, reference))
        mixed = own + 0.4 * (better - (base if own_reference else own))
        mixed = (mixed - mixed.logsumexp(-1, keepdim=True))[len(prompt) - 1 : -1]
        at = uniforms(5, prompt, 0, 0, 7)
        for step, token in enumerate(answer.response_ids):
            assert token == int(((mixed[step] / 0.8).softmax(-1).cumsum(-1) <= at[step]).sum())
            assert answer.logps[step] == pytest.approx(float(mixed[step, token]), abs=1e-9)
        tokens = torch.tensor(answer.response_ids)[:, None]
        expected = (mixed - own[len(prompt) - 1 : -1]).gather(-1, tokens).sum()
        assert ratio == pytest.approx(float(expected), abs=1e-8)


def test_without_strength_it_is_the_start_and_with_strength_1_the_oracle():
    start, oracle = (tiny_model("llama", seed=seed) for seed in (0, 1))
    for alpha, model in ((0.0, start), (1.0, oracle)):
        answers, ratios = steered_responses(
            Steered(start, oracle, None, alpha), tiny_tokenizer(), PROMPTS, max_new_tokens=8, seed=2
        )
        plain = generate_responses(model, tiny_tokenizer(), PROMPTS, max_new_tokens=8, seed=2, progress=False)
        assert [one.response_ids for one in answers] == [one.response_ids for one in plain]
        assert np.allclose(ratios, 0, atol=1e-4) == (alpha == 0)


def test_a_wider_vocabulary_is_padding():
    logits = torch.randn(2, 9, dtype=torch.float64)
    wide = torch.cat([logits, torch.full((2, 3), 7.0)], -1)
    assert torch.allclose(steered_logps([logits, wide], 0.5), logits.log_softmax(-1))


def test_generate_steers(tmp_path, capsys):
    for name, seed in (("start", 0), ("oracle", 1)):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Is it 1?"}\n{"prompt": "Is it red?"}\n')
    place = str(tmp_path)
    command = ["generate", "--prompts", f"{place}/prompts.jsonl", "--max-new-tokens", "12", "--device", "cpu"]
    steering = ["--oracle", f"{place}/oracle", "--reference", f"{place}/start"]
    for out, options in {
        "steered": ["--model", f"{place}/start", "--steer", "1", *steering],
        "oracle-alone": ["--model", f"{place}/oracle"],
    }.items():
        assert main([*command, *options, "--out", f"{place}/{out}"]) == 0
    texts = [
        [row["output"] for row in json.loads((tmp_path / out / "model_outputs.json").read_text())]
        for out in ("steered", "oracle-alone")
    ]
    assert texts[0] == texts[1]
    assert main([*command, "--model", f"{place}/start", "--steer", "2", *steering, "--out", f"{place}/steered"]) == 2
    assert main([*command, "--model", f"{place}/start", "--steer", "2", "--out", f"{place}/x"]) == 2
    assert "steering needs all of" in capsys.readouterr().err
