"""Answers of local models that think: judged and kept without thinking; no answer where the thinking has no end."""

from __future__ import annotations

import json
import sys

import pyarrow.parquet as pq
import pytest

from sepo.cli import main
from sepo.data.thinking import answer_of
from sepo.judging.in_run import judge_responses
from sepo.recipe.settings import JudgeSettings
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import tiny_tokenizer_of

# The tags of models, each as the text before, within and after the thinking.
FORMS = {
    "Qwen 3, R1": ("<think>\n", "\n</think>\n\n"), "other case": ("<Think>", "</THINK>"),
    "Seed": ("<seed:think>", "</seed:think>"), "MiniMax": ("<mm:think>", "</mm:think>"),
    "Mistral": ("[THINK]", "[/THINK]"), "Kimi": ("◁think▷", "◁/think▷"),
    "Cohere": ("<|START_THINKING|>", "<|END_THINKING|>"), "Gemma": ("<|channel>thought\n", "<channel|>"),
    "MedGemma": ("<unused94>thought\n", "<unused95>"), "Sky": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}  # fmt: skip


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_what_follows_the_thinking_whether_its_tags_are_special_tokens_or_text(form, special):
    opening, closing = FORMS[form]
    tokenizer = tiny_tokenizer_of("qwen")
    marks = {opening.strip(), closing.strip(), *("<|channel|>", "<|message|>", "<|start|>") * (form == "gpt-oss")}
    if special and form != "gpt-oss":
        tokenizer.add_special_tokens({"extra_special_tokens": [mark.removesuffix("thought") for mark in sorted(marks)]})
    elif special:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>"]})

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    asked = ids("<|user|>\nhello<|assistant|>\n")
    assert answer_of(tokenizer, ids(f"{opening}It is [[A]]?{closing}It is blue.</s>"), asked) == "It is blue."
    assert answer_of(tokenizer, ids(f"{opening}It is [[A]]?"), asked) is None
    assert answer_of(tokenizer, ids(" It is blue.</s>"), asked) == " It is blue."
    if form != "gpt-oss":  # the prompt opens the thinking
        assert answer_of(tokenizer, ids(f"It is [[A]]?{closing}It is blue.</s>"), asked + ids(opening)) == "It is blue."
        assert answer_of(tokenizer, ids("It is [[A]]?"), asked + ids(opening)) is None
    assert answer_of(tokenizer, ids("It is blue."), ids(f"<|user|>\nWrite {opening}<|assistant|>\n")) == "It is blue."


@pytest.fixture
def thinker(tmp_path):
    """The folder of a model that the chat template lets think; its weights never end the thinking."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"
    )
    assert "<think>" in tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "thinker")
    tiny_model("llama").save_pretrained(tmp_path / "thinker")
    return tmp_path / "thinker"


def test_an_answer_whose_thinking_has_no_end_is_counted_and_neither_written_nor_asked_again(thinker, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps([{"instruction": f"Say {i}"} for i in range(3)]))
    command = ["generate", "--model", str(thinker), "--prompts", str(tmp_path / "q.json"), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--max-new-tokens", "6"]
    for _ in range(2):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "3 of 3 questions have no answer (the thinking has no end: 3)" in said
        assert "--max-new-tokens" in said
        assert json.loads((tmp_path / "out" / "model_outputs.json").read_text()) == []
        assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == 3


def test_a_run_counts_answers_whose_thinking_has_no_end_and_judges_none_of_them(thinker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "thought_judge", raising=False)
    (tmp_path / "thought_judge.py").write_text("def score(prompts, answers):\n    return [len(a) for a in answers]\n")
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"<think>yes</think>Yes, {i}!", "rejected": f"<think>no</think>no {i} here"}
        for i in range(16)
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.json").write_text(json.dumps([{"instruction": f"Say {i}"} for i in range(3)]))
    (tmp_path / "r.yaml").write_text(
        """
output_dir: run
data: {source: prefs.jsonl, held_out: 4, as_chat: true}
reference: {model: thinker}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {judge: "function:thought_judge:score", prompts: 2, max_new_tokens: 8, benchmark_max_new_tokens: 6,
       benchmarks: {alpaca_eval: questions.json}}
"""
    )
    for _ in range(2):
        assert main(["run", "r.yaml"]) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert (metrics["judge/judged"], metrics["judge/failed"]) == (0, 2)
        assert metrics["benchmarks/alpaca_eval/no_answer/policy"] == 3
        assert (metrics["benchmarks/alpaca_eval/judged"], metrics["benchmarks/alpaca_eval/failed"]) == (0, 3)
    notes = json.loads((tmp_path / "run" / "eval" / "annotations.json").read_text())
    assert {note["failure"] for note in notes} == {"no answer: the thinking has no end"}
    assert pq.read_table(tmp_path / "run" / "eval" / "generations.parquet").column("preference").to_pylist()


def test_answers_beside_one_without_an_end_are_judged(tmp_path, monkeypatch):
    from sepo.data.conversation import Conversation

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside_judge", raising=False)
    (tmp_path / "beside_judge.py").write_text("def score(prompts, answers):\n    return [len(a) for a in answers]\n")
    asked = [Conversation([{"role": "user", "content": f"q{i}"}], []) for i in range(3)]
    metrics, columns, rows = judge_responses(
        JudgeSettings(function="beside_judge:score"), asked, ["a", None, "bb"], ["aa", "a", "b"], [0, 1, 2]
    )
    assert (metrics["judge/judged"], metrics["judge/failed"], metrics["judge/win_rate"]) == (2, 1, 0.5)
    assert [row["preference"] for row in rows] == [2.0, None, 1.0]
    assert columns["base_score"][2] == 2.0
