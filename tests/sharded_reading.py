"""Compare models sharded by FSDP2 with whole ones. This process forks the ranks, which communicate by gloo.

    python tests/sharded_reading.py FOLDER [NAME ...]

The forking process imports everything once. Results of 2 and 3 ranks go to FOLDER/N.json; the runs of one recipe in one
and in two processes go to FOLDER/whole and FOLDER/sharded. With names of models, only these are compared.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}

import matplotlib.pyplot  # noqa: F401  once here instead of in every rank
import numpy as np
import pyarrow as pa
import torch
import vaderSentiment.vaderSentiment  # noqa: F401
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

import fsdp_on_cpu
import sepo.report.build
import sepo.runs.pipeline  # noqa: F401
from faults import fork, free_port, wait_for
from pairs import some_pairs
from sepo import processes
from sepo.cli import main as sepo_command
from sepo.evaluate.generate import generate_responses
from sepo.forward.scoring import dataset_logps
from sepo.models.saving import save_model
from sepo.models.sharding import own_part
from sepo.models.weights import load_model
from tiny_models import tiny_model, tiny_tokenizer

# They cover an LM head tied to the embedding, windows, and blocks without a plan in Transformers.
# The models to compare, by number of processes.
COMPARED = {2: ("llama_tied", "gpt2", "dora"), 3: ("lora",)}
# Adapters and their bases. "lora" is added to a sharded base, "dora" before sharding.
ADAPTERS = {"lora": "gemma3", "dora": "llama"}
PROMPTS = [[4, 20, 30, 5], [4, 50, 5], [4, *range(10, 40), 5]]
RECIPE = """
name: NAME
output_dir: FOLDER/NAME
device: cpu
data: {source: FOLDER/prefs.jsonl, held_out: 6}
reference: {model: FOLDER/llama}
oracle: {model: FOLDER/oracle}
policy: {objective: tdpo2, training: {learning_rate: 1.0e-3, batch_size: 6, max_steps: 3}}
eval: {gold: vader, prompts: 3, samples: 1, max_new_tokens: 5}
"""


def prepare(folder: Path, wanted: list[str]) -> None:
    """Write the models that are wanted and those of the recipes, the pairs and the recipes."""
    adapters = {name: base for name, base in ADAPTERS.items() if name in wanted}
    for name in {"llama", *adapters.values(), *(name for name in wanted if name not in ADAPTERS)}:
        deep = {"num_hidden_layers": 6} if name == "llama_tied" else {}
        save_model(tiny_model(name, initializer_range=0.1, **deep), tiny_tokenizer(), folder / name)
    save_model(tiny_model("llama", seed=1, initializer_range=0.1), tiny_tokenizer(), folder / "oracle")
    for name, base in adapters.items():
        settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=name == "dora")
        model = get_peft_model(load_model(folder / base, device="cpu"), settings)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter_name)))
        save_model(model, tiny_tokenizer(), folder / name)
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}, thanks!", "rejected": f"no {i}"} for i in range(24)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("whole", "sharded"):
        text = RECIPE.replace("NAME", name).replace("FOLDER", str(folder))
        (folder / f"{name}.yaml").write_text(text)


def equal(first: pa.Table, second: pa.Table) -> bool:
    """Whether two tables are equal to the last bit."""
    return all(first[name].combine_chunks().equals(second[name].combine_chunks()) for name in first.column_names)


def watch_gathered(model: torch.nn.Module) -> list[int]:
    """A list that grows, at each call of an MLP, by the bytes of weights that this process holds whole."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor)))

    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.register_forward_pre_hook(look)
    return seen


def compare(folder: Path, name: str) -> dict[str, Any]:
    """Compare a stored model, whole and sharded: log-probabilities of few and many pairs, and responses."""
    models = [load_model(folder / name, device="cpu", sharded=sharded) for sharded in (False, True)]
    whole, part = (sum(own_part(parameter).nbytes for parameter in model.parameters()) for model in models)
    gathered = watch_gathered(models[1])
    tables, texts = [], []
    # One pair: only one process has a row.
    tables.append(equal(*(dataset_logps(model, some_pairs(1), tokens_per_row=64) for model in models)))
    for samples, batch in ((1, None), (3, 2)):  # 3 and 9 responses: uneven shares, different numbers of batches
        written = [
            generate_responses(
                model, tiny_tokenizer(), PROMPTS, samples=samples, max_new_tokens=9, batch_size=batch, progress=False
            )
            for model in models
        ]
        for one, other in zip(*written, strict=True):
            texts.append(one[:4] == other[:4] and np.allclose(one.logps, other.logps, atol=1e-5))
    # After generation, whose gathered weights stay.
    tables.append(equal(*(dataset_logps(model, some_pairs(30), tokens_per_row=64) for model in models)))
    return {"tables": tables, "texts": texts, "share": part / whole, "gathered": max(gathered) / whole}


def rank(folder: Path, number: int, names: list[str]) -> int:
    """The work of one process of a launch; returns its exit code."""
    torch.set_num_threads(1)
    if number == 1:
        return sepo_command(["run", str(folder / "whole.yaml")])
    fsdp_on_cpu.enable()
    processes.join("cpu")
    results = {name: compare(folder, name) for name in names}
    if processes.is_main():
        (folder / f"{number}.json").write_text(json.dumps(results))
    if number == 2:
        return sepo_command(["run", str(folder / "sharded.yaml")])
    processes.leave()
    return 0


def launch(folder: Path, number: int, names: list[str]) -> list[int]:
    """Fork the processes of a launch and wait for them; returns their exit codes."""
    port = free_port()

    def start(index: int) -> int:
        if number > 1:
            os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(number))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **fsdp_on_cpu.ENVIRONMENT)
        return rank(folder, number, names)

    return wait_for([fork(lambda index=index: start(index)) for index in range(number)])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    gc.freeze()  # keeps the garbage collector of every rank from visiting the imported modules
    wanted = sys.argv[2:] or [name for names in COMPARED.values() for name in names]
    assert wait_for([fork(lambda: prepare(place, wanted))]) == [0]
    for size in (1, *COMPARED):
        names = [name for name in COMPARED.get(size, ()) if name in wanted]
        codes = launch(place, size, names) if names or size < 3 else [0]
        assert not any(codes), f"{size} processes: exit codes {codes}"
