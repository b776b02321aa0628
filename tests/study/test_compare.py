"""Comparisons: the grid file, shared passes, curves over checkpoints, resumption, and what the results say."""

import contextlib
import io
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sepo.cli import main
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.evaluate.gold import GOLD_REWARDS, GoldReward, lexicon_valence
from sepo.evaluate.measure import Evaluation
from sepo.evaluate.words import word_truth
from sepo.report.statistics import over_seeds
from sepo.study import comparison
from sepo.study.crossed import crossed_mean
from sepo.study.curves import at_kl
from sepo.study.grid import load_grid
from sepo.study.policy_evaluator import Checkpoints, PolicyEvaluator
from sepo.study.results import (
    _name,
    best_setting,
    comparison_markdown,
    differences,
    mean_curve,
    reading_notes,
    summarise_runs,
    typical_std,
)
from sepo.training.checkpoints import STATE_FILE
from tiny_models import tiny_model, tiny_tokenizer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
COLORS = ["red", "blue", "green", "pink", "teal", "gold"]


@pytest.fixture(scope="module", autouse=True)
def a_gold_reward_that_gibberish_moves():
    """The tiny models write no word of VADER's lexicon: judge by the mean character instead."""
    with pytest.MonkeyPatch.context() as patch:

        def judge(questions, texts):
            return np.array([np.mean([ord(c) for c in text] or [0]) / 100 for text in texts])

        patch.setitem(GOLD_REWARDS, "vader", GoldReward(judge, word_truth(lexicon_valence)))
        yield


@pytest.fixture(scope="module")
def place(made_once):
    """A tiny chat model, a preference file and a base recipe, for all tests: only read it."""

    def fill(folder):
        tiny_model("llama").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        rows = []
        for index in range(30):
            color = COLORS[index % 6]
            prompt = [{"role": "user", "content": f"Is it {color}? {index}"}]
            texts = (f"Yes, {color}, thanks!", f"no {color} here {index}")
            good, bad = ([{"role": "assistant", "content": text}] for text in texts)
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "base.yaml").write_text(
            f"""
data: {{source: {folder / "prefs.jsonl"}, held_out: 6}}
reference: {{model: {folder / "model"}}}
device: cpu
oracle: {{training: {{learning_rate: 0.002, batch_size: 8, num_train_epochs: 2}}}}
policy: {{training: {{learning_rate: 0.001, batch_size: 6, num_train_epochs: 2}}}}
eval: {{gold: vader, prompts: 3, samples: 2, max_new_tokens: 6}}
"""
        )

    return made_once("compare-place", fill)


@pytest.fixture
def workplace(place, tmp_path):
    """A folder of the test's own with the base recipe."""
    shutil.copy(place / "base.yaml", tmp_path)
    return tmp_path


GRID = """
base: base.yaml
output_dir: {out}
sweep_seed: 0
seeds: [1, 2]
seeds_vary: policy
checkpoints: [0.25]
kl: 0.5
keep_models: true
variants:
  sepo: {{sweep: {{policy.gamma: [1.0, 2.5]}}}}
  random: {{set: {{select.rule_chosen: random, select.rule_rejected: random}}}}
  dpo: {{set: {{policy.objective: dpo, policy.beta: 0.05}}}}
  simpo: {{set: {{policy: {{objective: simpo, gamma: 1.5}}}}}}
"""
# What the tests of a finished comparison share: MANY has a SimPO.
COMPARED = GRID[: GRID.index("  simpo")]

# One seed and many variants: numbers of oracles, objectives by confidence and not, batches of all sizes.
MANY = """
base: base.yaml
output_dir: {out}
seeds: [0]
seeds_vary: policy
checkpoints: [0.25]
kl: 1.0e-9
keep_models: true
variants:
  sepo: {{sweep: {{oracle.count: [1, 2]}}}}
  dpo: {{set: {{policy.objective: dpo}}}}
  dpo_cw: {{set: {{policy.objective: dpo, select.confidence: 0.02}}}}
  simpo: {{set: {{policy.objective: simpo}}}}
  simpo_cw: {{set: {{policy.objective: simpo, select.confidence: 0.02}}}}
  tgdpo: {{set: {{policy.objective: tgdpo}}}}
  tgdpo_cw: {{set: {{policy.objective: tgdpo, select.confidence: 0.02}}}}
  sevens: {{set: {{policy: {{objective: simpo, training: {{batch_size: 7, max_steps: 8}}}}}}}}
  thirties: {{set: {{policy: {{objective: simpo, training: {{batch_size: 30, max_steps: 2}}}}}}}}
"""
SEPO = "  sepo: {{set: {{policy.gamma: 1.0}}}}\n"


def write_grid(folder, text=GRID, name="grid", out="out"):
    path = folder / f"{name}.yaml"
    path.write_text(text.format(out=folder / out))
    return path


def like_many(variants, *changes, work=None):
    """The text of a grid as MANY with other variants; in the work folder `work`, where it is given."""
    head = MANY[: MANY.index("variants:\n")]
    for old, new in changes:
        assert old in head
        head = head.replace(old, new)
    return head + (f"work_dir: {work}\n" if work else "") + "variants:\n" + variants


def results_of(folder):
    return json.loads((folder / "compare.json").read_text())


def compare_once(made_once, place, text, name, *settings, work=None):
    """Compare a grid once for all workers; the folder has the results in `name`, and what was said in `said`.

    Args:
        work: a folder of finished passes and runs that a copy of it is begun with.
    """

    def fill(folder):
        shutil.copy(place / "base.yaml", folder)
        if work is not None:
            shutil.copytree(work, folder / name)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main(["compare", str(write_grid(folder, text, name, name)), *settings]) == 0
        (folder / "said").write_text(said.getvalue())

    return made_once(f"compare-{name}", fill)


@pytest.fixture(scope="module")
def finished(made_once, place):
    """The folder of the finished comparison of COMPARED in `grid`, and its results; only read it."""
    folder = compare_once(made_once, place, COMPARED, "grid")
    return folder, results_of(folder / "grid")


@pytest.fixture
def copied(finished, workplace):
    """A copy of it, for tests that change it: the folder, the grid file, and the results."""
    shutil.copytree(finished[0] / "grid", workplace / "grid")
    return workplace, write_grid(workplace, COMPARED, out="grid"), finished[1]


@pytest.fixture(scope="module")
def many(made_once, place):
    """The folder of the finished comparison of MANY in `many`, and its results; only read it."""
    folder = compare_once(made_once, place, MANY, "many")
    return folder, results_of(folder / "many")


@pytest.fixture
def work(many, workplace):
    """A copy of the passes and runs of MANY, for a grid that shares them by `work_dir`."""
    return shutil.copytree(many[0] / "many", workplace / "many")


def number_of_runs(grid, settings):
    """The runs of a grid; one that is swept and reported counts once where it is measured on the same prompts."""
    runs = comparison.schedule(grid, settings, lambda variant, group: group[0])
    return len({(one.variant, one.label, seed, grid.sweep_prompts and reported) for one, seed, reported in runs})


def stages_done(text):
    return [line.split("]")[0][1:] for line in text.splitlines() if line.startswith("[") and line.endswith(" s")]


# --- the grid file --------------------------------------------------------------------------------------------------


def test_a_grid_is_the_base_with_its_settings_changed(workplace):
    grid, settings = load_grid(write_grid(workplace), ["eval.samples=1"])
    assert [one.label for one in settings["sepo"]] == ["policy.gamma=1", "policy.gamma=2.5"]
    assert settings["sepo"][1].recipe.policy.gamma == 2.5
    assert settings["dpo"][0].recipe.policy.objective == "dpo"
    assert settings["simpo"][0].recipe.policy.gamma == 1.5
    assert settings["simpo"][0].recipe.policy.training.learning_rate == 0.001  # a group is merged, not replaced
    assert all(one.recipe.eval.samples == 1 for group in settings.values() for one in group)
    assert number_of_runs(grid, settings) == 2 + 2 * 4


def test_runs_are_counted_with_and_without_a_sweep_seed(workplace):
    for change, runs in (
        (("sweep_seed: 0\n", ""), 2 * 5),
        (("sweep_seed: 0", "sweep_seed: 1"), 2 + 2 * 4 - 1),
    ):
        grid, settings = load_grid(write_grid(workplace, GRID.replace(*change), "counted"))
        assert number_of_runs(grid, settings) == runs


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("checkpoints: [0.25]", "checkpoints: [0.5, 1.5]", "checkpoints.2 is 1.5"),
        ("checkpoints: [0.25]", "checkpoints: 0", "checkpoints is 0: expected a number of 1 or more"),
        ("checkpoints: [0.25]", "checkpoints: 2\ncheckpoints_at_kl: [1.0]", "leave one of them out"),
        ("checkpoints: [0.25]", "checkpoints_at_kl: [1.0, 0]", "checkpoints_at_kl.1 is 0"),
        ("checkpoints: [0.25]", "checkpoint: 2", "unknown key 'checkpoint' (did you mean 'checkpoints'?)"),
        ("policy.beta: 0.05", "policy.betta: 0.05", "unknown key 'policy.betta' (did you mean 'beta'?)"),
        ("policy.beta: 0.05", "data.sample: 0.5", "have different data or eval settings"),
        ("policy.beta: 0.05", "policy.training.num_train_epochs: 3", "see different numbers of pairs"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "the same seed twice"),
        ("seeds: [1, 2]", "seeds: []", "seeds is []"),
        ("[1.0, 2.5]", "[]", "variants.sepo.sweep.policy.gamma is []"),
        ("[1.0, 2.5]", "[1.0, 1.0]", "lists the same value twice"),
        ("kl: 0.5", "kl: 0", "kl is 0"),
        ("base: base.yaml", "base: none.yaml", "no recipe at"),
        ("objective: dpo", "objective: dpoo", "policy.objective is 'dpoo'"),
        ("dpo:", "../dpo:", "variants"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line_before_anything_runs(workplace, capsys, monkeypatch, old, new, message):
    monkeypatch.setattr(comparison, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert old in GRID
    path = write_grid(workplace, GRID.replace(old, new), "bad", "bad-out")
    assert main(["compare", str(path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sepo: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (workplace / "bad-out").exists()


def with_variants(workplace, name, variants):
    text = (
        GRID[: GRID.index("variants:")]
        + "variants:\n"
        + "".join(
            f"  v{index}: {{{{set: {{{{policy.objective: simpo, policy.training: {{{{{settings}}}}}}}}}}}}}\n"
            for index, settings in enumerate(variants)
        )
    )
    return write_grid(workplace, text, name, f"{name}-out")


@pytest.mark.parametrize(
    ("variants", "counts"),
    [
        (["batch_size: 7, max_steps: 4", "batch_size: 4, max_steps: 7"], "(24 and 28, of 24 in an epoch)"),
        (["batch_size: 6, num_train_epochs: 1", "batch_size: 7, max_steps: 3"], "(24 and 21, of 24 in an epoch)"),
        (["batch_size: 8, num_train_epochs: 0.5", "batch_size: 7, num_train_epochs: 0.5"], "(16 and 14, of 24"),
    ],
)
def test_variants_that_see_other_numbers_of_pairs_are_refused_before_a_model_is_loaded(
    workplace, capsys, monkeypatch, variants, counts
):
    monkeypatch.setattr(comparison, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    path = with_variants(workplace, f"budget{len(counts)}{counts[1:3]}{counts[8:10]}", variants)
    for command in (["compare", str(path), "--dry-run"], ["compare", str(path)]):
        assert main(command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sepo: ")]
        assert counts in line


def test_variants_that_see_the_same_pairs_are_compared_however_their_batches_fall(many, workplace, capsys):
    """24 pairs: the fourth batch of 7 holds three, a batch of 30 all of them."""
    variants = ["batch_size: 7, max_steps: 4", "batch_size: 6, num_train_epochs: 1", "batch_size: 30, max_steps: 1"]
    path = with_variants(workplace, "even", variants)
    assert main(["compare", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("24 pairs a run") == 3
    folder, results = many
    assert "not used by these settings" not in (folder / "said").read_text()
    assert {run["points"][-1]["pairs_seen"] for run in results["runs"]} == {48}
    assert len({run["target_tokens"] for run in results["runs"] if run["objective"] == "simpo"}) == 1


def test_runs_that_a_grid_of_fewer_variants_does_not_use_are_named_and_kept(work, workplace, capsys):
    fewer = like_many("  dpo: {{set: {{policy.objective: dpo}}}}\n")
    assert main(["compare", str(write_grid(workplace, fewer, "many", "many"))]) == 0
    text = capsys.readouterr().err
    assert stages_done(text) == []
    (line,) = [line for line in text.splitlines() if "not used by these settings, and kept: runs/run-" in line]
    assert line.count("runs/run-") == 5
    assert re.search(r"and (\d+) more", line)[1] == str(9 - 5 + len(unused_passes(work)))
    assert len(list((work / "runs").iterdir())) == 10


def unused_passes(work):
    """The shared passes that the last comparison in a folder did not read."""
    used = {item["stage"] for item in results_of(work)["shared"]}
    return [path for path in (work / "shared").iterdir() if path.name not in used]


def test_a_comparison_without_held_out_prompts_is_refused(workplace, capsys):
    path = write_grid(workplace, GRID, "no-prompts", "no-prompts-out")
    assert main(["compare", str(path), "eval.prompts=0"]) == 2
    assert "set eval.prompts" in capsys.readouterr().err


def test_a_dry_run_counts_the_runs_and_writes_nothing(workplace, capsys):
    path = write_grid(workplace, GRID, "dry", "dry-out")
    assert main(["compare", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert "4" in rows["sepo"]
    assert "10" in rows["total"]
    assert "minimum detectable difference: not known with 2 seeds; set three or more" in output
    assert not (workplace / "dry-out").exists()


EXPERIMENTS = sorted((Path(__file__).parents[2] / "recipes" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid_and_as_long_as_their_documentation_says(path):
    grid, settings = load_grid(path)
    assert grid.name == path.stem
    row = next(line for line in DOCUMENT.splitlines() if f"`{path.name}`" in line)
    assert row.split("|")[-2].strip() == str(number_of_runs(grid, settings))


# --- a whole comparison ---------------------------------------------------------------------------------------------


def test_a_comparison_leaves_table_pictures_and_every_checkpoint(finished):
    folder, results = finished
    for name in ("frontier.png", "win-rate.png"):
        assert (folder / "grid" / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "grid" / "compare.md").read_text()
    assert "## Reported" in page
    assert "## Sweep" in page
    assert "## Against sepo" in page
    assert [row["seeds"] for row in results["differences"]] == [2, 2]
    assert len(results["runs"]) == 8
    assert [run["reported"] for run in results["runs"]] == [False, False] + [True] * 6
    for run in results["runs"]:
        assert [point["step"] for point in run["points"]] == [2, 8]
        assert [point["pairs_seen"] for point in run["points"]] == [12, 48]
        assert all(math.isfinite(point["kl"]) for point in run["points"])
        if Path("/proc/self/clear_refs").exists():
            assert all(0.1 < point["memory_gb"] < 30 for point in run["points"])
    assert "| training, s | peak, GB |" in page
    assert {row["seeds"] for row in results["rows"] if row["reported"]} == {2}
    reported = {row["variant"]: row for row in results["rows"] if row["reported"]}
    assert set(reported) == {"sepo", "random", "dpo"}
    assert reported["sepo"]["target_tokens"] < 0.5 * reported["dpo"]["target_tokens"]
    assert reported["random"]["target_tokens"] == reported["sepo"]["target_tokens"]
    assert not list((folder / "grid").rglob("*.tmp"))


def test_passes_that_can_be_shared_are_done_once(finished):
    folder, results = finished
    manifest = json.loads((folder / "grid" / "manifest.json").read_text())
    kinds = [name.split("-")[0] for name in manifest["stages"] if not name.startswith("run-")]
    count = {kind: kinds.count(kind) for kind in set(kinds)}
    # A pass of the reference, one of the oracle. Two random draws, one top selection. Samples of the start at seeds 0,
    # 1 and 2.
    assert count == {"data": 1, "logps": 2, "oracle": 1, "score": 1, "select": 3, "start": 3}
    assert len(results["shared"]) == sum(count.values())
    scores = next(item for item in results["shared"] if item["stage"].startswith("score"))
    assert 0 <= scores["oracle/accuracy"] <= 1
    assert "AUC" in scores["what"]


def test_a_run_that_was_measured_is_what_evaluation_says_of_the_trained_model(finished, place, tmp_path):
    folder, results = finished
    _, settings = load_grid(folder / "grid.yaml")
    run = next(run for run in results["runs"] if run["variant"] == "dpo")
    held_out = next((folder / "grid" / "shared").glob("data-*")) / "held_out"
    metrics = Evaluation(
        str(folder / "grid" / run["folder"] / "policy"),
        str(place / "model"),
        held_out,
        tmp_path / "evaluated",
        settings["dpo"][0].recipe.eval,
        seed=run["seed"],
        device="cpu",
    ).measure()
    last = run["points"][-1]
    assert last["kl"] == pytest.approx(metrics["kl"], abs=1e-4)
    assert last["gold_difference"] == pytest.approx(metrics["gold_reward/difference"], abs=1e-9)
    assert last["win_rate"] == pytest.approx(metrics["gold_reward/win_rate"], abs=1e-9)
    assert last["length"] == pytest.approx(metrics["length/policy"])
    assert last["kl"] != 0
    assert last["gold_difference"] != 0


def test_the_same_command_reuses_everything_and_a_new_variant_costs_its_own_runs(copied, capsys, monkeypatch):
    folder, path, results = copied
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # where it is started, and what lies there, does not matter
    assert main(["compare", str(path)]) == 0
    assert stages_done(capsys.readouterr().err) == []
    assert results_of(folder / "grid") == results
    more = COMPARED + "  confpo: {{set: {{policy.objective: confpo}}}}\n"
    assert main(["compare", str(write_grid(folder, more, out="grid"))]) == 0
    assert stages_done(capsys.readouterr().err) == ["run confpo seed=1", "run confpo seed=2"]


def test_an_altered_file_of_checkpoints_is_measured_anew_not_believed(copied, capsys):
    folder, path, results = copied
    file = folder / "grid" / results["runs"][0]["folder"] / "points.json"
    whole = file.read_text()
    file.write_text(whole.replace('"kl": ', '"kl": 9'))
    assert main(["compare", str(path)]) == 0
    assert len(stages_done(capsys.readouterr().err)) == 1
    assert [point["kl"] for point in json.loads(file.read_text())] == [point["kl"] for point in json.loads(whole)]
    file.write_text("{ no JSON")
    assert main(["compare", str(path)]) == 0
    assert [point["kl"] for point in json.loads(file.read_text())] == [point["kl"] for point in json.loads(whole)]


@pytest.mark.nightly
def test_grids_with_one_work_folder_share_passes_and_runs(many, work, workplace, capsys):
    # A method of MANY under another name, and one that is new.
    new = "  low: {{set: {{policy.objective: dpo}}}}\n  orpo: {{set: {{policy.objective: orpo}}}}\n"
    text = like_many(new, work=work)
    assert main(["compare", str(write_grid(workplace, text, "one", "one-out"))]) == 0
    assert stages_done(capsys.readouterr().err) == ["run orpo seed=0"]
    assert main(["compare", str(write_grid(workplace, text.replace("low", "other"), "two", "two-out"))]) == 0
    assert stages_done(capsys.readouterr().err) == []
    runs = results_of(workplace / "one-out")["runs"]
    assert [run["variant"] for run in runs] == ["low", "orpo"]
    assert [run["variant"] for run in results_of(workplace / "two-out")["runs"]] == ["other", "orpo"]
    (before,) = [run for run in many[1]["runs"] if run["variant"] == "dpo"]
    assert runs[0]["points"] == before["points"]
    assert sorted(p.name for p in (workplace / "one-out").iterdir()) == sorted(
        ["compare.html", "compare.json", "compare.md", "frontier.png", "grid.json", "win-rate.png"]
    )
    (workplace / "taken-out").mkdir()
    (workplace / "taken-out" / "thesis.tex").write_text("")
    assert main(["compare", str(write_grid(workplace, text, "three", "taken-out"))]) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    assert [p.name for p in (workplace / "taken-out").iterdir()] == ["thesis.tex"]


def test_an_interrupted_comparison_keeps_its_runs_and_checkpoints(work, workplace, capsys, monkeypatch):
    two = "  dpo: {{set: {{policy.objective: dpo}}}}\n  simpo: {{set: {{policy.objective: simpo}}}}\n"
    changes = (("keep_models: true", "keep_models: false"), ("seeds: [0]", "seeds: [5]"))
    path = write_grid(workplace, like_many(two, *changes, work=work), "broken", "broken-out")
    measured = []
    original = Checkpoints.on_step_end

    def stop_at_the_fourth(self, args, state, control, **kwargs):
        before = len(self.points)
        if len(measured) == 3 and state.global_step in self.steps:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)
        measured.extend(self.points[before:])

    monkeypatch.setattr(Checkpoints, "on_step_end", stop_at_the_fourth)
    assert main(["compare", str(path)]) == 130
    assert "the same command starts it again, and earlier results are kept" in capsys.readouterr().err
    half = results_of(workplace / "broken-out")
    assert len(half["runs"]) == 1
    monkeypatch.setattr(Checkpoints, "on_step_end", original)
    judged = []
    measure = PolicyEvaluator.measure
    monkeypatch.setattr(PolicyEvaluator, "measure", lambda self, policy: judged.append(1) or measure(self, policy))
    assert main(["compare", str(path)]) == 0
    done = results_of(workplace / "broken-out")
    assert len(done["runs"]) == 2
    assert done["runs"][0] == half["runs"][0]
    assert len(judged) == 4 - 3  # a checkpoint that was measured is not measured again
    for run in done["runs"]:
        assert not (work / run["folder"] / "policy").exists()
        assert (work / run["folder"] / "trainer_state.json").is_file()


# Eight epochs of one method, measured where it passes three KLs; a checkpoint every few steps.
PASSING = like_many(SEPO, ("checkpoints: [0.25]", "checkpoints_at_kl: [0.5, 0.2, 90]"), ("kl: 1.0e-9", "kl: 0.5"))
FASTER = ("policy.training.num_train_epochs=8", "policy.training.save_minutes=0.001")


@pytest.fixture(scope="module")
def passing(made_once, place, many):
    """The folder of the finished comparison of PASSING in `many`, where it shares the passes; only read it."""
    folder = compare_once(made_once, place, PASSING.replace("{out}", "{out}\nname: many"), "passing", *FASTER,
                          work=many[0] / "many")  # fmt: skip
    return folder, results_of(folder / "passing")


def test_checkpoints_can_be_where_a_run_passes_given_kls(passing, workplace, capsys):
    """Methods of different speed are measured at the same distances, and curves are read there."""
    folder, results = passing
    assert main(["compare", str(folder / "passing.yaml"), *FASTER, "--dry-run"]) == 0
    assert "a run is measured where it passes KL 0.2, 0.5, 90 and at its end" in capsys.readouterr().out
    assert "KL 90 was not reached; the highest measured KL is" in (folder / "said").read_text()
    (run,) = results["runs"]
    *on_the_way, last = run["points"]
    assert last["step"] == 32
    assert "probe" not in last
    assert on_the_way[0]["passed"][0] == 0.2
    probes = json.loads((folder / "passing" / run["folder"] / "probes.json").read_text())
    assert [probe for probe in probes if probe[0] in {point["step"] for point in on_the_way}] == [
        [point["step"], pytest.approx(point["probe"])] for point in on_the_way
    ]
    assert len(probes) < 16
    shutil.copytree(folder / "passing", workplace / "many")
    assert main(["compare", str(write_grid(workplace, PASSING, "many", "many")), *FASTER]) == 0
    assert stages_done(capsys.readouterr().err) == []


@pytest.mark.nightly
def test_a_run_that_is_cut_short_passes_its_kls_at_the_same_steps(passing, work, workplace, monkeypatch):
    folder, results = passing
    path = write_grid(workplace, PASSING, "many", "many")
    original = Checkpoints.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "on_step_end", stop)
    assert main(["compare", str(path), *FASTER]) == 130
    monkeypatch.setattr(Checkpoints, "on_step_end", original)
    assert main(["compare", str(path), *FASTER]) == 0
    timed = ("train_seconds", "measure_seconds", "memory_gb")
    (whole,), (cut,) = results["runs"], results_of(work)["runs"]
    points = [
        [{name: value for name, value in point.items() if name not in timed} for point in run["points"]]
        for run in (whole, cut)
    ]
    assert points[0] == points[1]
    probes = [(place / whole["folder"] / "probes.json").read_text() for place in (folder / "passing", work)]
    assert probes[0] == probes[1]


def test_without_a_gold_reward_the_held_out_accuracy_is_compared(work, workplace):
    path = write_grid(workplace, like_many(SEPO, ("kl: 1.0e-9", "kl: 0.5"), work=work), "accuracy", "accuracy-out")
    assert main(["compare", str(path), "eval.gold=null", "policy.training.learning_rate=0.003"]) == 0
    (run,) = results_of(workplace / "accuracy-out")["runs"]
    assert run["points"][-1]["accuracy"] > 0.6
    assert not (workplace / "accuracy-out" / "win-rate.png").exists()
    assert "accuracy gain" in (workplace / "accuracy-out" / "compare.md").read_text()


@pytest.mark.nightly
def test_seeds_can_vary_the_oracle_too(workplace, capsys):
    text = GRID.replace("sweep_seed: 0\n", "").replace("seeds_vary: policy\n", "").replace("[1.0, 2.5]", "[1.0]")
    path = write_grid(workplace, text[: text.index("  random")], "oracles", "oracles-out")
    assert main(["compare", str(path), "policy.training.num_train_epochs=1"]) == 0
    done = [name.split("-")[0] for name in stages_done(capsys.readouterr().err)]
    assert done.count("oracle") == 2
    assert done.count("data") == 1
    folders = sorted((workplace / "oracles-out" / "shared").glob("select-*"))
    first, second = (read_table(folder, "selection") for folder in folders)
    assert first.column("pair_id") == second.column("pair_id")


def test_settings_with_one_and_with_several_oracles_share_the_first(many, workplace, capsys):
    assert main(["compare", str(write_grid(workplace, MANY, "many", "many")), "--dry-run"]) == 0
    folder, results = many
    done = Counter(name.split("-")[0] for name in stages_done((folder / "said").read_text()))
    assert (done["oracle"], done["score"]) == (2, 2)
    # By one oracle and by two; by confidence; the rewards of all tokens, with and without.
    assert done["select"] == 2 + 1 + 2
    assert [run["label"] for run in results["runs"] if run["variant"] == "sepo"] == ["oracle.count=1", "oracle.count=2"]
    assert sum("the mean of 2 oracles" in item["what"] for item in results["shared"]) == 1


def test_an_objective_on_all_tokens_reads_the_confidence_of_the_oracle(many, workplace, capsys):
    only = MANY[: MANY.index("  simpo")].replace("  sepo: {{sweep: {{oracle.count: [1, 2]}}}}\n", "")
    assert main(["compare", str(write_grid(workplace, only, "confident", "confident-out")), "--dry-run"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert "oracle" in rows  # DPO alone has none; by confidence it needs one
    folder, results = many[0] / "many", many[1]
    losses = {}
    for run in results["runs"]:
        state = json.loads((folder / run["folder"] / "policy" / STATE_FILE).read_text())
        losses[run["variant"]] = [row["loss"] for row in state["log_history"] if "loss" in row]
    tables = [read_table(path, "selection") for path in (folder / "shared").glob("select-*")]
    weights = [table["pair_weight"].to_numpy() for table in tables if "pair_weight" in table.column_names]
    assert len(weights) == 2  # one that dpo and simpo share, one of rewards for tgdpo
    assert [one.tolist() for one in weights] == [weights[0].tolist()] * 2
    assert 0 < weights[0].mean() < 1
    for objective in ("dpo", "simpo", "tgdpo"):
        assert losses[f"{objective}_cw"][0] < losses[objective][0]  # the same model at first, its losses weighed
    tokens = {run["variant"]: (run["target_tokens"], run["read_tokens"]) for run in results["runs"]}
    assert tokens["dpo_cw"] == tokens["dpo"] == tokens["simpo_cw"] == tokens["simpo"]  # not those of the selection
    assert "pairs_left_out" in json.dumps(results["shared"])


# --- reading curves -------------------------------------------------------------------------------------------------


def points(*pairs):
    return [{"kl": kl, "gold_difference": gain} for kl, gain in pairs]


def test_a_curve_is_read_between_its_checkpoints_and_never_beyond_them():
    curve = points((1.0, 0.1), (3.0, 0.3), (2.0, 0.4))
    assert at_kl(curve, 0.25) == (pytest.approx(0.05), True)  # half of the root of KL 1
    between = 0.4 - 0.1 * (math.sqrt(2.5) - math.sqrt(2)) / (math.sqrt(3) - math.sqrt(2))
    assert at_kl(curve, 2.5) == (pytest.approx(between), True)  # in order of KL, not of steps
    assert at_kl(curve, 2.0) == (pytest.approx(0.4), True)
    assert at_kl(curve, 4.0) == (pytest.approx(0.3), False)
    assert at_kl(curve, None) == (0.4, True)
    assert at_kl(points((-0.2, 0.1)), 1.0) == (pytest.approx(0.1), False)
    assert at_kl([{"kl": 4.0, "accuracy": 0.9}], 1.0) == (pytest.approx(0.2), True)


@pytest.mark.parametrize("checkpoints", [(0.5, 9.0), (3.5, 9.0), (1.0, 1.5, 2.0, 9.0), (9.0,)])
def test_methods_on_one_curve_are_equal_wherever_their_checkpoints_lie(checkpoints):
    """Gain grows as the root of the KL: a fast method, whose first checkpoint lies far out, must not look worse."""
    on_it = points(*((kl, 0.1 * math.sqrt(kl)) for kl in checkpoints))
    for kl in (0.25, 1.0, 3.0, 8.0):
        assert at_kl(on_it, kl) == (pytest.approx(0.1 * math.sqrt(kl)), True)


def test_values_that_were_not_measured_are_marked_and_noted(many):
    runs = [
        run("fast", "", 0, points((4.0, 0.4), (9.0, 0.6))),
        run("fast", "", 1, points((0.5, 0.1), (9.0, 0.6))),
        run("slow", "", 0, points((0.2, 0.1), (0.5, 0.2))),
        run("even", "", 0, points((1.0, 0.2), (2.0, 0.3))),
    ]
    rows = summarise_runs(runs, 1.0)
    assert [(row["unmeasured"], row["reached"]) for row in rows] == [(1, 2), (0, 0), (0, 1)]
    early, short = reading_notes(rows, 1.0)
    assert "below KL 1" in early and "1 of fast;" in early  # noqa: PT018
    assert "did not reach KL 1" in short and short.endswith(": 1 of slow")  # noqa: PT018
    assert reading_notes(summarise_runs(runs, None), None) == []
    page = comparison_markdown(
        {"name": "t", "kl": 1.0, "gold": "vader", "rows": rows, "runs": runs, "differences": [], "shared": [],
         "environment": {"device": "d", "packages": {"torch": "1"}}}
    )  # fmt: skip
    cells = {line.split(" | ")[0]: line.split(" | ")[3] for line in page.splitlines() if line.startswith("| ")}
    assert [cells[f"| {name}"][-1] for name in ("fast", "slow", "even")] == ["†", "*", "0"]
    assert "not measured below KL 1e-09" in (many[0] / "said").read_text()


def run(variant, label, seed, curve, reported=True, tokens=10):
    full = [{**point, "win_rate": 0.6, "length": 5.0, "train_seconds": 2.0, "pairs_seen": 4} for point in curve]
    return {
        "variant": variant, "label": label, "seed": seed, "reported": reported, "points": full,
        "target_tokens": tokens, "read_tokens": 3 * tokens,
    }  # fmt: skip


def test_rows_are_means_over_seeds_with_their_standard_errors():
    runs = [
        run("a", "", 0, points((1.0, 0.1), (2.0, 0.2))),
        run("b", "x=1", 0, points((4.0, 0.4))),
        run("a", "", 1, points((1.0, 0.3), (2.0, 0.4))),
        run("a", "", 2, points((0.5, 0.2))),
    ]
    a, b = summarise_runs(runs, 1.0)
    assert (a["variant"], a["seeds"], a["reached"]) == ("a", 3, 2)
    assert a["value"] == pytest.approx(np.mean([0.1, 0.3, 0.2]))
    assert a["value_se"] == pytest.approx(0.1 / math.sqrt(3))
    assert a["final_kl"] == pytest.approx(1.5)
    assert b["value"] == pytest.approx(0.2)  # half of the root of KL 4
    assert math.isnan(b["value_se"])
    assert over_seeds([]) == (pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True))
    page = comparison_markdown(
        {"name": "t", "kl": 1.0, "gold": "vader", "rows": [a, b], "runs": runs, "differences": [], "shared": [],
         "environment": {"device": "d", "packages": {"torch": "1"}}}
    )  # fmt: skip
    assert "+0.200 ± 0.058*" in page  # one of three did not get to KL 1
    assert "| b | x=1 | 1 | +0.200† |" in page
    # Every row has as many cells as the head; without a KL there is no second column for the end.
    for kl, cells in ((1.0, 13), (None, 12)):
        rows = summarise_runs(runs, kl)
        page = comparison_markdown(
            {"name": "t", "kl": kl, "gold": "vader", "rows": rows, "runs": runs, "differences": [], "shared": [],
             "environment": {"device": "d", "packages": {"torch": "1"}}}
        )  # fmt: skip
        table = [line for line in page.splitlines() if line.startswith("|")]
        assert [line.count("|") - 1 for line in table] == [cells] * 4
        assert table[0].count("gain at the end") == 1


def test_the_bold_curve_of_a_picture_is_the_mean_that_the_table_has_where_all_runs_got_to():
    runs = [run("a", "", seed, points((1.0, gain), (end, 2 * gain))) for seed, gain, end in ((0, 0.1, 4), (1, 0.3, 9))]
    kls, gained = mean_curve(runs)
    assert (kls[0], kls[-1]) == (0, pytest.approx(4))  # the other one went on alone
    assert gained[0] == 0
    for at in (5, 40, -1):
        assert gained[at] == pytest.approx(summarise_runs(runs, kls[at])[0]["value"])
    lost = mean_curve([run("a", "", 0, points((-0.2, 0.1)))])  # a KL that was estimated below 0
    assert lost[0].max() == 0


def test_methods_are_compared_by_the_seeds_that_both_have():
    runs = [
        *(run("a", "", seed, points((1.0, gain))) for seed, gain in enumerate((0.1, 0.2, 0.3))),
        *(run("b", "policy.beta=0.1", seed, points((1.0, gain))) for seed, gain in ((0, 0.2), (1, 0.4), (2, 0.6))),
        run("c", "", 0, points((1.0, 0.9))),  # a single seed in common says nothing
        *(run("d", "", seed, points((1.0, 9.0)), reported=False) for seed in range(3)),
    ]
    (only,) = differences(runs, 1.0)
    assert (only["name"], only["against"], only["seeds"]) == ("b beta=0.1", "a", 3)
    assert only["difference"] == pytest.approx(0.2)
    assert (only["prompts"], only["std"]) == (0, None)
    # Differences 0.1, 0.2, 0.3: standard error 0.1 / sqrt(3), and Student's t is 4.303 at two degrees of freedom.
    assert only["low"] == pytest.approx(0.2 - stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    assert only["high"] == pytest.approx(0.2 + stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))


def test_the_page_sets_differences_at_the_kl_beside_those_at_the_end():
    runs = [
        *(run("a", "", seed, points((1.0, gain), (2.0, gain))) for seed, gain in enumerate((0.1, 0.2))),
        *(run("b", "", seed, points((1.0, gain), (2.0, 0.7))) for seed, gain in enumerate((0.2, 0.4))),
    ]
    comparison = {
        "name": "t", "kl": 1.0, "gold": "vader", "rows": summarise_runs(runs, 1.0), "runs": runs, "shared": [],
        "differences": differences(runs, 1.0), "environment": {"device": "d", "packages": {"torch": "1"}},
    }  # fmt: skip
    # At KL 1: differences 0.1 and 0.2; at the end 0.6 and 0.5. One degree of freedom: 12.706 standard errors of 0.05.
    assert "| b | 2 | +0.150 | -0.485 to +0.785 | 0.817 | +0.550 | -0.085 to +1.185 | 0.817 |" in comparison_markdown(
        comparison
    )
    comparison |= {"kl": None, "rows": summarise_runs(runs, None), "differences": differences(runs, None)}
    assert "| b | 2 | +0.550 | -0.085 to +1.185 | 0.817 |" in comparison_markdown(comparison)


def test_differences_are_over_seeds_and_prompts_where_each_prompt_was_kept():
    rng = np.random.default_rng(1)
    base, gains = rng.normal(0.3, 0.3, (3, 40)), rng.normal(0.2, 0.1, (3, 40))

    def curve(values):  # a straight line in the root of the KL, by prompt as in the mean
        return [
            {"kl": kl, "gold_difference": float(np.mean(part)), "by_prompt": part.tolist()}
            for kl, part in ((0.25, values / 2), (4.0, values * 2))
        ]

    runs = [run(name, "", seed, curve(values[seed]))
            for seed in range(3) for name, values in (("a", base), ("b", base + gains))]  # fmt: skip
    (only,) = differences(runs, 1.0)
    expected = crossed_mean(gains)
    assert only["prompts"] == 40
    assert [only[name] for name in ("difference", "low", "high")] == pytest.approx(
        [expected.mean, expected.low, expected.high]
    )
    read = [at_kl(one["points"], 1.0)[0] for one in runs]
    assert only["difference"] == pytest.approx(np.mean(read[1::2]) - np.mean(read[::2]))
    assert typical_std([only]).rest == pytest.approx(expected.std.rest)
    for one in runs:
        one["points"][0].pop("by_prompt")  # as an earlier release wrote them
    assert differences(runs, 1.0)[0]["prompts"] == 0


@pytest.mark.nightly
def test_a_sweep_can_be_decided_on_other_prompts_than_those_reported(copied, capsys):
    folder, _, _ = copied
    text = GRID.replace("sweep_seed: 0\n", "sweep_seed: 1\nsweep_prompts: 2\n").replace("[1, 2]", "[1]")
    path = write_grid(folder, text[: text.index("  random")], out="grid")
    assert number_of_runs(*load_grid(path)) == 3
    assert main(["compare", str(path)]) == 0
    runs = results_of(folder / "grid")["runs"]
    assert [(run["reported"], len(run["points"][-1]["by_prompt"])) for run in runs] == [
        (False, 2),
        (False, 2),
        (True, 3),
    ]
    for change, words in (
        ("sweep_prompts: 4", "eval.prompts 3 and sweep_prompts 4 are more than the 6 prompts that are held out"),
        ("sweep_prompts: 2\nsweep_seed: null", "set sweep_seed, or leave sweep_prompts out"),
    ):
        wrong = text.replace("sweep_seed: 1\n", "" if "seed" in change else "sweep_seed: 1\n")
        path = write_grid(folder, wrong.replace("sweep_prompts: 2", change), "wrong", "wrong-out")
        assert main(["compare", str(path), "--dry-run"]) == 2
        assert words in capsys.readouterr().err


def test_names_in_pictures_keep_their_values():
    one = run("dpo", "policy.beta=0.1 policy.training.learning_rate=3e-05", 0, points((1.0, 0.1)))
    assert _name(one) == "dpo beta=0.1 learning_rate=3e-05"
    assert _name({**one, "label": ""}) == "dpo"


def test_the_best_setting_is_the_best_at_the_kl_asked_for():
    runs = [
        run("a", "low", 0, points((1.0, 0.2), (2.0, 0.25)), reported=False),
        run("a", "high", 0, points((1.0, 0.1), (9.0, 0.9)), reported=False),
        run("b", "", 0, points((1.0, 0.9))),
    ]
    assert best_setting(summarise_runs(runs, 1.0), "a") == "low"
    assert best_setting(summarise_runs(runs, None), "a") == "high"


def test_two_processes_are_refused(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, settings = load_grid(write_grid(workplace, GRID, "two", "two-out"))
    with pytest.raises(UserError, match="one process"):
        comparison.check_grid(settings)
