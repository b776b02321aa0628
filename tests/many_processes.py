"""One process of a launch: train and evaluate on several numbers of pairs; the main process prints the results.

    torchrun --nproc-per-node 2 tests/many_processes.py OUT OBJECTIVE 16,17,20
    python tests/many_processes.py OUT OBJECTIVE 16,17,20 2      the same, in forks of one process that imports once

With a number of pairs that is no multiple of the batch, some processes have no pair at the end of an epoch.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import fsdp_on_cpu
from pairs import some_pairs
from sepo import processes
from sepo.models.sharding import own_part
from sepo.models.weights import load_model
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import tiny_model

BATCH = 12


def watch_gradients(trainer) -> list[bool]:
    """A list that grows after each row of a training: whether every gradient is a shard (none is still whole)."""
    seen: list[bool] = []
    backward = trainer.accelerator.backward

    def watched(loss, **options):
        backward(loss, **options)
        gradients = [p.grad for p in trainer.model_wrapped.parameters()]
        seen.append(all(isinstance(grad, DTensor) for grad in gradients))

    trainer.accelerator.backward = watched
    return seen


def own_bytes(tensors) -> int:
    """Bytes of this process's parts of some tensors."""
    return sum(own_part(tensor).nbytes for tensor in tensors)


def run(out: Path, objective: str, sizes: list[int]) -> dict[str, dict]:
    """Results by number of pairs; all processes of the launch call this."""
    number = processes.size()
    results = {}
    # From a file: a model created under DeepSpeed's ZeRO-3 setup would be sharded from the start.
    processes.on_main(lambda: tiny_model("llama", initializer_range=0.1).save_pretrained(out / "model"))
    for size in sizes:
        config = PreferenceConfig(
            str(out / str(size)), objective=objective, use_cpu=True, report_to="none", save_strategy="no", seed=3,
            per_device_train_batch_size=BATCH // number, per_device_eval_batch_size=BATCH // number,
            learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, tokens_per_row=64,
        )  # fmt: skip
        table = some_pairs(size)
        model = load_model(out / "model", device="cpu", train=True)
        trainer = PreferenceTrainer(model, config, train_dataset=table, eval_dataset=table)
        before = trainer.evaluate()
        reduced = watch_gradients(trainer)
        trainer.train()
        after = trainer.evaluate()
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        moments = [
            value for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"
        ]
        history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        results[str(size)] = {
            "losses": history,
            "eval": [before["eval_loss"], after["eval_loss"]],
            "reduced_every_row": all(reduced),
            "own_bytes": [own_bytes(trainer.model_wrapped.parameters()), own_bytes(moments)],
            "wrapper": type(trainer.model_wrapped).__name__,
            "weights": None if not whole else float(sum(value.double().abs().sum() for value in whole.values())),
        }
    return results


def main(out: Path, objective: str, sizes: list[int]) -> None:
    if "ACCELERATE_USE_FSDP" in os.environ:
        fsdp_on_cpu.enable()
    processes.join("cpu")
    results = run(out, objective, sizes)
    if processes.is_main():
        print("RESULT " + json.dumps(results), flush=True)
    processes.leave()


def launch(number: int, function: Callable[..., None], *arguments: Any) -> bool:
    """Call a function in forks of this process, as the processes of a launch; returns whether one failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    children = [fork(target=_start, args=(number, rank, port, function, *arguments)) for rank in range(number)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return any(child.exitcode for child in children)


def _start(number: int, rank: int, port: int, function: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*arguments)


if __name__ == "__main__":
    arguments = (Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3].split(",")])
    if len(sys.argv) == 4:
        main(*arguments)
    else:
        sys.exit(launch(int(sys.argv[4]), main, *arguments))
