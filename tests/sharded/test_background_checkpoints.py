"""Sharded checkpoints: written in the background, and continued by launches of another size and kind."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

import background_checkpoints as trainings
import spawn
from pairs import some_pairs
from sepo import processes, sharded
from sepo.cli.failures import known_failure
from sepo.errors import Interrupted, UserError
from sepo.recipe.reading import load_recipe
from sepo.recipe.settings import SftSettings, TrainingSettings
from sepo.sft import train_reference
from sepo.sharded.checkpoints import SaveInBackground
from sepo.sharded.shards import Reader, copy_own, write
from sepo.training import fit

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(made_once):
    """A training with whole checkpoints, to its end."""
    return made_once(
        "undisturbed-shards",
        lambda folder: trainings.train(trainings.prepare(folder), checkpoints="whole", save_minutes=0),
    )


def sealed(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("model/checkpoints/*/sealed.json"))


def launches(out: Path, *phases: str) -> str:
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = spawn.run([str(HERE / "background_checkpoints.py"), out, *phases], env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.nightly
def test_a_kill_while_writing_leaves_the_checkpoint_before_and_other_launches_continue(tmp_path, undisturbed):
    """One of two processes under FSDP2 dies in the write; one process goes on from the step before."""
    said = launches(trainings.prepare(tmp_path), "fsdp:2:-2", "plain:1:0")
    assert "checkpoint-2: it was not finished; removed" in said
    assert [line.rpartition("-")[2] for line in said.splitlines() if "continuing from" in line] == ["1"]
    assert trainings.losses(tmp_path) == pytest.approx(trainings.losses(undisturbed), abs=2e-5)
    ended, expected = (load_file(out / "model/model.safetensors") for out in (tmp_path, undisturbed))
    assert all(torch.allclose(ended[name], weight, atol=2e-4) for name, weight in expected.items())


@pytest.mark.nightly
@pytest.mark.parametrize(
    "phases",
    [
        ("fsdp:4:3", "fsdp:2:0"),
        ("plain:1:3", "fsdp:2:5", "plain:1:0"),
        ("plain:2:3", "fsdp:3:0"),
        ("hsdp:4:3", "fsdp:2:0"),
    ],
    ids=lambda phases: " ".join(phases),
)
def test_any_launch_continues_the_checkpoints_of_any_other(tmp_path, undisturbed, phases):
    launches(trainings.prepare(tmp_path), *phases)
    assert trainings.losses(tmp_path) == pytest.approx(trainings.losses(undisturbed), abs=2e-5)


@pytest.mark.nightly
def test_fine_tuning_of_a_reference_through_trl_continues_too(tmp_path, monkeypatch, capsys):
    """It is interrupted in the background write of its second checkpoint."""
    trainings.prepare(tmp_path)
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"text": f"Is it {i}? Yes, {i}, thanks!"}) + "\n" for i in range(24))
    )
    sharded.enable()

    def fine_tune(**changes) -> list[float]:
        training = trainings.settings(batch_size=4, num_train_epochs=1, tokens_per_row=None, **changes)
        settings = SftSettings(source=str(tmp_path / "chats.jsonl"), training=training.model_dump(), max_length=64)
        train_reference(str(tmp_path / "start"), settings, tmp_path / "model", device="cpu")
        return trainings.losses(tmp_path)

    undisturbed = fine_tune(checkpoints="whole", save_minutes=0)
    write_once, writes = SaveInBackground.write, []

    def interrupt(path, shards):
        write_once(path, shards)
        writes.append(path)
        if len(writes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SaveInBackground, "write", staticmethod(interrupt))
    with pytest.raises(Interrupted, match="is kept"):
        fine_tune()
    assert fine_tune() == undisturbed
    assert "continuing from" in capsys.readouterr().err


@pytest.mark.nightly
def test_an_adapter_over_a_sharded_base_continues_in_one_process(tmp_path):
    trainings.train(trainings.prepare(tmp_path / "whole"), lora=True, checkpoints="whole", save_minutes=0)
    launches(trainings.prepare(tmp_path / "out"), "fsdp+lora:2:3", "plain+lora:1:0")
    assert trainings.losses(tmp_path / "out") == pytest.approx(trainings.losses(tmp_path / "whole"), abs=2e-5)


class Watch(TrainerCallback):
    """Asks for checkpoints in steps 1 and 3. The write of the second waits, until step 5."""

    def __init__(self, out: Path):
        self.out, self.go = out, threading.Event()
        self.sealed: dict[int, list[str]] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def write(self, path, shards):
        if path.parents[1].name == "checkpoint-3":
            assert self.go.wait(60)
        write(path, shards)

    def on_step_end(self, args, state, control, **kwargs):
        self.sealed[state.global_step] = sealed(self.out)
        control.should_save = state.global_step in (1, 3)
        if state.global_step == 3:
            self.weights = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}
        if state.global_step == 5:
            self.go.set()

    def on_train_end(self, args, state, control, **kwargs):
        self.sealed[0] = sealed(self.out)
        reader = Reader(self.out / "model/checkpoints/checkpoint-3/shards")
        for name, expected in self.weights.items():
            stored = torch.empty_like(expected)
            reader.fill(f"model.{name}", stored)
            assert torch.equal(stored, expected), name


def train(out: Path, callback: TrainerCallback, **changes) -> None:
    sharded.enable()
    training = trainings.settings(save_minutes=100, **changes)
    arguments = (str(out / "start"), some_pairs(48), out / "model", training)
    fit.train_model(*arguments, objective="simpo", device="cpu", seed=3, callbacks=[callback])


def test_training_goes_on_while_the_copy_of_a_step_is_written(tmp_path, monkeypatch, undisturbed):
    watch = Watch(trainings.prepare(tmp_path))
    monkeypatch.setattr(SaveInBackground, "write", staticmethod(watch.write))
    train(tmp_path, watch, arguments={"save_total_limit": 1})  # one, beside the one that is written
    assert watch.sealed.pop(1) == []
    assert all(watch.sealed[step] == ["checkpoint-1"] for step in (3, 4, 5))
    assert watch.sealed[0] == ["checkpoint-1", "checkpoint-3"]
    assert trainings.losses(tmp_path) == trainings.losses(undisturbed)


def test_a_full_disk_ends_the_training_in_one_line_and_the_checkpoint_before_continues(
    tmp_path, monkeypatch, undisturbed, capsys
):
    """The error is the one of the library that writes the files, on a disk that was really full."""

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step in (2, 4)

    def full(path, shards):
        if path.parents[1].name == "checkpoint-4":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(path, shards)

    monkeypatch.setattr(SaveInBackground, "write", staticmethod(full))
    with pytest.raises(SafetensorError) as error:
        train(trainings.prepare(tmp_path), At())
    assert str(known_failure(error.value)).startswith("the disk is full: free some space")
    assert sealed(tmp_path) == ["checkpoint-2"]
    monkeypatch.setattr(SaveInBackground, "write", staticmethod(write))
    train(tmp_path, At())
    assert "checkpoint-4: it was not finished; removed" in capsys.readouterr().err
    assert trainings.losses(tmp_path) == trainings.losses(undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw_torch"])
def test_states_of_optimizers_are_continued_to_the_last_bit(tmp_path, optimizer):
    """Momentum; factors of rows and columns (Adafactor); moments and numbers of steps."""
    how = {"optim": optimizer} | ({"optim_args": "momentum=0.9"} if optimizer == "sgd" else {})
    for name, stops in (("whole", (0,)), ("stopped", (3, 0))):
        out = trainings.prepare(tmp_path / name)
        for stop in stops:
            if stop:
                with pytest.raises(Interrupted):
                    trainings.train(out, stop, arguments=how, save_minutes=100)
            else:
                trainings.train(out, arguments=how, save_minutes=100)
    assert trainings.losses(tmp_path / "stopped") == trainings.losses(tmp_path / "whole")


def test_shards_of_any_cut_are_put_together_and_what_is_missing_is_named(tmp_path):
    whole = torch.arange(30.0).reshape(5, 6)
    for number, (offsets, part) in enumerate([((0, 0), whole[:2]), ((2, 0), whole[2:, :4]), ((2, 4), whole[2:, 4:])]):
        write(tmp_path / f"part-{number}.safetensors", {"w": (offsets, part.contiguous())})
    filled = torch.zeros(5, 6)
    Reader(tmp_path).fill("w", filled)
    assert torch.equal(filled, whole)
    with pytest.raises(UserError, match=r"w is \[5, 6\], and the model's is \[5, 7\]"):
        Reader(tmp_path).fill("w", torch.zeros(5, 7))
    with pytest.raises(UserError, match="v is missing"):
        Reader(tmp_path).fill("v", torch.zeros(5, 7))
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="w is not whole: 12 of 30 values are missing"):
        Reader(tmp_path).fill("w", filled)
    (tmp_path / "part-1.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match=r"part-1.safetensors' cannot be read"):
        Reader(tmp_path)


def test_processes_that_hold_the_same_tensors_share_the_writing(monkeypatch):
    tensors = {name: torch.ones(2) for name in "abcde"}
    monkeypatch.setattr(processes, "size", lambda: 2)
    written = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        written.append("".join(copy_own(tensors)))
    assert written == ["ace", "bd"]


def test_a_training_of_an_earlier_release_stays_up_to_date():
    assert "checkpoints" not in TrainingSettings().model_dump()
    assert TrainingSettings(checkpoints="sharded").model_dump()["checkpoints"] == "sharded"


def test_deepspeed_with_sharded_checkpoints_is_refused_in_one_line(monkeypatch):
    recipe = load_recipe("quickstart", ["oracle.training.checkpoints=sharded"])
    sharded.check(recipe)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"oracle.training.checkpoints: DeepSpeed writes checkpoints of its own"):
        sharded.check(recipe)
