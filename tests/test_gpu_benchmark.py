"""The GPU benchmark as far as a CPU can go: the same script on a tiny shape, and what it plans for a GPU."""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spawn
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
FIGURES = ("seconds", "packed_tokens_per_second", "peak_gb", "mfu", "pairs", "flops", "wall")
FACTS = ("device", "commit", "torch", "transformers", "accelerate")


def plan_on(device):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEVICE = device
    bench = module.Bench.__new__(module.Bench)
    bench.arguments = argparse.Namespace(liger=False)
    return list(bench.plan())


@pytest.mark.parametrize("shape", ["llama-1b", "smollm2-135m"])
@pytest.mark.parametrize("what", ["sepo ours", "sepo trl", "dpo ours", "dpo trl", "score ours bf16", "score loop"])
def test_a_gpu_measures_every_stage_of_both_shapes_beside_its_peer(shape, what):
    assert any(name.startswith(f"{shape} {what}") for name in plan_on("cuda"))


@pytest.mark.slow
def test_the_script_writes_every_figure_as_it_comes(tmp_path, nightly_run):
    """One scoring contender; in the nightly run all of them, those of TRL too, through gpu.sh."""
    wanted = "" if nightly_run else "score loop"
    prefs, model, out = (str(tmp_path / name) for name in ("prefs.jsonl", "model", "out"))
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"prompt": f"Which {i}?", "chosen": f"It is {i}", "rejected": f"No {i * 7}"} for i in range(14)]
    Path(prefs).write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    if nightly_run:
        environment |= {"DEVICE": "cpu", "PAIRS": "4", "STEPS": "1", "PYTHON": sys.executable}
        command = ["bash", "benchmarks/gpu.sh", prefs, model, out]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    else:
        command = ["benchmarks/gpu.py", "--data", prefs, "--tokenizer", model, "--out", out, "--pairs", "4",
                   "--steps", "1", "--device", "cpu", "--plan", wanted]  # fmt: skip
        done = spawn.run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [name for name in plan_on("cpu") if re.search(wanted, name)]
    for line in lines:
        assert "failed" not in line, line
        assert all(math.isfinite(line[name]) and line[name] > 0 for name in FIGURES), line
        assert all(line[name] for name in FACTS), line
