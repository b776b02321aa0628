"""A grid split over several processes: every seed once, and the results joined into one comparison."""

import importlib.util
import json
from pathlib import Path

import pytest

from sepo.errors import UserError
from sepo.recipe.settings import Recipe
from sepo.study.grid import Grid, load_grid
from sepo.study.results import write_comparison
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("grid_parts", ROOT / "benchmarks" / "grid_parts.py")
grid_parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grid_parts)
GRID = """
base: base.yaml
set: {policy.gamma: 1.5}
seeds: [3, 4, 5]
checkpoints_at_kl: [1]
kl: 1
variants: {top: {}, dpo: {set: {policy.objective: dpo}}}
"""
HEAD = {"name": "g", "kl": 1.0, "also_at": [], "gold": "vader", "environment": {"device": "d", "packages": {}}}


def grid_in(folder, text=GRID):
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "base.yaml").write_text(f"reference: {{model: {folder / 'model'}}}\nname: base\n")
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def test_every_part_is_the_grid_with_its_seeds_and_folder(tmp_path):
    whole, expected = load_grid(grid_in(tmp_path), ["eval.prompts=5"])
    files = grid_parts.split(tmp_path / "grid.yaml", tmp_path / "out", 2, ["eval.prompts=5"])
    parts = [load_grid(file) for file in files]
    assert [grid.seeds for grid, _ in parts] == [[3, 5], [4]]
    assert [grid.output_dir for grid, _ in parts] == [str(tmp_path / "out" / f"part-{n}") for n in (0, 1)]
    for grid, settings in parts:
        assert (grid.name, grid.kl, grid.checkpoints_at_kl) == (whole.name, whole.kl, whole.checkpoints_at_kl)
        for variant, (setting,) in settings.items():
            elsewhere = {"output_dir": setting.recipe.output_dir}
            assert expected[variant][0].recipe.model_copy(update=elsewhere) == setting.recipe
    assert len(grid_parts.split(tmp_path / "grid.yaml", tmp_path / "few", 9, [])) == 3


def test_overrides_of_the_grid_itself_and_of_all_variants(tmp_path):
    path = grid_in(tmp_path)
    overrides = ["seeds=[8,9]", "name=other", "output_dir=elsewhere", "kl=2", "policy.gamma=3", "variants.dpo.set={}"]
    grid, settings = load_grid(path, overrides)
    assert (grid.seeds, grid.name, grid.kl, str(grid.results_folder)) == ([8, 9], "other", 2.0, "elsewhere")
    for (setting,) in settings.values():
        assert (setting.recipe.policy.gamma, setting.recipe.policy.objective) == (3.0, "sepo")
        assert setting.recipe.output_dir == "elsewhere"
    parts = [load_grid(file)[0] for file in grid_parts.split(path, tmp_path / "out", 2, overrides)]
    assert [part.seeds for part in parts] == [[8], [9]]
    assert {part.name for part in parts} == {"other"}
    with pytest.raises(UserError, match="seed"):
        load_grid(path, ["seedz=[1]"])
    # An override goes to the grid or to the recipes. The fields that both have, name and folder, are the grid's.
    assert set(Grid.model_fields) & set(Recipe.model_fields) == {"name", "output_dir"}


def test_a_sweep_that_one_seed_decides_is_not_split(tmp_path):
    path = grid_in(tmp_path, GRID + "sweep_seed: 0\n")
    with pytest.raises(UserError, match="leave sweep_seed out"):
        grid_parts.split(path, tmp_path / "out", 2, [])
    assert not (tmp_path / "out").exists()


def run(variant, seed, gain):
    point = {"kl": 1.0, "gold_difference": gain, "win_rate": 0.6, "length": 5.0, "train_seconds": 2.0, "pairs_seen": 4}
    return {
        "variant": variant, "label": "", "seed": seed, "reported": True, "folder": f"runs/{variant}-{seed}",
        "points": [point], "target_tokens": 10, "read_tokens": 30,
    }  # fmt: skip


def test_joined_parts_are_one_comparison_even_if_one_part_was_interrupted(tmp_path):
    with pytest.raises(UserError, match="no part"):
        grid_parts.join(tmp_path)
    data = {"stage": "data-1", "seconds": 1.0, "what": "pairs"}
    for name, runs, oracle in (
        ("part-0", [run("top", 2, 0.2), run("dpo", 2, 0.3), run("top", 4, 0.5)], "oracle-2"),
        ("part-1", [run("top", 1, 0.1), run("dpo", 1, 0.3)], "oracle-1"),
    ):
        (tmp_path / name).mkdir()
        write_comparison(HEAD, runs, [data, {**data, "stage": oracle}], tmp_path / name)
    notes = grid_parts.join(tmp_path)
    joined = json.loads((tmp_path / "compare.json").read_text())
    assert notes == ["5 runs of 2 parts"]
    assert [row["seeds"] for row in joined["rows"]] == [3, 2]
    (only,) = joined["differences"]
    assert (only["name"], only["against"], only["seeds"]) == ("dpo", "top", 2)
    assert only["difference"] == pytest.approx(0.15)
    assert [item["stage"] for item in joined["shared"]] == ["data-1", "oracle-2", "oracle-1"]
    assert joined["runs"][0]["folder"] == "part-1/runs/top-1"
    assert "## Against top" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
