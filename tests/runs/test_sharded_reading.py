"""Models that are cut up over processes: passes, responses and a whole run are those of whole models."""

import json
import os
from pathlib import Path

import pytest
import torch

import spawn
from sepo.data.tables import read_table
from sepo.models.weights import load_model
from sharded_reading import COMPARED, equal

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(made_once, nightly_run):
    """Where 1 and 2 processes, in the nightly run also 3, have left what they found."""

    def fill(place):
        path = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
        command = [HERE / "sharded_reading.py", place, *([] if nightly_run else [ORDINARY])]
        done = spawn.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once("sharded", fill)


# The model of the ordinary run; the others are for the nightly one.
ORDINARY = "llama_tied"
CASES = [
    pytest.param(number, name, marks=[] if name == ORDINARY else [pytest.mark.nightly])
    for number, names in COMPARED.items()
    for name in names
]


@pytest.mark.parametrize(("number", "name"), CASES)
def test_a_model_that_is_cut_up_gives_what_a_whole_one_gives(folder, number, name):
    found = json.loads((folder / f"{number}.json").read_text())[name]
    assert all(found["tables"])
    assert all(found["texts"])
    assert len(found["texts"]) == 12
    # Of the main process, which has the larger part of what cannot be cut evenly; a LoRA adapter is whole everywhere.
    assert found["share"] < (1 / number + 0.01 if name != "lora" else 0.45)
    if name == "llama_tied":  # six blocks: one of them at a time, and the embedding
        assert 0.1 < found["gathered"] < 0.3


def test_a_run_under_fsdp_with_evaluation_gives_what_one_process_gives(folder):
    whole, sharded = (folder / name for name in ("whole", "sharded"))
    for table in ("logps/reference", "logps/oracle", "logps/reference/held_out"):
        assert equal(*(read_table(run / table, "logps") for run in (whole, sharded))), table
    states = [json.loads((run / "policy/trainer_state.json").read_text())["log_history"] for run in (whole, sharded)]
    losses = [[row["loss"] for row in state if "loss" in row] for state in states]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    policies = [load_model(run / "policy", device="cpu").state_dict() for run in (whole, sharded)]
    assert all(torch.allclose(policies[0][name], policies[1][name], atol=2e-5) for name in policies[0])
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (whole, sharded)]
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[0]["prompts"] == 3
    for name, value in metrics[0].items():
        if not name.startswith(("seconds/", "memory_gb/")):
            assert metrics[1][name] == (value if value is None else pytest.approx(value, abs=1e-4)), name
