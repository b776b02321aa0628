"""A run imports the method and what its recipe asks for, nothing else."""

import json

import pytest

import spawn
from tiny_models import tiny_model, tiny_tokenizer

RECIPE = """
name: small
device: cpu
data: {source: "embedded:sentiment", sample: 0.03, held_out: 4, max_length: 80}
reference: {model: MODEL}
oracle: {training: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 1}}
policy: {training: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 1}}
eval: {prompts: 1, max_new_tokens: 2, examples: 0}
"""
# Prints the modules of the package that are loaded at the first backward pass, and ends there. A child of the server
# has the package's modules already: it drops them and loads its own.
COMMAND = """
import json, os, sys
import torch
for name in [name for name in sys.modules if name.split(".")[0] == "sepo"]:
    del sys.modules[name]
from sepo.cli import main

def backward(*arguments, **keywords):
    print("LOADED", json.dumps([name for name in sys.modules if name.split(".")[0] == "sepo"]), flush=True)
    os._exit(0)

torch.Tensor.backward = backward
main(["run", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaded")
    tiny_model("llama", initializer_range=0.02).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folder / "model")))
    done = spawn.run(["-c", COMMAND, folder / "recipe.yaml", f"output_dir={folder / 'run'}"])
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return json.loads(line.removeprefix("LOADED "))


def test_at_most_a_hundred_files_are_loaded_before_the_first_training_step(loaded):
    assert len(loaded) <= 100, "\n".join(sorted(loaded))


WINGS = ("judging", "study", "hub", "analyse", "report", "transfer", "targets", "sharded", "sft")


@pytest.mark.parametrize("wing", WINGS)
def test_a_run_that_needs_no_wing_loads_none(loaded, wing):
    assert not [name for name in loaded if name.startswith(f"sepo.{wing}")]
