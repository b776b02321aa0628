"""`sepo score` of answers that are no preference pairs, and their report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import sepo
from sepo.cli import main
from sepo.data.tables import provenance_of, read_table
from sepo.errors import UserError
from sepo.report import display
from sepo.report.payload import unpack
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("reference", 0), ("oracle", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def score(models, data, out, *more: str) -> int:
    names = [f"--{name}={models / name}" for name in ("oracle", "reference")]
    return main(["score", *names, "--data", str(data), "--out", str(out), "--device", "cpu", *more])


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "one response": [{"prompt": "Is it?", "response": " Yes!"}, {"prompt": "Is it?", "response": " no"}],
    "several": [{"prompt": "Is it?", "responses": [" Yes!", " no"]}],
    "alpaca_eval": [{"instruction": "Is it?", "output": " Yes!"}, {"instruction": "Is it?", "output": " no"}],
    "completions": [{"prompt": [user("Is it?")], "completions": [[said("Yes!")], [said("no")]]}],
    "messages": [{"messages": [user("Is it?"), said("Yes!")]}, {"messages": [user("Is it?"), said("no")]}],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.daily(2)
def test_any_file_of_answers_is_scored_as_the_function_scores_it(models, tmp_path, form):
    assert score(models, written(tmp_path / "a.jsonl", FORMS[form]), tmp_path / "out") == 0
    table = read_table(tmp_path / "out", "scores")
    chat = form in ("completions", "messages")
    expected = sepo.token_rewards(
        str(models / "oracle"), str(models / "reference"), [user("Is it?")] if chat else "Is it?",
        ["Yes!", "no"] if chat else [" Yes!", " no"],
    )  # fmt: skip
    for row, result in zip(table.to_pylist(), expected, strict=True):
        assert row["chosen_ids"] == result.ids
        assert np.allclose(row["chosen_rewards"], result.rewards, atol=1e-6)
    several = len(FORMS[form]) == 1
    assert table.column("row").to_pylist() == ([0, 0] if several else [0, 1])
    assert table.column("answer").to_pylist() == ([0, 1] if several else [0, 0])
    assert provenance_of(table)["answers"] is True


def test_answers_and_pairs_are_rendered_with_the_template_of_the_reference(models, tmp_path):
    """An oracle from elsewhere may have another one."""
    own = tmp_path / "models"
    shutil.copytree(models, own)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}~{% endfor %}"
    tokenizer.save_pretrained(own / "oracle")
    answers = written(tmp_path / "a.jsonl", [{"messages": [user("Is it?"), said("Yes!")]}])
    pairs = written(
        tmp_path / "p.jsonl", [{"prompt": [user("Is it?")], "chosen": [said("Yes!")], "rejected": [said("no")]}]
    )
    ids = []
    for data in (answers, pairs):
        assert score(own, data, tmp_path / f"of-{Path(data).stem}") == 0
        (row,) = read_table(tmp_path / f"of-{Path(data).stem}", "scores").to_pylist()
        ids.append((row["prompt_ids"], row["chosen_ids"]))
    assert ids[0] == ids[1]
    text = tiny_tokenizer().apply_chat_template([user("Is it?")], add_generation_prompt=True, tokenize=False)
    assert ids[0][0] == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_report_shows_answers_without_a_second_side(models, tmp_path, capsys):
    data = written(tmp_path / "a.jsonl", [{"prompt": f"Is it {i}?", "response": f" Yes, {i}!"} for i in range(6)])
    assert score(models, data, tmp_path / "out") == 0
    assert "reward/total" in capsys.readouterr().out
    assert main(["report", "--table", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]) == 0
    page = (tmp_path / "report.html").read_text()
    header, arrays = unpack(page.split('id="data">')[1].split("</script>")[0])
    table = read_table(tmp_path / "out", "scores")
    rewards = np.concatenate(table.column("chosen_rewards").to_pylist())
    assert header["sides"] == ["chosen"]
    assert header["summary"]["tokens"] == len(rewards)
    assert np.allclose(arrays["chosen_rewards"], rewards, atol=1e-6)
    assert "rejected_rewards" not in arrays
    assert not (tmp_path / "figures" / "pair-margins.png").exists()
    assert "iframe" in display(table, 1, tokenizer=tiny_tokenizer())._repr_html_()


def test_rows_that_cannot_be_used_are_counted_and_long_answers_cut(models, tmp_path, capfd):
    rows = [
        {"prompt": "Is it?", "response": " Yes!"},
        {"prompt": "Is it?", "response": None},
        {"prompt": "Is it?", "response": "  "},
        {"prompt": None, "response": " no"},
        {"prompt": "Is it?", "response": " long" * 20},
    ]
    assert score(models, written(tmp_path / "a.jsonl", rows), tmp_path / "out", "--max-length", "20") == 0
    text = capfd.readouterr()
    assert "5 answers, 2 kept, 3 dropped" in text.out + text.err
    assert "1 responses truncated" in text.out + text.err
    assert [len(ids) for ids in read_table(tmp_path / "out", "scores").column("chosen_ids").to_pylist()] == [6, 14]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"response": " Yes!"}], [], "no column holds their prompt"),
        ([{"prompt": "a", "response": "b", "output": "c"}], [], "response and output may hold the response"),
        ([{"prompt": "a", "reply": "b"}], [], "no column 'chosen'"),
        ([{"prompt": "a", "reply": "b"}], ["--column", "response=repl"], "there is no column 'repl'"),
        ([{"prompt": "a", "response": " "}], [], "no usable answer in 1: no response"),
    ],
)
def test_a_file_without_answers_is_named_in_one_line(models, tmp_path, capsys, rows, more, message):
    assert score(models, written(tmp_path / "a.jsonl", rows), tmp_path / "out", *more) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line


def test_a_named_column_holds_the_answers(models, tmp_path):
    data = written(tmp_path / "a.jsonl", [{"question": "Is it?", "reply": " Yes!", "output": "x"}])
    assert score(models, data, tmp_path / "out", "--column", "response=reply") == 0
    assert len(read_table(tmp_path / "out", "scores")) == 1


def test_what_needs_pairs_refuses_answers(models, tmp_path):
    data = written(tmp_path / "a.jsonl", FORMS["several"])
    assert score(models, data, tmp_path / "out") == 0
    table = read_table(tmp_path / "out", "scores")
    with pytest.raises(UserError, match="answers, not of preference pairs"):
        sepo.select_key_tokens(table)
    assert main(["select", "--table", str(tmp_path / "out"), "--out", str(tmp_path / "sel")]) == 2
    assert main(["analyse", "--table", str(tmp_path / "out"), "--out", str(tmp_path / "an")]) == 2
    assert isinstance(table, pa.Table)
