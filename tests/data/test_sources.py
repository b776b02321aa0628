"""Several sources in one recipe: own options for each, shares, ids that stay apart, held-out pairs of each."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest
import yaml

from sepo.cli import main
from sepo.data.splits import share_rows
from sepo.data.tables import provenance_of, read_table
from sepo.errors import UserError
from sepo.recipe.reading import dump_recipe, parse_recipe
from sepo.stages.data import ROWS_PER_SOURCE, prepare_data, read_sources
from tiny_models import tiny_tokenizer
from tiny_run import prepare


@pytest.fixture
def sources(tmp_path):
    """40 pairs as JSON lines, 12 as CSV with other columns, whose first prompts the other file has too."""
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "b.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "better", "worse"])
        writer.writerows([f"Is it {i}?", f"Sure, {i}.", f"never {i}"] for i in range(6))
        writer.writerows([f"Was it {i}?", f"Sure, {i}.", f"never {i}"] for i in range(6))
        writer.writerow(["", "same", "same"])
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    return [{"source": str(tmp_path / "a.jsonl")}, {"source": str(tmp_path / "b.csv"), "columns": names}]


def settings(sources, **data):
    return parse_recipe({"data": {"sources": sources, "as_chat": True, "held_out": 0.25, **data}}, "test").data


def prepared(tmp_path, sources, **data):
    results = prepare_data(settings(sources, **data), tiny_tokenizer(), tmp_path / "out", progress=False)
    return results, *(read_table(tmp_path / "out" / part, "pairs") for part in ("train", "held_out"))


def source_of(table):
    return table.column("pair_id").to_numpy() // ROWS_PER_SOURCE


def test_every_pair_of_every_source_is_read_with_its_own_options_and_an_id_of_its_own(tmp_path, sources, capsys):
    results, train, held_out = prepared(tmp_path, sources)
    ids = train.column("pair_id").to_pylist() + held_out.column("pair_id").to_pylist()
    assert Counter(pair_id // ROWS_PER_SOURCE for pair_id in ids) == {0: 40, 1: 12}
    assert len(set(ids)) == 52
    rows = {row["pair_id"]: row for table in (train, held_out) for row in table.to_pylist()}
    text = tiny_tokenizer().decode(rows[ROWS_PER_SOURCE + 7]["chosen_ids"], skip_special_tokens=True)
    assert text == "Sure, 1."  # row 7 of the second file
    counts = [Counter(source_of(table).tolist()) for table in (train, held_out)]
    assert results["sources"] == [
        {"source": name, "train": counts[0][number], "held_out": counts[1][number]}
        for number, name in enumerate(["a.jsonl (train)", "b.csv (train)"])
    ]
    assert all(row["held_out"] for row in results["sources"])
    said = capsys.readouterr().err
    assert f"b.csv (train): {counts[0][1]} train, {counts[1][1]} held out" in said
    assert "13 rows, 12 pairs kept" in said
    assert len(provenance_of(train)["sources"]) == 2
    # A prompt of both sources is on one side.
    prompts = [{tuple(row) for row in table.column("prompt_ids").to_pylist()} for table in (train, held_out)]
    assert not prompts[0] & prompts[1]


def test_weights_are_the_shares_of_the_pairs_and_the_scarce_source_keeps_all(tmp_path, sources):
    weighted = [sources[0] | {"weight": 1}, sources[1] | {"weight": 3}]
    _, train, held_out = prepared(tmp_path, weighted)
    found = Counter([*source_of(train).tolist(), *source_of(held_out).tolist()])
    assert found == {0: 4, 1: 12}
    _, again, _ = prepared(tmp_path, weighted)
    assert again.equals(train)
    # Twice the weight keeps the pairs that the smaller one kept.
    _, larger, more = prepared(tmp_path, [sources[0] | {"weight": 2}, sources[1] | {"weight": 3}])
    ids = [
        {*a.column("pair_id").to_pylist(), *b.column("pair_id").to_pylist()}
        for a, b in ((train, held_out), (larger, more))
    ]
    assert ids[0] < ids[1]


@pytest.mark.parametrize(("counts", "weights", "kept"), [((10, 4), (1, 1), (4, 4)), ((3, 9, 5), (3, 1, 1), (3, 1, 1))])
def test_shares_are_as_large_as_the_scarcest_group_allows(counts, weights, kept, tmp_path, sources):
    (source,), _ = read_sources(settings(sources), tiny_tokenizer(), tmp_path, progress=False)
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = share_rows(source.rows.pair_ids[: len(groups)], groups, weights).tolist()
    assert rows == sorted(rows)
    assert tuple(np.bincount(groups[rows])) == kept


def test_one_source_in_a_list_is_that_source(tmp_path, sources):
    alone = parse_recipe({"data": {"as_chat": True, "held_out": 0.25, **sources[0]}}, "test").data
    prepare_data(alone, tiny_tokenizer(), tmp_path / "alone", progress=False)
    _, train, held_out = prepared(tmp_path, sources[:1])
    for table, part in ((train, "train"), (held_out, "held_out")):
        assert table.to_pylist() == read_table(tmp_path / "alone" / part, "pairs").to_pylist()


def test_held_out_pairs_may_have_a_source_of_their_own(tmp_path, sources):
    (tmp_path / "test.jsonl").write_text('{"prompt": "Eh?", "chosen": "a b", "rejected": "c"}\n')
    results, train, held_out = prepared(tmp_path, sources, held_out_source=str(tmp_path / "test.jsonl"))
    assert (len(train), len(held_out)) == (52, 1)
    assert [set(row) for row in results["sources"]] == [{"source", "train"}] * 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"source": "mine.jsonl"}, "leave out data.source"),
        ({"split": "test"}, "leave out data.split"),
        ({"columns": {"chosen": "a"}}, "leave out data.columns"),
        ({"held_out_split": "test"}, "leave out data.held_out_split"),
        ({"on_policy": {"gold": "vader"}}, "set source instead of sources"),
        ({"sources": [{"source": "a", "weight": 1}, {"source": "b"}]}, "give every source one, or none"),
        ({"sources": [{"source": "a", "weight": 1}, {"source": "a", "weight": 2}]}, "two sources are the same"),
        ({"sources": [{"source": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"source": "a", "wieght": 1}]}, "unknown key 'data.sources.0.wieght'"),
        ({"sources": []}, "at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(data, says):
    with pytest.raises(UserError, match=says):
        parse_recipe({"data": {"sources": [{"source": "a"}, {"source": "b"}], **data}}, "test")


def test_a_run_counts_its_pairs_by_source_and_names_every_source(tmp_path, sources, capsys):
    prepare(tmp_path, "")
    recipe = {
        "name": "mixed",
        "output_dir": str(tmp_path / "run"),
        "data": {"sources": sources, "as_chat": True, "held_out": 5},
        "reference": {"model": str(tmp_path / "model")},
        "device": "cpu",
        "oracle": {"training": {"batch_size": 16}},
        "policy": {"training": {"batch_size": 16}},
        "eval": {"prompts": 0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    assert "a.jsonl" in (said := capsys.readouterr().out)
    assert "b.csv" in said
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["pairs/train/1"] + metrics["pairs/train/2"] == metrics["pairs/train"] == 47
    assert f"{metrics['pairs/train/2']} pairs of b.csv" in capsys.readouterr().out
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "a.jsonl; a file or folder, b.csv" in card
    assert str(tmp_path) not in card


def test_a_recipe_with_sources_is_written_and_read_back(sources):
    recipe = parse_recipe({"data": {"sources": sources}}, "test")
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "test") == recipe
