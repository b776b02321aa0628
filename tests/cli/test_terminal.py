"""Terminals and files that know few characters: every command prints what they can show, and ends as elsewhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepo.cli import main
from sepo.cli.arguments import COMMANDS
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
# How a redirected stream is encoded where the locale is C, West European, Windows' or Japanese.
CHARSETS = ("ascii", "latin-1", "cp1252", "shift_jis")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder, with a name that few charsets know, of a model, preferences, a recipe and a grid."""
    folder = tmp_path_factory.mktemp("place") / "préférences-偏好-🙂"
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(12)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subsets = ("alpacaeval-easy", "math-prm", "hep-cpp", "donotanswer")
    bench = [{**row, "subset": subset, "id": i} for i, (row, subset) in enumerate(zip(rows, subsets, strict=False))]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench))
    base = {
        "data": {"source": str(folder / "prefs.jsonl"), "as_chat": True, "held_out": 4},
        "reference": {"model": str(folder / "model")},
        "device": "cpu",
        "oracle": {"training": {"batch_size": 4}},
        "policy": {"training": {"batch_size": 4}},
        "eval": {"prompts": 2, "max_new_tokens": 4},
    }
    (folder / "recipe.yaml").write_text(json.dumps({**base, "output_dir": str(folder / "run")}, ensure_ascii=False))
    grid = {"base": "recipe.yaml", "output_dir": str(folder / "compared"), "checkpoints": 1, "variants": {"a": {}}}
    (folder / "grid.yaml").write_text(json.dumps(grid, ensure_ascii=False))
    questions = [{"instruction": f"Est-ce là {i}, 🙂?"} for i in range(3)]
    (folder / "questions.json").write_text(json.dumps(questions))
    for name, word in (("one", "Oui"), ("two", "Peut-être")):
        answers = [{**question, "output": f"{word} 偏好", "generator": f"{name}-é"} for question in questions]
        (folder / f"{name}.json").write_text(json.dumps(answers))
    (folder / "judge_in_ascii.py").write_text(
        "def lengths(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    return folder


def commands(place: Path) -> dict[str, list[str]]:
    """Every command, in an order in which each finds what it reads."""
    data = ["--data", f"{place}/prefs.jsonl", "--as-chat", "--device", "cpu"]
    reference = ["--reference", f"{place}/model"]
    return {
        "recipe": ["recipe"],
        "recipe --list": ["recipe", "--list"],
        "run --dry-run": ["run", f"{place}/recipe.yaml", "--dry-run"],
        "run": ["run", f"{place}/recipe.yaml"],
        "oracle": ["oracle", *reference, *data, "--out", f"{place}/oracle", "batch_size=4"],
        "oracle --lora": ["oracle", *reference, *data, "--out", f"{place}/adapter", "--lora", "2", "batch_size=4"],
        "merge": ["merge", "--adapter", f"{place}/adapter", "--out", f"{place}/merged", "--device", "cpu"],
        "reward": ["reward", "--oracle", f"{place}/oracle", *reference, "--data", f"{place}/bench.jsonl",
                   "--out", f"{place}/reward", "--device", "cpu"],
        "score": ["score", "--oracle", f"{place}/oracle", *reference, *data, "--out", f"{place}/scores"],
        "transfer": ["transfer", "--table", f"{place}/scores", *data[:3], "--tokenizer", f"{place}/model",
                     "--out", f"{place}/moved"],
        "generate": ["generate", "--model", f"{place}/model", "--prompts", f"{place}/questions.json",
                     "--device", "cpu", "--out", f"{place}/answers", "--max-new-tokens", "4"],
        "sample": ["sample", "--model", f"{place}/model", "--prompts", f"{place}/questions.json", "--gold", "plain",
                   "--device", "cpu", "--out", f"{place}/sampled", "--samples", "6", "--max-new-tokens", "90"],
        "pairs": ["pairs", "--strong", f"{place}/sampled", "--weak", f"{place}/sampled", "--out", f"{place}/pairs"],
        "best-of": ["best-of", "--responses", f"{place}/sampled"],
        "judge": ["judge", "--answers", f"{place}/one.json", "--against", f"{place}/two.json",
                  "--judge", "function:judge_in_ascii:lengths", "--out", f"{place}/judged"],
        "winrate": ["winrate", f"{place}/judged/annotations.json"],
        "push": ["push", f"{place}/run", "--to", "me/mine", "--what", "scores", "--dry-run"],
        "select": ["select", "--table", f"{place}/scores", "--out", f"{place}/selection"],
        "train": ["train", "--policy", f"{place}/model", "--selection", f"{place}/selection", "--device", "cpu",
                  "--out", f"{place}/policy", "batch_size=4"],
        "eval": ["eval", "--policy", f"{place}/policy", "--base", f"{place}/model", *data, "--out", f"{place}/eval",
                 "--prompts", "2", "--max-new-tokens", "4"],
        "report": ["report", "--table", f"{place}/scores", "--out", f"{place}/report.html"],
        "analyse": ["analyse", "--table", f"{place}/scores", "--tokenizer", f"{place}/model", "--out", f"{place}/an"],
        "compare --dry-run": ["compare", f"{place}/grid.yaml", "--dry-run"],
        "compare": ["compare", f"{place}/grid.yaml"],
        "work": ["work", f"{place}/run", "--wait", "0"],
        "bench": ["bench", "laboratory", "--kinds", "late", "--pairs", "20", "--seeds", "2", "--length", "2",
                  "--out", f"{place}/lab"],
    }  # fmt: skip


def test_every_command_prints_into_ascii(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    names = {words[0] for words in commands(place).values()}
    assert names == set(COMMANDS)
    shown = ""
    for name, words in commands(place).items():
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        code = main(words)
        out.flush()
        err.flush()
        assert code == 0, (name, err.buffer.getvalue().decode())
        shown += out.buffer.getvalue().decode("ascii")
    assert "oracle: " in shown
    assert "?" in shown  # of the folder's name


WORDS = (("--help", 0), ("recipe", 0), ("recipe --list", 0), ("recipe no-préférence", 2), ("run 偏好", 2))


@pytest.mark.parametrize(
    ("charset", "words", "code"),
    [
        pytest.param(charset, words, code, marks=[] if charset == "ascii" or "偏好" in words else pytest.mark.nightly)
        for charset in (*CHARSETS, "locale")
        for words, code in WORDS
    ],
)
@pytest.mark.daily(2)
def test_a_command_redirected_to_any_charset_ends_as_in_utf8(charset, words, code):
    variables = {"PYTHONIOENCODING": charset}
    if charset == "locale":  # no coercion to UTF-8: the locale is what it says
        variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "sepo", *words.split()],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables},
    )
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)
