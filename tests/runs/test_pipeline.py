"""The whole job on a tiny model: every stage, reuse, changed settings, stage commands, and bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sepo.cli import main
from sepo.credit.rewards import given_rewards
from sepo.data.ragged import flat
from sepo.data.tables import make_table, read_shard, read_table, table_paths
from sepo.errors import UserError
from sepo.recipe.settings import SftSettings, SftTrainingSettings
from sepo.report.reading import read_training
from sepo.sft import train_reference
from sepo.stages import data
from sepo.training.checkpoints import last_checkpoint, seal_checkpoint
from tiny_models import tiny_model, tiny_tokenizer
from tiny_run import COLORS, run_command, stages_done

PROMISED_FILES = [
    *("recipe.yaml", "manifest.json", "metrics.json", "report.html", "eval/generations.parquet"),
    *("oracle/model.safetensors", "policy/model.safetensors", "policy/tokenizer.json", "policy/trainer_state.json"),
]


def test_a_run_leaves_everything_it_promises(finished_run):
    run = finished_run / "run"
    for name in PROMISED_FILES:
        assert (run / name).is_file(), name
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("gold_reward/base", "gold_reward/base_se", "gold_reward/policy", "gold_reward/policy_se", "kl", "kl_se",
                "oracle/accuracy", "oracle/accuracy_not_longer", "oracle/length_baseline", "policy/accuracy",
                "policy/accuracy_not_longer", "length/base", "length/policy", "fidelity/auc",
                "seconds/oracle", "seconds/train", "memory_gb/train"):  # fmt: skip
        assert isinstance(metrics[key], int | float), key
    assert metrics["pairs/train"] == 28
    assert metrics["pairs/held_out"] == 10
    report = json.loads((run / "manifest.json").read_text())["stages"]["data"]["results"]["report"]["train"]
    assert report["dropped"] == {"identical responses": 1, "missing value": 1}
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("logs"))  # nothing reported: the records of checkpoints are no logs
    assert not (run / "policy" / "checkpoints").exists()


def test_rewards_and_selection_agree_with_the_stored_log_probabilities(finished_run):
    run = finished_run / "run"
    scores, selection = read_table(run / "scores", "scores"), read_table(run / "selection", "selection")
    oracle, reference = (read_table(run / "logps" / name, "logps") for name in ("oracle", "reference"))
    for side in ("chosen", "rejected"):
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        expected = flat(oracle.column(f"{side}_logps"))[0] - flat(reference.column(f"{side}_logps"))[0]
        np.testing.assert_array_equal(rewards, expected)
        assert lengths.tolist() == flat(scores.column(f"{side}_ids"))[1].tolist()
        kept = flat(selection.column(f"{side}_positions"))[1]
        assert kept.tolist() == np.maximum(1, np.floor(0.3 * lengths + 1e-9)).tolist()
    tokenizer = tiny_tokenizer()
    assert all(tokenizer.decode(ids).endswith("</s>") for ids in scores.column("chosen_ids").to_pylist())
    assert all(tokenizer.decode(ids).count("<s>") == 1 for ids in scores.column("prompt_ids").to_pylist())


def test_the_oracle_learns_the_held_out_preference(finished_run):
    metrics = json.loads((finished_run / "run" / "metrics.json").read_text())
    assert metrics["oracle/accuracy"] > 0.9
    assert metrics["policy/accuracy"] > 0.9


def test_a_second_run_reuses_everything_and_a_changed_rate_redoes_what_follows(
    finished_run, copied_run, capsys, tmp_path, monkeypatch
):
    again = run_command(finished_run, copied_run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where it is started, and what lies there, does not matter
    before = (copied_run / "selection" / "part-00000.parquet").read_bytes()
    assert main(again) == 0
    assert stages_done(capsys.readouterr().err) == []
    assert main([*again, "select.k_chosen=0.5"]) == 0
    assert stages_done(capsys.readouterr().err) == ["select", "train", "eval"]
    assert main(again) == 0
    assert stages_done(capsys.readouterr().err) == ["select", "train", "eval"]
    assert (copied_run / "selection" / "part-00000.parquet").read_bytes() == before


def test_the_rewards_of_several_oracles_are_averaged_and_the_first_is_the_run_of_one(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    quick = ("policy.training.max_steps=1", "eval.prompts=1", "eval.samples=1", "eval.max_new_tokens=2")
    command = ["run", str(finished_run / "recipe.yaml"), f"output_dir={run}", *quick]
    assert main([*command, "oracle.count=2"]) == 0
    assert stages_done(capsys.readouterr().err) == ["data", "oracle", "oracle-2", "score", "select", "train", "eval"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run / "oracle", run / "oracle-2")]
    assert weights[0] == (finished_run / "run" / "oracle" / "model.safetensors").read_bytes()
    assert weights[1] != weights[0]
    for scores, part in (("scores", "."), ("scores_held_out", "held_out")):
        table = read_table(run / scores, "scores")
        first, second, reference = (
            read_table(run / "logps" / name / part, "logps") for name in ("oracle", "oracle-2", "reference")
        )
        for side in ("chosen_logps", "rejected_logps"):
            one, two, base = (flat(stored.column(side))[0].astype(float) for stored in (first, second, reference))
            rewards = flat(table.column(side.replace("logps", "rewards")))[0]
            np.testing.assert_allclose(rewards, (one + two) / 2 - base, atol=1e-5)
            assert np.abs(rewards - (one - base)).max() > 1e-2
    assert [curves["model"] for curves in read_training(run)] == ["oracle", "oracle-2", "policy"]
    assert main(command) == 0  # one is enough after all
    assert stages_done(capsys.readouterr().err) == ["score", "select", "train", "eval"]
    assert read_table(run / "scores", "scores").equals(read_table(finished_run / "run" / "scores", "scores"))
    assert [curves["model"] for curves in read_training(run)] == ["oracle", "policy"]


def test_a_contrastive_oracle_is_measured_against_its_opposite_and_its_rewards_can_be_imported(
    finished_run, tmp_path, capsys
):
    command = ["run", str(finished_run / "recipe.yaml"), "eval.prompts=0", "policy.training.max_steps=1"]
    contrastive = ["oracle.contrastive=true", "policy.objective=tgdpo", f"output_dir={tmp_path / 'one'}"]
    assert main([*command, *contrastive, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert all(f"\n{name} " in plan for name in ("oracle", "oracle-reversed"))
    assert "the reward of every token, which tgdpo reads" in plan
    assert main([*command, *contrastive]) == 0
    assert stages_done(capsys.readouterr().err)[:3] == ["data", "oracle", "oracle-reversed"]
    table, run = read_table(tmp_path / "one" / "scores", "scores"), tmp_path / "one" / "logps"
    for side in ("chosen", "rejected"):
        stored = [read_table(run / name, "logps") for name in ("oracle", "oracle-reversed", "reference")]
        one, opposite, base = (flat(logps.column(f"{side}_logps"))[0].astype(float) for logps in stored)
        np.testing.assert_allclose(flat(table.column(f"{side}_rewards"))[0], one - opposite, atol=1e-5)
        assert np.sum((one - base) * (opposite - base)) < 0  # they learnt the opposite of each other
    history = json.loads((tmp_path / "one" / "policy" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)

    columns = {"good": table.column("chosen_rewards"), "bad": table.column("rejected_rewards")}
    given = pa.table({"pair_id": table.column("pair_id"), **columns}).take(np.arange(len(table))[::-1])
    pq.write_table(given, tmp_path / "given.parquet")
    imported = [f"oracle.rewards={tmp_path / 'given.parquet'}", "oracle.reward_columns=[good, bad]"]
    assert main([*command, *imported, "policy.objective=wspo", f"output_dir={tmp_path / 'two'}"]) == 0
    assert "oracle" not in stages_done(capsys.readouterr().err)
    again = read_table(tmp_path / "two" / "scores", "scores")
    assert again.column("chosen_rewards").to_pylist() == table.column("chosen_rewards").to_pylist()
    assert again.column("rejected_rewards").to_pylist() == table.column("rejected_rewards").to_pylist()
    for change, words in (
        (
            ["oracle.reward_columns=[good, worse]"],
            "cannot be read as parquet with pair_id and lists of numbers in good",
        ),
        (["oracle.count=2"], "rewards are given: leave model and count out"),
        (["oracle.contrastive=true"], "contrastive trains two models, but rewards is given"),
    ):
        assert main([*command, *imported, *change, f"output_dir={tmp_path / 'none'}"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.slice(1), "lack 1 of 3 pairs, the first pair_id 7"),
        (lambda given: pa.concat_tables([given, given]), "hold a pair_id twice"),
        (lambda given: given.set_column(1, "a", given.column("b")), "pair 7 has 1 numbers for a response of 2 tokens"),
    ],
)
def test_given_rewards_that_do_not_fit_the_pairs_are_refused(change, message):
    ids = {"pair_id": [7, 8, 9], "prompt_ids": [[1]] * 3, "chosen_ids": [[1, 2]] * 3, "rejected_ids": [[3]] * 3}
    pairs = make_table("pairs", ids)
    given = pa.table({"pair_id": [7, 8, 9], "a": [[0.5, 1.0]] * 3, "b": [[0.25]] * 3})
    assert given_rewards(pairs, given, ("a", "b")).column("chosen_rewards").to_pylist() == [[0.5, 1.0]] * 3
    with pytest.raises(UserError, match=message):
        given_rewards(pairs, change(given), ("a", "b"))


@pytest.mark.nightly
def test_a_rival_objective_runs_from_the_same_recipe_on_held_out_pairs_of_another_source(finished_run, tmp_path):
    lines = (finished_run / "prefs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(line.replace("Is it", "Was it") for line in lines[10:22]))
    settings = (
        "policy.objective=tdpo2",
        "policy.beta=0.05",
        f"data.held_out_source={tmp_path / 'other.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
    )
    assert main(["run", str(finished_run / "recipe.yaml"), *settings]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["pairs/train"], metrics["pairs/held_out"]) == (38, 10)
    prompts = read_table(tmp_path / "run" / "pairs" / "held_out", "pairs").column("prompt_ids").to_pylist()
    assert all("Was it" in tiny_tokenizer().decode(ids) for ids in prompts)
    history = json.loads((tmp_path / "run" / "policy" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # the reference is where the policy starts
    assert metrics["policy/accuracy"] > 0.9


def test_selection_rules_and_objectives_are_settings_of_the_stage_commands(finished_run, tmp_path, capsys):
    run = finished_run / "run"
    first = str(run / "scores")
    rule = ("rule_chosen=mass", "rule_rejected=random", "credit=soft", "temperature=20")
    two = ("--table", first, "--table", first, "--combine", "min")
    for name, tables in (("one", ("--table", first)), ("two", two)):
        assert main(["select", *tables, "--k", "0.6", "--seed", "4", "--out", str(tmp_path / name), *rule]) == 0
    assert "chosen/share" in capsys.readouterr().out
    one, two = (read_table(tmp_path / name, "selection") for name in ("one", "two"))
    assert one.to_pylist() == two.to_pylist()
    assert len({weight for row in one.to_pylist() for weight in row["chosen_weights"]}) > 2
    train = ["train", "--policy", str(finished_run / "model"), "--selection", str(tmp_path / "one"), "--device", "cpu"]
    few = ("max_steps=1", "batch_size=4")
    assert main([*train, "--objective", "tis_dpo", "--beta", "0.2", "--out", str(tmp_path / "policy"), *few]) == 0
    assert main([*train, "--objective", "tis_dop", "--out", str(tmp_path / "none"), *few]) == 2
    assert main([*train, "--objective", "ipo", "--label-smoothing", "0.1", "--out", str(tmp_path / "none"), *few]) == 2
    assert not (tmp_path / "none").exists()


def test_pairs_of_a_prompt_share_a_shard_and_a_table_of_one_shard_keeps_its_order(finished_run, tmp_path, monkeypatch):
    table = read_table(finished_run / "run" / "pairs" / "train", "pairs").slice(0, 8)
    prompts = table.column("prompt_ids").to_pylist()
    twice = pa.table({**{name: table.column(name) for name in table.column_names}, "prompt_ids": prompts[:4] * 2})
    twice = twice.cast(table.schema)
    data.write_pairs(tmp_path / "one", twice)
    assert read_table(tmp_path / "one", "pairs").equals(twice)
    monkeypatch.setattr(data, "PAIRS_PER_SHARD", 2)
    data.write_pairs(tmp_path / "four", twice)
    shards = [read_shard(path, "pairs") for path in table_paths(tmp_path / "four", "pairs")]
    assert [len({tuple(ids) for ids in shard["prompt_ids"].to_pylist()}) for shard in shards] == [1] * 4
    assert sorted(pair for shard in shards for pair in shard["pair_id"].to_pylist()) == sorted(
        twice["pair_id"].to_pylist()
    )


def test_stage_commands_give_what_the_run_gives(finished_run, tmp_path, capsys):
    model, data, run = str(finished_run / "model"), str(finished_run / "prefs.jsonl"), finished_run / "run"

    def sepo(line, *training):
        words = line.format(model=model, data=data, oracle=run / "oracle", tmp=tmp_path).split(" ")
        assert main([*words, *training]) == 0

    sepo("score --oracle {oracle} --reference {model} --data {data} --out {tmp}/scores --device cpu")
    assert "oracle/accuracy" in capsys.readouterr().out
    own = {row["pair_id"]: row for row in read_table(tmp_path / "scores", "scores").to_pylist()}
    for row in read_table(run / "scores", "scores").to_pylist():
        assert own[row["pair_id"]]["chosen_ids"] == row["chosen_ids"]
        np.testing.assert_allclose(own[row["pair_id"]]["chosen_rewards"], row["chosen_rewards"], atol=1e-5)
    sepo("select --table {tmp}/scores --k 0.3 --out {tmp}/selection")
    few = ("max_steps=2", "batch_size=4", "learning_rate=1e-3")
    sepo("train --policy {model} --selection {tmp}/selection --out {tmp}/policy --device cpu", *few)
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    sepo("oracle --reference {model} --data {data} --out {tmp}/oracle --device cpu --lora 4", *few)
    assert (tmp_path / "oracle" / "adapter_model.safetensors").is_file()
    sepo("score --oracle {tmp}/oracle --reference {model} --data {data} --out {tmp}/scores2 --device cpu")
    sepo("eval --policy {tmp}/policy --base {model} --data {data} --out {tmp}/eval --prompts 2 --max-new-tokens 4")
    assert "policy/accuracy" in json.loads((tmp_path / "eval" / "metrics.json").read_text())


def test_a_dry_run_shows_the_plan_and_writes_nothing(finished_run, tmp_path, capsys):
    assert main(["run", str(finished_run / "recipe.yaml"), f"output_dir={tmp_path / 'new'}", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for stage in ("data", "oracle", "score", "select", "train", "eval"):
        assert stage in output
    assert not (tmp_path / "new").exists()


def bad_inputs(folder, run, tmp_path):
    recipe, model, data = str(folder / "recipe.yaml"), str(folder / "model"), str(folder / "prefs.jsonl")
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    columns = tmp_path / "columns.csv"
    columns.write_text("prompt,chosne,rejected\na,b,c\n")
    fresh = f"output_dir={tmp_path / 'fresh'}"
    return {
        "recipe missing": (["run", str(tmp_path / "none.yaml")], "no recipe at"),
        "unknown key": (["run", recipe, "oracle.betta=1"], "did you mean 'beta'"),
        "k out of range": (["run", recipe, "select.k_chosen=1.2"], "select.k_chosen is 1.2"),
        "k out of range, stage": (["select", "--table", "x", "--k", "0", "--out", "y"], "k_chosen is 0"),
        "no such model": (["run", recipe, fresh, "reference.model=./nowhere"], "nowhere"),
        "one model, two oracles": (["run", recipe, fresh, f"oracle.model={model}", "oracle.count=2"], "leave one of"),
        "no such data": (["run", recipe, fresh, "data.source=./nowhere.parquet"], "nowhere.parquet"),
        "no such column": (["run", recipe, fresh, f"data.source={columns}"], "did you mean 'chosne'"),
        "no usable pair": (["run", recipe, fresh, f"data.source={useless}", "data.held_out=0"], "identical responses"),
        "other tokenizer": (["run", recipe, fresh, f"oracle.model={other}"], "different tokenizers"),
        "other tokenizer, score": (
            ["score", "--oracle", str(other), "--reference", model, "--data", data, "--out", str(tmp_path / "s")],
            "different tokenizers",
        ),
        "folder of another recipe": (
            ["run", recipe, f"output_dir={run}", "name=other"],
            "belongs to the recipe 'tiny'",
        ),
        "folder with other files": (["run", recipe, f"output_dir={folder}"], "not a run folder"),
        "unknown training argument": (
            ["run", recipe, fresh, "policy.training.arguments={optimm: x}"],
            "did you mean 'optim'",
        ),
        "table of another kind": (
            ["train", "--policy", model, "--selection", str(folder / "run" / "scores"), "--out", "y"],
            "is no selection table: it is a scores table",
        ),
    }


def test_bad_input_ends_in_one_line_and_code_2_before_any_model_is_loaded(
    finished_run, copied_run, tmp_path, capsys, monkeypatch
):
    import sepo.stages.logps

    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sepo.stages.logps, "load_model", never)
    for name, (command, message) in bad_inputs(finished_run, copied_run, tmp_path).items():
        capsys.readouterr()
        assert main(command) == 2, name
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sepo: ")]
        assert len(lines) == 1, name
        assert message in lines[0], name


def test_a_second_process_in_the_same_folder_is_refused(finished_run, copied_run, capsys):
    from filelock import FileLock

    with FileLock(copied_run / ".lock"):
        assert main(run_command(finished_run, copied_run)) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_help_and_recipe_print_without_loading_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom sepo.cli import main\n"
        "assert main(['recipe']) == 0\n"
        "assert main(['run', 'none.yaml']) == 2\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


def test_a_reference_can_be_fine_tuned_first(finished_run, tmp_path):
    rows = [
        {
            "prompt": "x",
            "messages": [{"role": "user", "content": f"Is it {c}?"}, {"role": "assistant", "content": "Yes!"}],
        }
        for c in COLORS
    ]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = SftSettings(
        source=str(source),
        training=SftTrainingSettings(batch_size=6, num_train_epochs=4, learning_rate=0.01, warmup_ratio=0.0),
    )
    out = train_reference(str(finished_run / "model"), sft, tmp_path / "reference", device="cpu")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert (out / "model.safetensors").is_file()
    assert not (out / "checkpoints").exists()


def test_checkpoints_of_other_settings_are_not_continued(tmp_path):
    first = {"gamma": 1.0}
    assert last_checkpoint(tmp_path, first) is None
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir()
    seal_checkpoint(tmp_path / "checkpoints" / "checkpoint-3")
    assert last_checkpoint(tmp_path, first) == str(tmp_path / "checkpoints" / "checkpoint-3")
    assert last_checkpoint(tmp_path, {"gamma": 9.0}) is None
    assert not (tmp_path / "checkpoints" / "checkpoint-3").exists()
