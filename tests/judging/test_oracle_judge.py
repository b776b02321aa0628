"""An oracle as judge: its reward equals the formula's and `sepo score`'s; other models are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sepo.cli import main
from sepo.credit.rewards import response_sums
from sepo.data.tables import read_table
from sepo.judging.judge import scorer_of
from sepo.judging.oracle_judge import find_oracle, oracle_scorer
from sepo.recipe.settings import JudgeSettings
from tiny_models import tiny_model, tiny_tokenizer

BETA = 0.3
PAIRS = [
    {"prompt": f"Is it {word}?", "chosen": f"Yes, {word}!" + " indeed" * (i % 3), "rejected": f"no {word}" + "." * i}
    for i, word in enumerate(("red", "blue", "green", "pink", "teal", "gold", "grey", "lime") * 3)
]
RUN = """
data: {source: prefs.jsonl, held_out: 6, as_chat: true}
reference: {model: model}
device: cpu
oracle: {beta: 0.3, training: {learning_rate: 0.02, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {prompts: 0, pairs: 0}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model, a run with a full oracle, and an oracle adapter made by `sepo oracle`."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny_model("llama").save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        Path("judge.yaml").write_text("output_dir: made" + RUN)
        assert main(["run", "judge.yaml"]) == 0
        data = ["--data", "prefs.jsonl", "--as-chat", "--reference", "model", "--device", "cpu"]
        training = ["learning_rate=0.05", "batch_size=8", "--beta", str(BETA)]
        assert main(["oracle", *data, *training, "--lora", "4", "--out", "adapter"]) == 0
    return place


@pytest.fixture(autouse=True)
def here(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)


def summed_exactly(model: torch.nn.Module, prompt: str, answer: str) -> float:
    """Log-probability of an answer with its end of turn: by the library alone, in float64, one text per forward."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    tokenizer = tiny_tokenizer()
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    with torch.no_grad():
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return float(logps[:-1].gather(-1, ids[1:, None])[len(asked) - 1 :].sum())


def reward_exactly(folder: str, prompt: str, answer: str) -> float:
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64)
    before = summed_exactly(base, prompt, answer)
    if Path(folder, "adapter_config.json").is_file():
        oracle = PeftModel.from_pretrained(base, folder).double()
    else:
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return BETA * (summed_exactly(oracle.eval(), prompt, answer) - before)


def outputs(path: Path, model: str, texts: list[str]) -> str:
    rows = [{"instruction": f"Is it {i}?", "output": text, "generator": model} for i, text in enumerate(texts)]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("folder", ["made/oracle", "adapter"])
def test_an_oracles_reward_is_that_of_the_formula_in_float64(folder):
    asked = [("Is it red?", "Yes, red!"), ("Is it so", "no " * 30), ("Is it red?", ""), ("Q", "maybe"), ("Q", "a</s>b")]
    score = oracle_scorer(find_oracle(JudgeSettings(oracle=folder)), device="cpu", progress=False)
    found = score([((prompt,), answer) for prompt, answer in asked])
    exact = [reward_exactly(folder, *one) for one in asked[:-1]]  # the last answer has control tokens as text
    np.testing.assert_allclose(found[:-1], exact, atol=2e-4)
    assert np.ptp(found[:-1]) > 0.02
    assert np.isfinite(found[-1])
    assert abs(found[-1] - reward_exactly(folder, *asked[-1])) > 1e-3
    assert np.array_equal(score([((prompt,), answer) for prompt, answer in asked]), found)  # the adapter is on again


def test_an_oracle_of_plain_texts_reads_plain_texts_though_its_tokenizer_has_a_chat_template(tmp_path):
    data = ["--data", "prefs.jsonl", "--reference", "model", "--device", "cpu"]
    folder = str(tmp_path / "oracle")
    assert main(["oracle", *data, "--out", folder, "learning_rate=0.05", "batch_size=8", "--beta", str(BETA)]) == 0
    assert main(["score", *data, "--oracle", folder, "--out", str(tmp_path / "scores")]) == 0
    oracle = find_oracle(JudgeSettings(oracle=folder, reference="model"))
    found = oracle_scorer(oracle, device="cpu", progress=False)([((row["prompt"],), row["chosen"]) for row in PAIRS])
    tokenizer, exact = tiny_tokenizer(), []
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval() for name in (folder, "model")]
    for row in PAIRS:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["chosen"]))
        ids = torch.tensor([*whole, tokenizer.eos_token_id])
        with torch.no_grad():
            after, before = (model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1] for model in models)
        exact.append(BETA * (after - before).gather(-1, ids[1:, None])[len(prompt) - 1 :].sum().item())
    np.testing.assert_allclose(found, exact, atol=2e-4)
    np.testing.assert_allclose(
        found, BETA * response_sums(read_table(tmp_path / "scores", "scores"), "rewards")[0], atol=1e-5
    )


# Both kinds of oracle meet the formula each day; what follows from it is tried with one of them, at night with both.
@pytest.mark.parametrize("folder", [pytest.param("made/oracle", marks=pytest.mark.nightly), "adapter"])
def test_the_reward_is_beta_times_the_token_rewards_of_sepo_score(folder, tmp_path):
    arguments = ["--oracle", folder, "--reference", "model", "--data", "prefs.jsonl", "--as-chat", "--device", "cpu"]
    assert main(["score", *arguments, "--out", str(tmp_path / "scores")]) == 0
    sums = response_sums(read_table(tmp_path / "scores", "scores"), "rewards")
    score = oracle_scorer(find_oracle(JudgeSettings(oracle=folder)), device="cpu", progress=False)
    for side, expected in zip(("chosen", "rejected"), sums, strict=True):
        found = score([((row["prompt"],), row[side]) for row in PAIRS])
        np.testing.assert_allclose(found, BETA * expected, atol=1e-5)


def test_the_chat_template_has_the_keywords_of_the_oracles_training(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if brief %}Brief: {% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    data = ["--data", "prefs.jsonl", "--as-chat", "--chat-template", "brief=true", "--device", "cpu"]
    data += ["--reference", str(tmp_path / "model")]
    folder = str(tmp_path / "oracle")
    assert main(["oracle", *data, "--out", folder, "learning_rate=0.05", "batch_size=8", "--beta", str(BETA)]) == 0
    assert main(["score", *data, "--oracle", folder, "--out", str(tmp_path / "scores")]) == 0
    scores = read_table(tmp_path / "scores", "scores")
    assert "Brief: " in tokenizer.decode(scores["prompt_ids"][0].as_py())
    settings = JudgeSettings(oracle=folder, reference=str(tmp_path / "model"))
    found = oracle_scorer(find_oracle(settings), device="cpu", progress=False)(
        [((row["prompt"],), row["chosen"]) for row in PAIRS]
    )
    np.testing.assert_allclose(found, BETA * response_sums(scores, "rewards")[0], atol=1e-5)


@pytest.mark.parametrize("folder", ["made/oracle", pytest.param("adapter", marks=pytest.mark.nightly)])
def test_a_preference_is_bradley_terry_s_and_reverses_with_the_sides(folder, tmp_path):
    ours = outputs(tmp_path / "ours.json", "mine", ["Yes, red!", "same", "z" * 600, "no"])
    theirs = outputs(tmp_path / "theirs.json", "base", ["no red", "same", "short", "Yes, indeed"])
    rows = []
    for number, (one, other) in enumerate(((ours, theirs), (theirs, ours))):
        out = tmp_path / str(number)
        arguments = ["--answers", one, "--against", other, "--judge", f"oracle:{folder}", "--device", "cpu"]
        assert main(["judge", *arguments, "--out", str(out)]) == 0
        rows.append(json.loads((out / "annotations.json").read_text()))
        result = json.loads((out / "scores.json").read_text())
        assert (result["n_total"], result["n_unusable"]) == (3, 1)  # 600 letters exceed the model's context
    for one, other in zip(*rows, strict=True):
        if one["preference"] is None:
            assert other["preference"] is None
            continue
        ahead = one["score_2"] - one["score_1"]
        assert one["preference"] == pytest.approx(1 + 1 / (1 + np.exp(-ahead)))
        assert one["preference"] + other["preference"] == pytest.approx(3, abs=1e-5)
    assert rows[0][1]["preference"] == 1.5
    assert rows[0][2]["failure"] == "no score of one of the answers"
    assert rows[0][0]["annotator"] == f"DPO oracle {folder}"
    assert abs(rows[0][0]["preference"] - 1.5) > 0.01


def test_without_another_answer_the_mean_reward_is_the_grade(tmp_path):
    ours = outputs(tmp_path / "ours.json", "mine", ["Yes, red!", "no"])
    assert main(["judge", "--answers", ours, "--judge", "oracle:adapter", "--out", str(tmp_path / "out")]) == 0
    expected = np.mean([reward_exactly("adapter", f"Is it {i}?", text) for i, text in enumerate(("Yes, red!", "no"))])
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["score"] == pytest.approx(expected, abs=1e-4)


def test_an_oracle_without_a_record_judges_with_the_given_reference_and_beta(tmp_path):
    """Its folder records neither reference nor beta."""
    other = tmp_path / "other"
    shutil.copytree("made/oracle", other)
    (other / "trainer_state.json").unlink()
    given = JudgeSettings(oracle=str(other), reference="model", beta=BETA)
    asked = [(("Is it red?",), "Yes"), (("Is it red?",), "no")]
    own = scorer_of(JudgeSettings(oracle="made/oracle"), "cpu")(asked)
    assert np.array_equal(scorer_of(given, "cpu")(asked), own)
    twice = scorer_of(given.model_copy(update={"beta": 2 * BETA}), "cpu")(asked)
    np.testing.assert_allclose(twice, 2 * own)


@pytest.fixture
def unfit(tmp_path) -> Path:
    """A folder of models that are no oracle."""
    shutil.copytree("made/oracle", tmp_path / "alone")  # outside of its run
    shutil.copytree("made/oracle", tmp_path / "unknown")
    (tmp_path / "unknown" / "trainer_state.json").unlink()
    shutil.copytree("made/oracle", tmp_path / "others-words")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "others-words")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "another")
    tiny_tokenizer().save_pretrained(tmp_path / "another")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["oracle:nowhere"], "no oracle at 'nowhere'"),
        (["oracle:made/policy"], "trained with the objective sepo"),
        (["oracle:model"], "has no record of the beta"),
        (["oracle:model", "--judge-beta", "0.1"], "name it (--judge-reference"),
        (["oracle:model", "--judge-beta", "0.1", "--judge-reference", "model"], "every reward would be 0"),
        (["oracle:UNFIT/alone"], "name it (--judge-reference"),
        (["oracle:UNFIT/unknown", "--judge-reference", "model"], "has no record of the beta"),
        (["oracle:adapter", "--judge-beta", "0.1"], "trained with beta 0.3, not 0.1"),
        (["oracle:adapter", "--judge-reference", "UNFIT/another"], "was not trained from"),
        (["oracle:UNFIT/others-words", "--judge-reference", "model"], "have different tokenizers"),
        (["oracle:adapter", "--judge-beta", "0"], "greater than 0"),
        (["oracle:adapter", "--model-name", "x"], "behind a server"),
        (["function:json:dumps", "--judge-beta", "0.1"], "--judge-beta is for a judge that is an oracle"),
    ],
)
def test_a_model_that_is_no_oracle_is_refused_in_one_line(options, says, unfit, capsys):
    ours = outputs(unfit / "ours.json", "mine", ["a"])
    options = [one.replace("UNFIT", str(unfit)) for one in options]
    arguments = ["judge", "--answers", ours, "--against", ours, "--out", str(unfit / "out")]
    capsys.readouterr()
    assert main([*arguments, "--judge", *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (unfit / "out").exists()


def test_a_run_names_its_oracle_judge_and_the_judge_s_accuracy(trained, tmp_path, capsys):
    recipe = tmp_path / "judged.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run" + RUN.replace("prompts: 0", "prompts: 4, max_new_tokens: 8"))
    judge = "eval.judge=oracle:made/oracle"
    assert main(["run", str(recipe), "seed=1", judge]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    of_judge = json.loads(Path("made/metrics.json").read_text())
    assert metrics["judge/judged"] == 2  # held-out prompts
    assert metrics["judge/oracle_accuracy"] == of_judge["oracle/accuracy"]
    assert metrics["judge/oracle_accuracy_se"] == of_judge["oracle/accuracy_se"]
    assert metrics["judge/score/difference"] != 0
    rows = json.loads((tmp_path / "run" / "eval" / "annotations.json").read_text())
    preferences = [1 / (1 + np.exp(row["score_1"] - row["score_2"])) for row in rows]
    assert metrics["judge/win_rate"] == pytest.approx(np.mean(preferences))
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    accuracy = f"{of_judge['oracle/accuracy']:.0%}"
    for text in ("win rate against the start, by a DPO oracle as judge", "held-out pairs that this judge ranks right"):
        assert text in card
    assert "The judge is a DPO oracle" in card
    assert f"its accuracy on held-out pairs is {accuracy}" in card
    told = " ".join(capsys.readouterr().out.split())
    assert "win rate, DPO oracle as judge" in told
    assert main(["run", str(recipe), "seed=1", judge]) == 0
    assert "[eval] unchanged" in capsys.readouterr().err
    assert main(["run", str(recipe), "seed=1", "eval.judge=oracle:adapter"]) == 0
    assert "judge/oracle_accuracy" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    arguments = ["eval", "--policy", f"{tmp_path}/run/policy", "--base", "model", "--data", "prefs.jsonl", "--as-chat"]
    arguments += ["--prompts", "3", "--max-new-tokens", "6", "--out", str(tmp_path / "measured"), "--device", "cpu"]
    assert main([*arguments, "--judge", "oracle:adapter", "--judge-beta", str(BETA)]) == 0
    assert json.loads((tmp_path / "measured" / "metrics.json").read_text())["judge/judged"] == 3


def test_the_policy_s_own_oracle_is_refused_as_judge(tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run" + RUN)
    assert main(["run", str(recipe), "oracle.model=made/oracle", "eval.judge=oracle:./made/oracle"]) == 2
    assert "is the policy's own oracle" in capsys.readouterr().err


def test_a_comparison_reads_its_judge_once(tmp_path, monkeypatch):
    loaded = []

    def counted(*arguments, **options):
        loaded.append(arguments)
        return oracle_scorer(*arguments, **options)

    monkeypatch.setattr("sepo.judging.oracle_judge.oracle_scorer", counted)
    base = RUN.replace("prompts: 0, pairs: 0", 'judge: "oracle:made/oracle", prompts: 4, max_new_tokens: 6')
    (tmp_path / "base.yaml").write_text(base.replace("policy: {", "policy: {objective: simpo, "))
    (tmp_path / "grid.yaml").write_text(
        f"base: {tmp_path}/base.yaml\noutput_dir: {tmp_path}/out\ncheckpoints: [0.5, 1.0]\nkl: 0.2\nvariants:\n"
        "  simpo: {}\n  cpo: {set: {policy.objective: cpo}}\n"
    )
    assert main(["compare", str(tmp_path / "grid.yaml")]) == 0
    assert len(loaded) == 1
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert all(point["judge_failed"] == 0 for run in found["runs"] for point in run["points"])
    assert any(point["judge_win_rate"] != 0.5 for run in found["runs"] for point in run["points"])
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "by the judge DPO oracle made/oracle (held-out accuracy" in text
