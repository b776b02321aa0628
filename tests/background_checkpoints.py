"""Trainings with sharded checkpoints, one after the other in one folder, by launches of different sizes and kinds.

    python tests/background_checkpoints.py OUT KIND:NUMBER:STOP ...

KIND is plain (DDP where NUMBER is above 1), fsdp or hsdp (two replicas of shards), and "+lora" behind it trains an
adapter. SIGTERM arrives in step STOP; 0: train to the end; -STOP: the last process dies while it writes the checkpoint
of that step. The model, with the losses of all steps, is in OUT/model.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

import fsdp_on_cpu
from many_processes import launch
from pairs import some_pairs
from sepo import processes, sharded
from sepo.errors import Interrupted
from sepo.models.saving import save_model
from sepo.recipe.settings import LoraSettings, TrainingSettings
from sepo.sharded.checkpoints import SaveInBackground
from sepo.sharded.shards import Shards, write
from sepo.training.fit import train_model
from tiny_models import tiny_model, tiny_tokenizer


class StopAt(TrainerCallback):
    """Sends this process SIGTERM in a step; 0 for never."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def settings(**changes) -> TrainingSettings:
    values = {"learning_rate": 1e-2, "batch_size": 12, "num_train_epochs": 1.5, "tokens_per_row": 64}
    return TrainingSettings(**{**values, "save_minutes": 1e-9, "checkpoints": "sharded", **changes})


def train(out: Path, stop: int = 0, lora: bool = False, **changes) -> dict[str, float]:
    """Train the tiny model of `out` on 4 batches, in this process or in all of the launch."""
    sharded.enable()
    return train_model(
        str(out / "start"), some_pairs(48), out / "model", settings(**changes), objective="simpo", device="cpu", seed=3,
        callbacks=[StopAt(stop)], lora=LoraSettings(r=4) if lora else None,
    )  # fmt: skip


def prepare(out: Path, name: str = "llama_tied") -> Path:
    save_model(tiny_model(name, initializer_range=0.1), tiny_tokenizer(), out / "start")
    return out


def losses(out: Path) -> list[float]:
    state = json.loads((out / "model" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def die_while_writing(step: int) -> None:
    """Let the last process of the launch write half of its file in a step, and die."""

    def half(path: Path, shards: Shards) -> None:
        write(path, shards)
        if path.parents[1].name == f"checkpoint-{step}" and processes.rank() == processes.size() - 1:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    SaveInBackground.write = staticmethod(half)


def main(out: Path, kind: str, stop: int, lora: bool) -> None:
    if kind in ("fsdp", "hsdp"):
        os.environ |= fsdp_on_cpu.ENVIRONMENT
        if kind == "hsdp":
            half = str(int(os.environ["WORLD_SIZE"]) // 2)
            os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
            os.environ |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": half}
        fsdp_on_cpu.enable()
    processes.join("cpu")
    if stop < 0:
        die_while_writing(-stop)
        with contextlib.suppress(RuntimeError):  # the connection to the process that died
            train(out, 0, lora)
    elif stop == 0:
        train(out, 0, lora)
    else:
        with pytest.raises(Interrupted, match=f"the checkpoint of step {stop} of 6 is kept"):
            train(out, stop, lora)
        parts = sorted(path.name for path in (out / f"model/checkpoints/checkpoint-{stop}/shards").glob("part-*"))
        number = processes.size()
        assert parts == [f"part-{n + 1:05d}-of-{number:05d}.safetensors" for n in range(number)]
    processes.leave()


if __name__ == "__main__":
    place, *phases = sys.argv[1:]
    for phase in phases:
        kind, number, stop = phase.split(":")
        lora = kind.endswith("+lora")
        arguments = Path(place), kind.removesuffix("+lora"), int(stop), lora
        if launch(int(number), main, *arguments) != (int(stop) < 0):
            sys.exit(f"{phase} went otherwise")
