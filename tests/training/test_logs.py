"""The files of reporters survive checkpoints, restarts, the end of a training and the next training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import get_available_reporting_integrations

import spawn
from sepo.errors import UserError
from sepo.recipe.settings import TrainingSettings
from sepo.training.check import check_training
from sepo.training.logs import carry_logs, keep_logs, reporters
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]

# Stand-ins for the reporters, which are not installed with the tests. They write files at the same places, so the tests
# cover how Transformers uses reporters and where the files end up.
WRITERS = {
    "tensorboardX": """
import os
class SummaryWriter:
    def __init__(self, log_dir):
        os.makedirs(log_dir, exist_ok=True)
        self.file = open(os.path.join(log_dir, f"events.out.{len(os.listdir(log_dir))}"), "a")
    def add_scalar(self, name, value, step):
        if name == "train/loss":
            self.file.write(f"{step}\\n")
    def add_text(self, name, text, step=None): pass
    def flush(self): self.file.flush()
    def close(self): self.file.close()
""",
    "codecarbon": """
import os
class EmissionsTracker:
    def __init__(self, output_dir): self.output_dir = output_dir
    def start(self): pass
    def stop(self):
        with open(os.path.join(self.output_dir, "emissions.csv"), "a") as file:
            file.write("0.0001 kg\\n")
""",
}

COMMANDS = """
import json, os, signal, sys
from pathlib import Path
from sepo.cli import main
from sepo.training.trainer import PreferenceTrainer

def steps(folder):
    paths = sorted(Path(folder).rglob("events*"))
    found = {path.relative_to(folder).as_posix(): path.read_text().split() for path in paths}
    return {"events": found, "emissions": len(list(Path(folder).rglob("emissions*.csv")))}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
oracle = "oracle --reference model --data prefs.jsonl --as-chat --device cpu --out oracle batch_size=4".split()
report = ["report_to=[tensorboard,codecarbon]"]
results = {}
step = PreferenceTrainer.training_step

def interrupted(self, *arguments, **keywords):
    if self.state.global_step == 2:
        signal.raise_signal(signal.SIGINT)
    return step(self, *arguments, **keywords)

PreferenceTrainer.training_step = interrupted
assert main([*oracle, *report]) == 130
results["interrupted"] = steps("oracle")
PreferenceTrainer.training_step = step
assert main([*oracle, *report]) == 0
results["continued"] = steps("oracle")
assert main([*oracle, *report]) == 0
results["given again"] = steps("oracle")
assert main([*oracle, *report, "learning_rate=1e-4"]) == 0
results["trained anew"] = steps("oracle")

os.environ["TENSORBOARD_LOGGING_DIR"] = "mine"
assert main([*oracle, *report, "learning_rate=1e-5"]) == 0
results["mine"] = steps("mine")
del os.environ["TENSORBOARD_LOGGING_DIR"]

run = ["run", "recipe.yaml"]
assert main(run) == 0
results["run"] = steps("run")
for path in Path("run").rglob("events*"):
    path.write_text(path.read_text() + "99\\n")  # changed logs do not change the model
assert main(run) == 0
assert main(["compare", "grid.yaml"]) == 0
results["compare"] = steps("compared")
print("RESULTS " + json.dumps(results))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[dict, str]:
    """The files found after each command, and the log."""
    folder = tmp_path_factory.mktemp("logs")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(24)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in WRITERS.items():
        (folder / "writers" / name).mkdir(parents=True)
        (folder / "writers" / name / "__init__.py").write_text(text)
    training = {"batch_size": 4, "report_to": "tensorboard"}
    recipe = {
        "name": "run", "output_dir": "run", "device": "cpu", "reference": {"model": "model"},
        "data": {"source": "prefs.jsonl", "as_chat": True, "held_out": 4},
        "oracle": {"training": training}, "policy": {"training": training}, "eval": {"prompts": 2, "max_new_tokens": 4},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    grid = {"base": "recipe.yaml", "output_dir": "compared", "checkpoints": 1, "variants": {"a": {}}}
    (folder / "grid.yaml").write_text(json.dumps(grid))
    path = os.pathsep.join([str(ROOT / "src"), str(folder / "writers")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TENSORBOARD_LOGGING_DIR", None)
    ran = spawn.run(["-c", COMMANDS], cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.split("RESULTS ")[1]), ran.stderr


STEPS = ["1", "2", "3", "4", "5", "6"]


def test_events_are_beside_the_model_from_the_first_step_on_and_through_restarts(done):
    results, _ = done
    ((name, steps),) = results["interrupted"]["events"].items()
    assert name.startswith("logs/")
    assert steps == STEPS[:3]
    continued = results["continued"]["events"]
    assert all(name.startswith("logs/") for name in continued)
    assert sorted(step for steps in continued.values() for step in steps) == STEPS
    assert results["given again"] == results["continued"]


def test_events_of_a_model_that_is_replaced_stay(done):
    before, after = done[0]["continued"]["events"], done[0]["trained anew"]["events"]
    assert before.items() <= after.items()
    assert sorted(step for steps in after.values() for step in steps) == sorted(2 * STEPS)


def test_files_that_other_reporters_write_beside_the_checkpoints_stay_too(done):
    counts = [done[0][name]["emissions"] for name in ("interrupted", "continued", "given again", "trained anew")]
    assert counts == [1, 1, 1, 2]  # the second attempt appended to the file of the first


def test_a_folder_of_the_users_own_is_used(done):
    ((_, steps),) = done[0]["mine"]["events"].items()
    assert steps == STEPS


def test_a_run_and_a_comparison_keep_those_of_each_training(done):
    results, said = done
    for model in ("oracle", "policy"):
        assert [steps for name, steps in results["run"]["events"].items() if name.startswith(f"{model}/logs/")]
    names = [name.split("/")[0] for name in results["compare"]["events"]]
    assert sorted(names) == ["runs", "shared"]
    # Logs are not part of a model: after they changed, no stage ran again.
    assert said.count("[oracle] unchanged, reused") == 1
    assert said.count("[train] unchanged, reused") == 1


def test_logs_are_carried_and_nothing_in_them_is_replaced(tmp_path):
    (tmp_path / "out" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    for turn in ("first", "second", "third"):
        (tmp_path / "out" / "checkpoints" / "made_with.json").touch()
        (tmp_path / "out" / "checkpoints" / "emissions.csv").write_text(turn)
        keep_logs(tmp_path / "out")
    (tmp_path / "new").mkdir()
    carry_logs(tmp_path / "out", tmp_path / "new")
    for logs in (tmp_path / "out" / "logs", tmp_path / "new" / "logs"):
        assert sorted(path.name for path in logs.iterdir()) == ["emissions-2.csv", "emissions-3.csv", "emissions.csv"]
        assert sorted(path.read_text() for path in logs.iterdir()) == ["first", "second", "third"]
    left = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert left == ["checkpoint-3", "made_with.json"]


# --- report_to ------------------------------------------------------------------------------------------------------


def test_all_says_what_it_found(capsys):
    found = get_available_reporting_integrations()
    assert reporters("all") == reporters(["all"]) == found
    said = capsys.readouterr().err
    assert said == f"  report_to=all: {', '.join(found) or 'no reporter is installed, so nothing is reported'}\n"


def test_none_is_none():
    assert reporters("none") == reporters([]) == reporters(["none"]) == []


@pytest.mark.parametrize("given", ["tensorbord", ["wandb2"], "", "TensorBoard"])
def test_a_reporter_of_no_such_name_is_refused(given):
    with pytest.raises(UserError, match=r"report_to names '.*'.*: expected none, all, "):
        check_training(TrainingSettings(report_to=given), "training")


def test_a_reporter_that_is_not_installed_is_refused_before_anything_starts():
    (missing, *_) = {"neptune", "clearml", "comet_ml"} - {*get_available_reporting_integrations()}
    with pytest.raises(UserError, match=f"report_to names {missing}, which is not installed here"):
        check_training(TrainingSettings(report_to=[missing]), "training")
