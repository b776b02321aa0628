"""Processes of a launch that train with a checkpoint after each step, and stop after some, or continue from the last.

    python tests/sharded_checkpoints.py OUT STOP NUMBER      NUMBER processes; STOP 0: train to the end

The main process prints the losses of all steps, those before a continuation too.
"""

import json
import sys
from pathlib import Path

from transformers import TrainerCallback

import fsdp_on_cpu
from many_processes import BATCH, launch
from pairs import some_pairs
from sepo import processes
from sepo.models.weights import load_model
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import tiny_model


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step or control.should_training_stop


def main(out: Path, stop: int) -> None:
    fsdp_on_cpu.enable()
    processes.join("cpu")
    number = processes.size()
    processes.on_main(lambda: tiny_model("llama", initializer_range=0.1).save_pretrained(out / "model"))
    config = PreferenceConfig(
        str(out / "checkpoints"), objective="simpo", use_cpu=True, report_to="none", save_strategy="steps",
        save_steps=1, seed=3, per_device_train_batch_size=BATCH // number, num_train_epochs=2, learning_rate=1e-2,
        logging_steps=1, disable_tqdm=True, tokens_per_row=64,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        load_model(out / "model", device="cpu", train=True),
        config,
        train_dataset=some_pairs(4 * BATCH),
        callbacks=[Stop(stop)],
    )
    steps = sorted((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(steps[-1]) if steps else None)
    if processes.is_main():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print("RESULT " + json.dumps(losses), flush=True)
    processes.leave()


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[3]), main, Path(sys.argv[1]), int(sys.argv[2])))
