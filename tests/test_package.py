"""The package as it is installed, not as it lies in the checkout: built, put somewhere, run from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spawn
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder elsewhere, and a function that runs the command of the unpacked wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # From a copy: building leaves its traces beside the sources.
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What `pip wheel` calls, and what `pip install --target` does with a wheel: pip itself takes seconds.
    built = spawn.run(
        ["-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"], cwd=source
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("sepo-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    place = folder / "elsewhere"
    place.mkdir()

    def sepo(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "sepo", *arguments], cwd=place, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    where = subprocess.run(
        [sys.executable, "-c", "import sepo; print(sepo.__file__)"], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)}, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
    return place, sepo


def test_recipes_come_with_the_package_by_name(installed):
    _, sepo = installed
    listed = sepo("recipe", "--list")
    assert listed.returncode == 0, listed.stderr
    for name in ("quickstart", "paper-pythia", "experiments/objectives"):
        assert name in listed.stdout
    assert "source: embedded:sentiment" in sepo("recipe", "quickstart").stdout
    schema = json.loads(sepo("recipe", "--schema").stdout)
    assert {"data", "oracle", "policy"} <= schema["properties"].keys()
    missing = sepo("run", "quikstart")
    assert missing.returncode == 2
    assert "did you mean 'quickstart'" in missing.stderr


@pytest.mark.nightly
def test_the_embedded_recipe_s_dry_run_and_a_tiny_recipe_in_full(installed, smollm2_dir):
    place, sepo = installed
    plan = sepo("run", "quickstart", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "embedded:sentiment" in plan.stdout
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    settings = ["reference.model=model", "data.sample=0.1", "data.held_out=20", "data.max_length=100", "eval.prompts=4",
                "oracle.training.batch_size=16", "policy.training.batch_size=16", "eval.max_new_tokens=4",
                "output_dir=out", "device=cpu"]  # fmt: skip
    done = sepo("run", "quickstart", *settings)
    assert done.returncode == 0, done.stderr
    assert (place / "out" / "report.html").stat().st_size > 10_000
    assert "gold_reward/difference" in json.loads((place / "out" / "metrics.json").read_text())
