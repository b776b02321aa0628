"""An oracle and a policy of different tokenizers: the run, the comparison, the dry run, the command, and bad input."""

import json
import re

import numpy as np
import pytest

from sepo.cli import main
from sepo.data.ragged import SIDES, flat, segment_sums
from sepo.data.tables import provenance_of, read_table
from sepo.models.tokenizer import load_tokenizer
from sepo.report.payload import unpack
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import tiny_tokenizer_of


def save(folder, tokenizer, architecture="llama", **changes):
    size = len(tokenizer)
    tiny_model(architecture, vocab_size=size, max_position_embeddings=512, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder / "small", tiny_tokenizer_of("gpt2"))
    save(folder / "large", tiny_tokenizer_of("llama2"), eos_token_id=tiny_tokenizer_of("llama2").eos_token_id)
    rows = []
    for index in range(24):
        texts = (f"Yes, wonderful weather, thanks {index}! ☕", f"no, terrible {index}" + " and so on" * (index % 2))
        good, bad = ([{"role": "assistant", "content": text}] for text in texts)
        rows.append({"prompt": [{"role": "user", "content": f"Is it {index}?"}], "chosen": good, "rejected": bad})
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
name: two
output_dir: {folder / "run"}
data: {{source: {folder / "prefs.jsonl"}, held_out: 6}}
reference: {{model: {folder / "small"}}}
device: cpu
oracle: {{training: {{learning_rate: 0.002, batch_size: 6}}}}
policy: {{model: {folder / "large"}, objective: dpo, training: {{learning_rate: 0.001, batch_size: 6}}}}
eval: {{gold: vader, prompts: 2, samples: 1, max_new_tokens: 4}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(workplace):
    assert main(["run", str(workplace / "recipe.yaml")]) == 0
    return workplace


def sums(table):
    return {
        (pair, side): total
        for side in SIDES
        for pair, total in zip(
            table["pair_id"].to_pylist(), segment_sums(*flat(table[f"{side}_rewards"])), strict=True
        )
    }  # fmt: skip


def test_the_policy_is_trained_on_its_own_tokens_with_the_oracles_rewards(finished):
    run = finished / "run"
    before, after = read_table(run / "scores", "scores"), read_table(run / "transfer" / "scores", "scores")
    assert before["chosen_ids"] != after["chosen_ids"]
    expected, found = sums(before), sums(after)
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in found) < 1e-5
    own = load_tokenizer(run / "policy")
    assert own.decode(after["chosen_ids"][0].as_py()).rstrip().endswith("☕<|end|>")
    selection = read_table(run / "selection", "selection")
    assert selection["chosen_ids"] == after["chosen_ids"]
    assert provenance_of(selection)["transferred_from"]["allocation"] == "bytes"
    held_out = read_table(run / "transfer" / "scores_held_out", "scores")
    assert held_out["pair_id"] == read_table(run / "scores_held_out", "scores")["pair_id"]


def test_the_metrics_say_how_the_tokenizers_cut(finished):
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert metrics["transfer/pairs"] == metrics["pairs/train"] == 18
    assert 0 < metrics["transfer/one_to_one_share"] < 1
    assert metrics["transfer/bytes_per_group"] > 1
    assert 0 < metrics["transfer/larger_groups_share"] < 1
    assert metrics["transfer/lost_share"] == 0
    assert {"gold_reward/policy", "fidelity/auc"} <= metrics.keys()


def test_the_report_shows_a_pair_under_both_tokenizers(finished):
    run = finished / "run"
    page = (run / "report.html").read_text(encoding="utf-8")
    header, arrays = unpack(re.search(r'id="data">([^<]*)<', page)[1])
    for folder, prefix, pieces in (("scores", "other_", header["other"]), ("transfer/scores", "", header["pieces"])):
        table = read_table(run / folder, "scores")
        for side in SIDES:
            rewards, lengths = flat(table[f"{side}_rewards"])
            assert np.array_equal(arrays[f"{prefix}{side}_rewards"], rewards)
            assert np.array_equal(arrays[f"{prefix}{side}_lengths"], lengths)
            ids = np.array(pieces["id"])[arrays[f"{prefix}{side}_pieces"]]
            assert np.array_equal(ids, flat(table[f"{side}_ids"])[0])
    assert header["documents"]["metrics"]["transfer/one_to_one_share"] > 0


def test_another_spread_does_the_transfer_again_and_nothing_before_it(finished, capsys):
    assert main(["run", str(finished / "recipe.yaml"), "transfer.allocation=first"]) == 0
    said = capsys.readouterr().err.splitlines()
    done = {line.split("]")[0][1:] for line in said if line.startswith("[") and line.endswith(" s")}
    assert done == {"transfer", "select", "train", "eval"}


def test_an_objective_with_a_reference_reads_the_policys_own(finished):
    run = finished / "run"
    logps = read_table(run / "logps" / "policy_start", "logps")
    ids = read_table(run / "transfer" / "pairs" / "train", "pairs")
    assert np.array_equal(flat(logps["chosen_logps"])[1], flat(ids["chosen_ids"])[1])
    history = json.loads((run / "policy" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)


def test_dry_runs_show_the_transfer(workplace, capsys):
    assert main(["run", str(workplace / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("policy_pairs", "bytes a group", "transfer"))


@pytest.mark.nightly
def test_a_comparison_of_policies_with_and_without_a_tokenizer_of_their_own(workplace, capsys):
    """All variants see the same pairs, under their policies' tokens; selective ones share one oracle."""
    (workplace / "grid.yaml").write_text(
        f"""
name: grid
output_dir: {workplace / "grid"}
base: recipe.yaml
set: {{policy.training.max_steps: 1, eval.prompts: 1}}
checkpoints: 1
variants:
  dpo: {{}}
  sepo: {{set: {{policy.objective: sepo}}}}
  same: {{set: {{policy: {{objective: sepo, model: {workplace / "small"}}}}}}}
"""
    )
    assert main(["compare", str(workplace / "grid.yaml")]) == 0
    shared = sorted(path.name.split("-")[0] for path in (workplace / "grid" / "shared").iterdir())
    assert shared.count("oracle") == shared.count("policy_pairs") == shared.count("transfer") == 1
    assert shared.count("select") == 2
    rows = json.loads((workplace / "grid" / "compare.json").read_text())["runs"]
    assert [row["points"][-1]["pairs_seen"] for row in rows] == [6, 6, 6]


def test_the_command_carries_a_table_over(finished, capsys):
    run, out = finished / "run", finished / "unbatched"
    arguments = ["--data", str(finished / "prefs.jsonl"), "--tokenizer", str(finished / "large"), "--out", str(out)]
    assert main(["transfer", "--table", str(run / "scores"), *arguments, "--allocation", "group"]) == 0
    assert "one_to_one_share" in capsys.readouterr().out
    found = read_table(out, "scores")
    assert sums(found).keys() == sums(read_table(run / "scores", "scores")).keys()
    assert main(["select", "--table", str(out), "--out", str(finished / "chosen")]) == 0


def test_rows_that_are_not_in_the_source_are_counted_and_none_left_is_refused(finished, capsys, tmp_path):
    run = finished / "run"
    rows = (finished / "prefs.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(rows[:15]) + "\n")
    (tmp_path / "others.jsonl").write_text("".join(row.replace("rri", "rr") + "\n" for row in rows))
    arguments = ["transfer", "--table", str(run / "scores"), "--tokenizer", str(finished / "large")]
    assert main([*arguments, "--data", str(tmp_path / "some.jsonl"), "--out", str(tmp_path / "a")]) == 0
    assert "no such pair" in capsys.readouterr().err
    assert main([*arguments, "--data", str(tmp_path / "others.jsonl"), "--out", str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("sepo: no pair of")
    assert "other text 18" in last
    assert not list((tmp_path / "b").glob("part-*"))


def test_what_cannot_be_mapped_to_bytes_is_refused_before_anything_is_read(finished, capsys, tmp_path):
    odd = tiny_tokenizer()
    spec = json.loads(odd.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {
        f"@{token}" if len(token) == 1 else token: i for token, i in spec["model"]["vocab"].items()
    }
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(?=[ -~])"}, "content": "@"}
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "@[ -~]"}, "behavior": "Isolated", "invert": False}
    odd._tokenizer = type(odd.backend_tokenizer).from_str(json.dumps(spec))
    save(tmp_path / "odd", odd)
    code = main(
        ["run", str(finished / "recipe.yaml"), f"policy.model={tmp_path / 'odd'}", f"output_dir={tmp_path / 'r'}"]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "cannot be mapped to bytes" in error
    assert not (tmp_path / "r" / "pairs").exists()


def test_eval_of_two_models_with_different_tokenizers_is_refused(finished, capsys, tmp_path):
    arguments = ["--policy", str(finished / "large"), "--base", str(finished / "small"), "--out", str(tmp_path / "e")]
    assert main(["eval", *arguments, "--data", str(finished / "prefs.jsonl")]) == 2
    assert "different tokenizers" in capsys.readouterr().err
