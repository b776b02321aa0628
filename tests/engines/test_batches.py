"""Answers and scores of a reward model as units: the files of the commands are those of one process, to the byte."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sepo.cli import main
from sepo.engines import files
from sepo.engines.files import Files
from tiny_models import tiny_model, tiny_tokenizer

QUESTIONS = [{"instruction": f"Is it {i}? " + "why " * (i % 5)} for i in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    model = tiny_model("llama", max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(1)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    for name in ("mine", "theirs"):
        rows = [{**q, "output": f"{name} says {len(q['instruction'])}", "generator": name} for q in QUESTIONS]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def answers(place: Path, out: Path, *more: str) -> tuple[bytes, bytes]:
    command = ["generate", "--model", place / "model", "--prompts", place / "questions.json", "--max-new-tokens", "5"]
    assert main([*map(str, command), "--batch-size", "2", "--device", "cpu", "--out", str(out), *more]) == 0
    return tuple((out / name).read_bytes() for name in ("finished.jsonl", "model_outputs.json"))


def test_answers_as_units_are_those_of_one_process(place, tmp_path):
    assert answers(place, tmp_path / "files", "--engine", "files") == answers(place, tmp_path / "local")
    assert sorted(path.name for path in (tmp_path / "files").iterdir() if path.name != ".lock") == [
        ".units", "finished.jsonl", "generate.json", "model_outputs.json",
    ]  # fmt: skip


def test_answers_go_on_after_the_command_and_its_worker_were_killed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "patience", 0.3)
    monkeypatch.setattr(files, "POLL", 0.02)
    expected = answers(place, tmp_path / "local")

    def killed() -> None:
        from sepo.judging import units

        read, number = units.Answers.read, iter(range(10))

        def reads(self, details):
            if next(number) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, details)

        units.Answers.read = reads
        answers(place, tmp_path / "files", "--engine", "files")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "files" / ".batches").rglob("*.json"))) == 4
    assert answers(place, tmp_path / "files", "--engine", "files") == expected


@pytest.mark.nightly
def test_a_reward_model_as_units_gives_the_verdicts_of_one_process(place, tmp_path, monkeypatch):
    monkeypatch.setattr("sepo.judging.scorers.TOKENS_AT_ONCE", {"cpu": 64})
    command = ["judge", "--answers", place / "mine.json", "--against", place / "theirs.json", "--device", "cpu"]
    command = [*map(str, command), "--judge", f"reward:{place / 'reward'}", "--out"]
    for name in ("local", "files"):
        assert main([*command, str(tmp_path / name), "--engine", name]) == 0
    first, second = ((tmp_path / name / "annotations.json").read_bytes() for name in ("local", "files"))
    assert first == second


def test_an_engine_for_a_judge_that_is_no_model_is_refused(place, tmp_path, capsys):
    command = ["judge", "--answers", place / "mine.json", "--against", place / "theirs.json", "--engine", "files"]
    assert main([*map(str, command), "--judge", "function:os:getpid", "--out", str(tmp_path / "out")]) == 2
    assert "a judge that is a reward model" in capsys.readouterr().err
