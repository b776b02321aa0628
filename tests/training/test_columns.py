"""Weights of pairs and tokens from the columns of a dataset: the same losses as from tables, or a plain refusal."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pairs import config, some_pairs
from sepo.credit.selection import select_key_tokens
from sepo.data.tables import make_table
from sepo.errors import UserError
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

TEXT = [{"prompt": f"Is it {i}?", "chosen": f" Yes, {i}!", "rejected": f" no {i} here"} for i in range(6)]


def selection():
    pairs, rng = some_pairs(6), np.random.default_rng(0)
    columns = {name: pairs.column(name) for name in pairs.column_names}
    for side in ("chosen", "rejected"):
        lengths = [len(row) for row in pairs.column(f"{side}_ids")]
        columns[f"{side}_rewards"] = [
            rng.normal(0.5 * (side == "chosen"), size=length).astype(np.float32) for length in lengths
        ]
    return select_key_tokens(make_table("scores", columns), k_chosen=0.5, k_rejected=0.5, credit="reward", confidence=1)


def as_columns(table: pa.Table) -> list[dict]:
    """A selection as other tools write it: a weight for every token."""
    rows = []
    for row in table.to_pylist():
        for side in ("chosen", "rejected"):
            weights = [0.0] * len(row[f"{side}_ids"])
            for position, weight in zip(row.pop(f"{side}_positions"), row[f"{side}_weights"], strict=True):
                weights[position] = weight
            row[f"{side}_weights"] = weights
        rows.append(row)
    return rows


def loss(tmp_path, data, tokenizer=None, **settings):
    settings = {"objective": "tis_dpo", "max_steps": 1} | settings
    trainer = PreferenceTrainer(
        tiny_model("llama"), config(tmp_path, **settings), data, eval_dataset=data, processing_class=tokenizer
    )
    return trainer.evaluate()["eval_loss"], trainer


@pytest.mark.parametrize("objective", ["tis_dpo", "simpo"])
def test_a_dataset_of_ids_and_weights_gives_the_loss_of_the_selection(tmp_path, objective):
    table = selection()
    data = datasets.Dataset.from_list(as_columns(table))
    found, trainer = loss(tmp_path, data, objective=objective)
    assert found == loss(tmp_path, table, objective=objective)[0]
    assert len(set(np.round(trainer.train_dataset.pairs.weights, 4))) > 2
    renamed = data.rename_column("pair_weight", "weight")
    assert loss(tmp_path, renamed, objective=objective, weight_column="weight")[0] == found
    assert loss(tmp_path, renamed, objective=objective)[0] != found  # the column is not asked for


def test_weights_of_pairs_of_text_weight_the_mean_of_the_losses(tmp_path):
    def of(rows):
        data = datasets.Dataset.from_list(rows)
        return loss(tmp_path, data, tiny_tokenizer(), objective="simpo")[0]

    rows = [row | {"pair_id": 10 - i} for i, row in enumerate(TEXT)]
    rows[2]["chosen"] = rows[2]["rejected"]  # dropped: the others keep their weights
    weights = [0.0, 0.5, 9.0, 1.0, 2.0, 3.0]
    single = [of([row]) for i, row in enumerate(rows) if i != 2]
    kept = [weight for i, weight in enumerate(weights) if i != 2]
    weighted = of([row | {"pair_weight": weight} for row, weight in zip(rows, weights, strict=True)])
    assert weighted == pytest.approx(np.dot(single, kept) / 5, rel=1e-5)


def test_rows_without_weights_are_left_out_unless_all_are(tmp_path, capsys):
    rows = as_columns(selection())
    some = [row | {"chosen_weights": None, "rejected_weights": None} if i < 2 else row for i, row in enumerate(rows)]
    _, trainer = loss(tmp_path, datasets.Dataset.from_list(some))
    assert len(trainer.train_dataset) == 4
    assert "2 pairs without weights are left out" in capsys.readouterr().err
    none = datasets.Dataset.from_list(rows).remove_columns(["chosen_weights", "rejected_weights"])
    assert len(loss(tmp_path, none)[1].train_dataset) == 6


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        ({"chosen_weights": [1.0]}, {}, "must be one finite number for each of chosen_ids"),
        ({"rejected_weights": [float("nan")]}, {}, "must be one finite number"),
        ({"chosen_ids": None}, {}, "a row has no token ids"),
        ({"chosen_ids": "text"}, {}, "hold no lists of numbers"),
        ({"pair_weight": -1.0}, {}, "expected 0 or more"),
        ({"pair_weight": None}, {}, "expected 0 or more"),
        ({"pair_weight": "heavy"}, {}, "holds no numbers"),
        ({}, {"weight_column": "pair_wieght"}, "has no column 'pair_wieght' .did you mean 'pair_weight'"),
        ({"chosen_tokens": ["a"], "rejected_tokens": ["b"]}, {}, "belong to another tokenizer"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, change, settings, says):
    row = {
        "prompt_ids": [4, 40], "chosen_ids": [60, 61], "rejected_ids": [70],
        "chosen_weights": [1.0, 0.0], "rejected_weights": [1.0], "pair_weight": 1.0,
    }  # fmt: skip
    data = datasets.Dataset.from_list([row | change])
    with pytest.raises(UserError, match=says):
        loss(tmp_path, data, tiny_tokenizer(), **settings)
