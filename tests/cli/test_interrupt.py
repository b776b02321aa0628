"""Ctrl-C and SIGTERM: what a command says and keeps, and that the same command continues from there to the same bytes.

A run interrupted in each of its stages, and one of several processes: `tests/faults.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

import spawn
from pairs import some_pairs
from sepo.cli import main
from sepo.data.tables import make_table, read_table, write_table
from sepo.errors import Interrupted
from sepo.stages import logps
from sepo.training.interrupt import StopSignals
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, preferences, a selection and a grid."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(24)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selection = {name: some_pairs(24).column(name) for name in some_pairs(1).column_names}
    for side in ("chosen", "rejected"):
        selection |= {f"{side}_positions": [[0]] * 24, f"{side}_weights": [[1.0]] * 24}
    write_table(folder / "selection", make_table("selection", selection))
    (folder / "grid.yaml").write_text(
        f"""
name: grid
checkpoints: [0.5]
keep_models: true
set:
  data: {{source: {folder / "prefs.jsonl"}, as_chat: true, held_out: 4}}
  reference: {{model: {folder / "model"}}}
  device: cpu
  policy: {{training: {{learning_rate: 0.001, batch_size: 4, num_train_epochs: 2}}}}
  eval: {{prompts: 2, max_new_tokens: 4}}
variants: {{simpo: {{set: {{policy.objective: simpo}}}}}}
"""
    )
    return folder


COMMANDS = {
    "oracle": "oracle --reference {0}/model --data {0}/prefs.jsonl --as-chat --out {1}/out --device cpu batch_size=4",
    "train": "train --policy {0}/model --selection {0}/selection --out {1}/out --device cpu batch_size=4",
    "compare": "compare {0}/grid.yaml",
}


def give(name: str, place: Path, folder: Path) -> int:
    """Give a command in a folder of its own; `compare` writes into runs/ there."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(COMMANDS[name].format(place, folder).split())
    finally:
        os.chdir(before)


def models(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("model.safetensors")}


@pytest.fixture
def interrupt_at(monkeypatch):
    """A function: send a signal to this process in the given training step, so many times."""

    def arrange(step: int, number: int, times: int = 1) -> None:
        original = PreferenceTrainer.training_step
        left = [times]

        def training_step(self, *arguments, **keywords):
            if self.state.global_step == step - 1:
                while left[0]:
                    left[0] -= 1
                    signal.raise_signal(number)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(PreferenceTrainer, "training_step", training_step)

    return arrange


@pytest.fixture(scope="module")
def undisturbed(made_once, place):
    """A function: what a command makes that nobody interrupts."""

    def models_of(name: str) -> dict[str, bytes]:
        return models(made_once(f"undisturbed-{name}", lambda folder: give(name, place, folder)))

    return models_of


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("oracle", signal.SIGINT),
        ("oracle", signal.SIGTERM),
        ("train", signal.SIGINT),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.nightly),
        pytest.param("compare", signal.SIGINT, marks=pytest.mark.nightly),
        ("compare", signal.SIGTERM),
    ],
)
@pytest.mark.daily(2)
def test_an_interrupted_training_keeps_its_step_and_goes_on_from_there(
    name, number, place, undisturbed, tmp_path, interrupt_at, capsys
):
    whole = undisturbed(name)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(3, number)
    capsys.readouterr()
    assert give(name, place, tmp_path / "stopped") == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr().err.splitlines()
    assert "  stopping with a checkpoint when this step is done; Ctrl-C again stops at once" in said
    steps = {"oracle": 6, "train": 6, "compare": 10}[name]
    last = f"sepo: interrupted: the checkpoint of step 3 of {steps} is kept; the same command continues from there"
    assert said[-1] == last
    assert give(name, place, tmp_path / "stopped") == 0
    assert re.search(r"continuing from \S*checkpoint-3$", capsys.readouterr().err, flags=re.MULTILINE)
    assert whole
    assert models(tmp_path / "stopped") == whole


def test_ctrl_c_again_stops_at_once_and_says_what_there_is(place, tmp_path, interrupt_at, capsys):
    interrupt_at(3, signal.SIGINT, times=2)
    assert give("oracle", place, tmp_path) == 130
    said = capsys.readouterr().err
    last = "this training has no checkpoint yet: the same command starts it again, and earlier results are kept"
    assert said.endswith(f"sepo: interrupted: {last}\n")
    interrupt_at(3, signal.SIGINT)
    assert give("oracle", place, tmp_path) == 130
    interrupt_at(5, signal.SIGINT, times=2)
    capsys.readouterr()
    assert give("oracle", place, tmp_path) == 130
    said = capsys.readouterr().err
    assert said.endswith("sepo: interrupted: the checkpoint of step 3 is kept; the same command continues from there\n")


def test_an_interruption_in_the_last_step_keeps_the_model(place, tmp_path, interrupt_at, capsys):
    interrupt_at(6, signal.SIGINT)
    assert give("train", place, tmp_path) == 130
    assert "sepo: interrupted: the model is trained and kept in" in capsys.readouterr().err.splitlines()[-1]
    assert give("train", place, tmp_path) == 0
    assert "exists, trained with the same model, data and settings: reused" in capsys.readouterr().err


def test_a_checkpoint_is_kept_also_where_none_were_asked_for(place, tmp_path, interrupt_at, capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"] + " save_minutes=0")
    interrupt_at(2, signal.SIGINT)
    assert give("train", place, tmp_path) == 130
    assert "the checkpoint of step 2 of 6 is kept" in capsys.readouterr().err


def test_an_interrupted_pass_keeps_its_shards(place, tmp_path, monkeypatch, capsys):
    write_table(tmp_path / "pairs", some_pairs(6), rows_per_shard=2)
    write = logps.write_shard

    def then_interrupted(*arguments):
        write(*arguments)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(logps, "write_shard", then_interrupted)
        with pytest.raises(Interrupted, match=r"1 of 3 parts of '.*' are kept; the same command continues"):
            logps.logps_pass(str(place / "model"), tmp_path / "pairs", tmp_path / "logps", device="cpu")
    first = (tmp_path / "logps" / "part-00000.parquet").stat().st_mtime_ns
    logps.logps_pass(str(place / "model"), tmp_path / "pairs", tmp_path / "logps", device="cpu")
    assert len(read_table(tmp_path / "logps", "logps")) == 6
    assert (tmp_path / "logps" / "part-00000.parquet").stat().st_mtime_ns == first


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_of_the_data_loader_does_not_end_a_training_that_is_interrupted(
    workers, place, tmp_path, interrupt_at, capsys, monkeypatch
):
    """Ctrl-C goes to all processes of a terminal, also to those that lay out rows."""
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"] + f" arguments.dataloader_num_workers={workers}")
    note, reached = StopSignals._note, []

    def to_the_workers_too(self, number, frame):
        for worker in multiprocessing.active_children():  # none in a worker
            os.kill(worker.pid, number)
            reached.append(worker.pid)
        note(self, number, frame)

    monkeypatch.setattr(StopSignals, "_note", to_the_workers_too)
    interrupt_at(3, signal.SIGINT)
    assert give("train", place, tmp_path) == 130
    assert len(reached) == workers
    assert "the checkpoint of step 3 of 6 is kept" in capsys.readouterr().err
    assert give("train", place, tmp_path) == 0


# A command with a bar that writes a line at every step, although TQDM_DISABLE=1 holds in tests.
WITH_A_BAR = """
import sys
from functools import partial
from sepo import bars
from sepo.cli import main
bars._LOGGED, bars._Lines = 0.0, partial(bars._Lines, disable=False)
sys.exit(main(sys.argv[1:]))
"""


def test_messages_stand_on_lines_of_their_own_beside_a_bar(place, tmp_path):
    command = COMMANDS["oracle"].format(place, tmp_path).split()
    with open(tmp_path / "err", "w") as err:
        child = spawn.start(["-c", WITH_A_BAR, *command, "num_train_epochs=200"], stderr=err.fileno())
        while "/1200 [" not in (tmp_path / "err").read_text() and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.wait() == 130
    text = (tmp_path / "err").read_text()
    lines = text.splitlines()  # also at a carriage return, with which a bar is drawn anew
    assert "  stopping with a checkpoint when this step is done; Ctrl-C again stops at once" in lines
    (last,) = [line for line in text.split("\n") if "interrupted" in line]
    assert re.fullmatch(r"sepo: interrupted: the checkpoint of step \d+ of 1200 is kept; .* continues from there", last)
    shutil.rmtree(tmp_path / "out")
