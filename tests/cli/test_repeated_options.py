"""Options that are repeated with a name each: a name that is given twice is refused, not replaced by the second."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sepo.analyse.analysis import run_inputs
from sepo.cli import main
from sepo.cli.arguments import build_parser
from sepo.errors import UserError

SCORE = ["score", "--oracle", "m", "--reference", "m", "--data", "data.jsonl", "--out", "out"]
SERVER = ["--server", "http://localhost:1/v1", "--model", "m"]
GENERATE = ["generate", *SERVER, "--prompts", "questions.json", "--out", "out"]
COMMANDS = {
    "--column": [*SCORE, "--column", "chosen=a", "--column", "chosen=b"],
    "--chat-template": [*SCORE, "--chat-template", "x=1", "--chat-template", "x=2"],
    "--header": [*GENERATE, "--header", "X-A=secret1", "--header", "X-A=secret2"],
    "--request": [*GENERATE, "--request", "top_p=1", "--request", "top_p=0.5"],
    "--weights": ["bench", "credit", "--out", "out", "--task", "details", "--weights", "m=a", "--weights", "m=b"],
    "--table": ["analyse", "--table", "m=a", "--table", "m=b", "--out", "out"],
}


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of its commands that are repeated and take a name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        elif isinstance(action, argparse._AppendAction) and "=" in str(action.metavar):
            yield action.option_strings[-1]


def test_every_such_option_is_tried():
    assert set(options(build_parser())) == COMMANDS.keys()


@pytest.mark.parametrize("option", COMMANDS)
def test_a_name_that_is_given_twice_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text(json.dumps([{"instruction": "Why?"}]))
    assert main(COMMANDS[option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line
    assert "twice" in line
    assert "secret" not in line
    assert not Path("out").exists()


@pytest.mark.parametrize(("option", "value"), [("--header", "Authorization: secret"), ("--request", "=secret")])
def test_an_option_in_another_form_is_refused_without_what_may_be_a_key(option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text(json.dumps([{"instruction": "Why?"}]))
    assert main([*GENERATE, option, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected N" in line or "expected n" in line
    assert "secret" not in line


def test_a_table_does_not_take_the_place_of_a_run_of_its_name(finished_run):
    with pytest.raises(UserError, match="the run has that name"):
        run_inputs(finished_run / "run", [f"run={finished_run / 'run' / 'scores'}"])
