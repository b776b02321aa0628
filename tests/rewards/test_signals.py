"""Rewards for RL against the formulas, a GRPO training of TRL, and RewardBench's files."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest

import sepo
from sepo.cli import main
from sepo.errors import UserError
from sepo.rewards import RewardFunction, dense_reward, sequence_reward
from sepo.rewards.rewardbench import section_scores
from tiny_models import tiny_model, tiny_tokenizer

S = [[0.5, -3.0, 0.02], [2.0]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("reference", 0), ("oracle", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def test_the_sequence_reward_is_beta_times_the_sum_or_the_mean():
    assert sequence_reward(S) == pytest.approx([0.1 * (0.5 - 3.0 + 0.02), 0.2])
    assert sequence_reward([np.array(row) for row in S], beta=0.5, mean=True) == pytest.approx([0.5 * -2.48 / 3, 1.0])


def test_the_dense_reward_is_that_of_rto():
    first, second = dense_reward(S)
    assert first == pytest.approx([0.025, -0.05, 0.001])
    assert second == pytest.approx([0.05])
    first, second = dense_reward(S, scale=0.1, clamp=1.0, final=[2.0, -1.0])
    assert first == pytest.approx([0.05, -0.3, 2.002])
    assert second == pytest.approx([-0.8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_reward("abc"), "rewards is"),
        (lambda: sequence_reward([[]]), "response 1 are no list"),
        (lambda: sequence_reward([[1.0], ["x"]]), "response 2 are no list"),
        (lambda: sequence_reward([[float("nan")]]), "not finite"),
        (lambda: sequence_reward(S, beta=0), "beta"),
        (lambda: dense_reward(S, clamp=-1), "clamp"),
        (lambda: dense_reward(S, final=[1.0]), "final holds 1 scores"),
    ],
)
def test_wrong_rewards_are_named_in_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_reward_function_gives_the_sum_of_the_token_rewards(models):
    reward = RewardFunction(str(models / "oracle"), str(models / "reference"), beta=0.3)
    chat = [{"role": "user", "content": "Is it?"}]
    got = reward(
        ["Is it?", "Is it?", chat, "Is it?"],
        [" Yes!", " no", [{"role": "assistant", "content": "Yes!"}], "  "],
        completion_ids=None,
        trainer_state=None,
    )
    plain = sepo.token_rewards(str(models / "oracle"), str(models / "reference"), "Is it?", [" Yes!", " no"])
    (talk,) = sepo.token_rewards(str(models / "oracle"), str(models / "reference"), chat, ["Yes!"])
    assert got[:3] == pytest.approx([0.3 * item.total for item in (*plain, talk)], abs=1e-4)
    assert got[3] is None
    with pytest.raises(UserError, match="1 prompts and 2 completions"):
        reward(["a"], ["b", "c"])


def test_a_grpo_training_of_trl_takes_the_reward(models, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    reward = RewardFunction(str(models / "oracle"), str(models / "reference"), mean=True)
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, report_to="none", logging_steps=1, save_strategy="no", gradient_checkpointing=False,
        beta=0.0,
    )  # fmt: skip
    prompts = datasets.Dataset.from_list([{"prompt": f"Is it {i}?"} for i in range(8)])
    trainer = GRPOTrainer(
        str(models / "reference"), reward_funcs=reward, args=args, train_dataset=prompts,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert np.isfinite(logged["rewards/oracle_reward/mean"])
    assert logged["rewards/oracle_reward/std"] > 0


def test_rewardbench_files_have_the_form_of_its_own_script(models, tmp_path, capsys):
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i}", "subset": subset, "id": i}
        for i, subset in enumerate(["alpacaeval-easy", "math-prm", "hep-cpp", "math-prm", "donotanswer"])
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"--{name}={models / name}" for name in ("oracle", "reference")]
    out = tmp_path / "out"
    assert main(["reward", *names, "--data", str(tmp_path / "bench.jsonl"), "--out", str(out), "--device", "cpu"]) == 0
    assert "section/Reasoning" in capsys.readouterr().out
    grouped = json.loads((out / "eval-set" / "oracle.json").read_text())
    scores = json.loads((out / "eval-set-scores" / "oracle.json").read_text())
    assert grouped["model_type"] == scores["model_type"] == "DPO"
    assert {"alpacaeval-easy", "math-prm", "hep-cpp", "donotanswer"} <= grouped.keys()
    assert scores["id"] == [0, 1, 2, 3, 4]
    expected = sepo.token_rewards(
        str(models / "oracle"), str(models / "reference"), "Is it 1?", ["Yes, 1!", "no 1"], as_chat=True
    )
    assert [scores["scores_chosen"][1], scores["scores_rejected"][1]] == pytest.approx(
        [item.total for item in expected], abs=1e-4
    )
    assert scores["results"][1] == int(expected[0].total > expected[1].total)
    assert scores["text_chosen"][1].startswith("<s><|user|>Is it 1?")
    assert main(["reward", *names, "--data", str(tmp_path / "bench.jsonl") + "x", "--out", str(out)]) == 2
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert main(["reward", *names, "--data", str(tmp_path / "other.jsonl"), "--out", str(out)]) == 2
    assert "no copy of RewardBench" in capsys.readouterr().err


def test_a_section_weights_its_subsets_as_the_benchmark_does():
    scores = section_scores({"math-prm": 1.0, "hep-cpp": 0.0, "donotanswer": 0.25})
    assert scores == pytest.approx({"section/Reasoning": 984 / (984 + 164), "section/Safety": 0.25})
