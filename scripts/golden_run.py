"""A small real run with every number recorded for comparison: one thread on a CPU, about a quarter of a minute.

    python scripts/golden_run.py --out DIR [--recipe RECIPE] [key=value ...]
    python scripts/golden_run.py --out DIR --record "why it changed"     for tests/test_golden.py

By default a tiny Llama runs the embedded task: data, oracle, scores and selection, policies by SePO, SimPO and DPO, and
the evaluation. `--recipe` runs another recipe instead. Prints JSON: for every table its rows, the digest of each column
and, for numbers, its sum; the loss of every step of every training; the metrics.

It runs the `sepo` that Python imports, so `compare_commits.py` can run this file with the source of any commit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

HERE = Path(__file__).resolve().parent
RECIPE = """
name: golden
device: cpu
seed: 5
data: {{source: "embedded:sentiment", as_chat: false, sample: 0.15, held_out: 20, max_length: 120}}
reference: {{model: {model}}}
oracle: {{training: {{learning_rate: 2.0e-3, batch_size: 16, num_train_epochs: 2, tokens_per_row: 700}}}}
policy: {{training: {{learning_rate: 1.0e-3, batch_size: 16, tokens_per_row: 700}}}}
eval: {{gold: vader, prompts: 6, samples: 2, max_new_tokens: 8}}
"""
RIVALS = ("simpo", "dpo")
RECORD = HERE.parent / "tests" / "golden.json"


def tiny_llama(folder: Path) -> Path:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny_models import tiny_model, tiny_tokenizer

    tiny_model("llama", initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sepo(*arguments: object) -> None:
    from sepo.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"sepo {' '.join(map(str, arguments))} ended with {code}:\n{output.getvalue()[-2000:]}")


def column_digest(column: pa.ChunkedArray) -> dict[str, Any]:
    """Digest of a column's values (lists with their lengths); for numbers also a weighted sum."""
    joined = column.combine_chunks()
    digest = hashlib.sha256()
    while pa.types.is_list(joined.type):
        digest.update(joined.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        joined = joined.flatten()
    if pa.types.is_integer(joined.type) or pa.types.is_floating(joined.type):
        values = joined.to_numpy(zero_copy_only=False)
        digest.update(values.tobytes())
        weights = np.cos(np.arange(len(values)))  # two exchanged values change this sum
        return {"digest": digest.hexdigest()[:16], "sum": float(np.sum(values * weights))}
    digest.update(json.dumps(joined.to_pylist(), default=str).encode())
    return {"digest": digest.hexdigest()[:16]}


def describe(folder: Path) -> dict[str, Any]:
    """Tables, losses and metrics under a folder."""
    tables: dict[str, Any] = {}
    for first in sorted([*folder.rglob("part-00000.parquet"), *folder.rglob("generations.parquet")]):
        parts = sorted(first.parent.glob("part-*.parquet")) if first.name.startswith("part-") else [first]
        table = pa.concat_tables([pq.read_table(part) for part in parts])
        name = (first.parent if len(parts) > 1 or first.name.startswith("part-") else first).relative_to(folder)
        tables[name.as_posix()] = {
            "rows": len(table),
            "columns": {column: column_digest(table.column(column)) for column in table.column_names},
        }
    losses = {}
    for state in sorted(folder.rglob("trainer_state.json")):
        if "checkpoints" not in state.parts:
            history = json.loads(state.read_text())["log_history"]
            losses[state.parent.relative_to(folder).as_posix()] = [row["loss"] for row in history if "loss" in row]
    metrics: dict[str, float] = {}
    for path in sorted(folder.rglob("metrics.json")):
        found = json.loads(path.read_text())
        metrics |= {name: value for name, value in found.items() if not name.startswith(("seconds/", "memory_gb/"))}
    return {"tables": tables, "losses": losses, "metrics": metrics}


def run(out: Path, recipe: Path | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe (default: the golden one) in `out` and describe its results."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "run"
    if recipe is None:
        model = tiny_llama(out / "model")
        recipe = out / "golden.yaml"
        recipe.write_text(RECIPE.format(model=model))
        sepo("run", recipe, f"output_dir={folder}", *(overrides or []))
        for objective in RIVALS:
            sepo("train", "--policy", model, "--selection", folder / "selection", "--out", folder / objective,
                 "--objective", objective, "--device", "cpu", "--seed", 5,
                 "learning_rate=1e-3", "batch_size=16", "tokens_per_row=700")  # fmt: skip
    else:
        sepo("run", recipe, f"output_dir={folder}", *(overrides or []))
    return describe(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--recipe", type=Path, help="run this recipe instead")
    parser.add_argument("--record", metavar="WHY", help="store the result as this machine kind's record, with a reason")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    described = run(arguments.out, arguments.recipe, arguments.overrides)
    if arguments.record:
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {"changes": [], "machines": {}}
        if not record["changes"] or record["changes"][-1] != arguments.record:
            # Results changed on purpose: the records of other kinds of machine are out of date.
            record = {"changes": [*record["changes"], arguments.record], "machines": {}}
        record["machines"][machine()] = described
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        return
    print(json.dumps({"machine": machine(), **described}, indent=1))


def machine() -> str:
    """Kind of machine that decides the last bits of a float: CPU vendor, instruction set, PyTorch version."""
    vendor = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        vendor = next(line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    main()
