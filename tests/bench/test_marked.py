"""Marked mistakes: files in both public formats, measures against values that know the truth, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.bench.marked.measures import Reading, measure
from sepo.bench.marked.reading import read_answers
from sepo.bench.marked.texts import Marked, read_marked
from sepo.cli import main
from sepo.errors import UserError
from sepo.models.saving import save_model
from sepo.rewards.passes import find_models
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import tiny_tokenizer_of

TRACES = [
    {"input": "1 + 1 + 1 =", "steps": ["1 + 1 = 2.", "2 + 1 = 4.", "So 4."], "mistake_index": 1, "target": "3"},
    {"input": "2 + 2 =", "steps": ["2 + 2 = 4.", "So 4."], "mistake_index": None, "target": "4"},
    {"input": "Café?", "steps": ["É is é.", "ü is u."], "mistake_index": 0, "target": ""},
]
SPANS = [
    {
        "question": "Who?",
        "passages": [["Title", "A text."]],
        "prediction 1": "It was Ann. She left.",
        "feedback": {"errors": [{"error type": "Irrelevant", "start": 12, "end": 99}]},
    }
]


def written(folder: Path, traces=TRACES, spans=SPANS) -> tuple[Path, Path]:
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traces), encoding="utf-8")
    (folder / "spans.json").write_text(json.dumps(spans), encoding="utf-8")
    return folder / "traces.jsonl", folder / "spans.json"


def test_both_formats_are_read_with_their_wrong_parts(tmp_path):
    traces, spans = (read_marked(path) for path in written(tmp_path))
    assert [item.answer[slice(*item.wrong[0])] for item in traces if item.wrong] == ["2 + 1 = 4.", "É is é."]
    steps = [item.answer[slice(*part)] for item in traces for part in item.parts]
    assert steps == [step for row in TRACES for step in row["steps"]]
    (item,) = spans
    assert item.answer[slice(*item.wrong[0])] == "She left."
    assert item.prompt == "A text.\n\nWho?"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": "x", "steps": ["a"], "mistake_index": 3}], "row 1 .*mistake_index 3 of 1 steps"),
        ([{"input": "x", "steps": ["a"], "mistake_index": None}], "marks no mistake"),
        ([{"question": "x", "prediction 1": "y"}], "row 1 .*feedback"),
        ([7], "row 1"),
        ([], "marks no mistake"),
    ],
)
def test_a_file_that_marks_nothing_or_something_else_is_refused(rows, message, tmp_path):
    path, _ = written(tmp_path, traces=rows)
    with pytest.raises(UserError, match=message):
        read_marked(path)


@given(st.integers(0, 10**6))
@examples(40)
def test_values_that_know_the_mistake_find_it_and_random_ones_do_not(seed):
    rng = np.random.default_rng(seed)
    answers, readings = [], []
    for _ in range(60):
        parts = tuple((7 * i, 7 * i + 6) for i in range(5))
        wrong = parts[rng.integers(5)]
        answers.append(Marked("", "x" * 35, parts, (wrong,)))
        places = np.array([(i, i + 1) for i in range(35)])
        truth = np.where((places[:, 0] >= wrong[0]) & (places[:, 0] < wrong[1]), -1.0, 0.0)
        values = {"oracle": truth, "noise": rng.normal(size=35), "early": np.arange(35.0)}
        readings.append(Reading(places, values))
    result = measure(answers, readings)
    assert (result["oracle"]["auc"]["mean"], result["oracle"]["found"]["mean"]) == (1, 1)
    assert result["chance"] == pytest.approx(0.2)
    for name in ("noise", "early"):
        assert abs(result[name]["auc"]["mean"] - 0.5) < 5 * result[name]["auc"]["se"]
    assert result["beyond"]["auc"]["mean"] > 0.3


def test_tokens_are_placed_in_the_characters_of_the_answer(tmp_path):
    """Of one token a character: every value stands at its own character, also beyond ASCII."""
    for name, seed in (("oracle", 0), ("reference", 1)):
        save_model(tiny_model("llama", seed=seed), tiny_tokenizer(), tmp_path / name)
    models = find_models(str(tmp_path / "oracle"), str(tmp_path / "reference"))
    answers = [Marked("Q", "2 + 1 = 4.", ((0, 10),), ((8, 9),)), Marked("Q", "x" * 90, (), ())]
    (reading, left_out), counts = read_answers(models, answers, tmp_path / "work", max_length=60, device="cpu")
    assert left_out is None
    assert counts["too_long"] == 1
    assert reading.places[:, 0].tolist()[:10] == list(range(10))
    assert set(reading.values) == {"oracle", "surprisal", "early", "late"}


def test_the_command_writes_a_page_and_numbers(tmp_path, capsys):
    tokenizer = tiny_tokenizer_of("gpt2")
    for name, seed in (("oracle", 0), ("reference", 1)):
        save_model(tiny_model("llama", seed=seed, vocab_size=len(tokenizer)), tokenizer, tmp_path / name)
    traces, spans = written(tmp_path)
    models = ["--oracle", str(tmp_path / "oracle"), "--reference", str(tmp_path / "reference"), "--device", "cpu"]
    texts = ["--texts", str(traces), "--texts", str(spans)]
    assert main(["bench", "marked", *models, *texts, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "marked.json").read_text())
    assert (results["traces"]["answers"], results["spans"]["answers"]) == (2, 1)
    assert "| traces | 2 |" in (tmp_path / "out" / "marked.md").read_text()
    capsys.readouterr()
    assert main(["bench", "marked", *models, "--texts", str(tmp_path / "none"), "--out", str(tmp_path / "no")]) == 2
    assert "sepo: cannot read" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_files_of_one_name_are_refused(tmp_path, capsys):
    """Their results would have one place."""
    texts = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        texts += ["--texts", str(written(tmp_path / folder)[0])]
    models = ["--oracle", str(tmp_path / "oracle"), "--reference", str(tmp_path / "reference")]
    assert main(["bench", "marked", *models, *texts, "--out", str(tmp_path / "out")]) == 2
    assert "two files of --texts are named 'traces'" in capsys.readouterr().err
