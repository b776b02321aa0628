"""A comparison that is killed goes on with the same command and ends with the same results."""

from __future__ import annotations

import json
import random
import shutil
import signal

import pytest

from kills import run_in_child
from sepo.cli import main
from tiny_run import prepare

RECIPE = """
name: base
output_dir: run
data: {source: prefs.jsonl, as_chat: true, held_out: 6}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {gold: plain, prompts: 3, samples: 2, max_new_tokens: 8}
"""
GRID = """
name: compared
base: recipe.yaml
output_dir: compared
seeds: [0, 1]
checkpoints: [0.5, 1.0]
kl: 0.1
variants:
  sepo: {set: {}}
  simpo: {set: {policy.objective: simpo}}
"""


def without_times(value):
    """Results without what a clock or a process says."""
    if isinstance(value, dict):
        timed = {name for name in value if "seconds" in name or "memory" in name}
        return {name: without_times(item) for name, item in value.items() if name not in timed}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.nightly
def test_a_comparison_killed_at_any_write_ends_with_the_same_results(tmp_path, monkeypatch):
    prepare(tmp_path, RECIPE)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)

    def compare() -> None:
        if main(["compare", "grid.yaml"]):
            raise RuntimeError("the comparison failed")

    def results():
        stored = without_times(json.loads((tmp_path / "compared/compare.json").read_text()))
        return json.dumps(stored, indent=1, sort_keys=True).splitlines()

    code, number = run_in_child(tmp_path / "compared", compare)
    assert code == 0
    whole = results()
    draw = random.Random(0)
    for first in (0, 1, 2, 3, 4, 6, 9, *(draw.randrange(10, number) for _ in range(6))):
        shutil.rmtree(tmp_path / "compared")
        assert run_in_child(tmp_path / "compared", compare, first)[0] == -signal.SIGKILL
        code, _ = run_in_child(tmp_path / "compared", compare, draw.randrange(number))
        assert code in (-signal.SIGKILL, 0), first
        assert run_in_child(tmp_path / "compared", compare)[0] == 0, first
        assert results() == whole, first
