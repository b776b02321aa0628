"""A wrong argument of a public function ends in one line that names the argument, not in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from transformers import TrainingArguments

import sepo
from sepo.data.tables import iter_tables, read_table, write_table
from sepo.errors import UserError, check_number
from sepo.recipe.settings import PairsFrom
from tiny_models import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def have(tmp_path_factory) -> SimpleNamespace:
    """Valid arguments of every kind."""
    folder = tmp_path_factory.mktemp("arguments")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    dataset = datasets.Dataset.from_list(ROWS)
    pairs, _ = sepo.tokenize_pairs(dataset, tokenizer, progress=False)
    logps = sepo.dataset_logps(model, pairs)
    scores = sepo.pair_rewards(pairs, sepo.dataset_logps(tiny_model("llama", seed=1), pairs), logps)
    sepo.save_model(model, tokenizer, folder / "model")
    write_table(folder / "scores", scores)

    def config(**settings: Any) -> sepo.PreferenceConfig:
        return sepo.PreferenceConfig(str(folder / "out"), use_cpu=True, report_to="none", **settings)

    def trainer(model_=model, args=None, data=pairs, **others: Any) -> sepo.PreferenceTrainer:
        return sepo.PreferenceTrainer(model_, args or config(objective="dpo"), train_dataset=data, **others)

    return SimpleNamespace(
        folder=folder, model=model, tokenizer=tokenizer, dataset=dataset, pairs=pairs, logps=logps, scores=scores,
        config=config, trainer=trainer, name=str(folder / "model"), table=str(folder / "scores"),
        pair=sepo.Pair(0, (5, 6), (7, 8), (9,)), frame=pd.DataFrame(ROWS), arrow=pa.Table.from_pylist(ROWS),
        splits=datasets.DatasetDict(train=dataset), stream=dataset.to_iterable_dataset(), page=str(folder / "r.html"),
    )  # fmt: skip


Call = Callable[[SimpleNamespace], Any]
# By function: beginning of the message -> calls with a wrong argument.
WRONG: dict[str, dict[str, list[Call]]] = {
    "load_recipe": {
        "the recipe is of type": [
            lambda have: sepo.load_recipe({"seed": 1}),
            lambda have: sepo.load_recipe(5),
            lambda have: sepo.load_recipe(["a.yaml"]),
        ],
        "overrides is of type": [
            lambda have: sepo.load_recipe(None, "seed=1"),
            lambda have: sepo.load_recipe(None, {"seed": 1}),
            lambda have: sepo.load_recipe(None, None),
            lambda have: sepo.load_recipe(None, [5]),
        ],
    },
    "load_preferences": {
        "is no dataset: expected a path, a hub id": [
            lambda have: sepo.load_preferences(None),
            lambda have: sepo.load_preferences(5),
            lambda have: sepo.load_preferences({"chosen": ["a"], "rejected": ["b"]}),
            lambda have: sepo.load_preferences([("a", "b")]),
            lambda have: sepo.load_preferences(np.zeros(3)),
            lambda have: sepo.load_preferences(have.stream),
        ],
        "expected one split": [lambda have: sepo.load_preferences(have.splits)],
        "split is of type": [
            lambda have: sepo.load_preferences(ROWS, split=None),
            lambda have: sepo.load_preferences(ROWS, split=5),
        ],
        "columns is of type": [
            lambda have: sepo.load_preferences(ROWS, columns=["chosen"]),
            lambda have: sepo.load_preferences(ROWS, columns="chosen"),
            lambda have: sepo.load_preferences(ROWS, columns={"chosen": 3}),
            lambda have: sepo.load_preferences(ROWS, columns={3: "chosen"}),
        ],
        "pairs_from is of type": [
            lambda have: sepo.load_preferences(ROWS, pairs_from=5),
            lambda have: sepo.load_preferences(ROWS, pairs_from={"responses": ["a", "b"]}),
        ],
        "config_name is of type": [lambda have: sepo.load_preferences(have.folder, config_name=3)],
    },
    "tokenize_pairs": {
        "dataset is of type": [
            lambda have: sepo.tokenize_pairs(ROWS, have.tokenizer),
            lambda have: sepo.tokenize_pairs("x.jsonl", have.tokenizer),
            lambda have: sepo.tokenize_pairs(Path("x.jsonl"), have.tokenizer),
            lambda have: sepo.tokenize_pairs(None, have.tokenizer),
            lambda have: sepo.tokenize_pairs(have.frame, have.tokenizer),
            lambda have: sepo.tokenize_pairs(have.arrow, have.tokenizer),
        ],
        "dataset is a DatasetDict: expected one of its splits, train": [
            lambda have: sepo.tokenize_pairs(have.splits, have.tokenizer)
        ],
        "dataset is a stream": [lambda have: sepo.tokenize_pairs(have.stream, have.tokenizer)],
        "tokenizer is of type": [
            lambda have: sepo.tokenize_pairs(have.dataset, have.name),
            lambda have: sepo.tokenize_pairs(have.dataset, None),
            lambda have: sepo.tokenize_pairs(have.dataset, have.model),
        ],
        "max_length is": [
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_length="2048"),
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_length=None),
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_length=20.5),
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_length=-1),
        ],
        "max_prompt_length is": [
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_prompt_length="x"),
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, max_prompt_length=0),
        ],
        "chat_template_kwargs is of type": [
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, chat_template_kwargs=["a"]),
            lambda have: sepo.tokenize_pairs(have.dataset, have.tokenizer, chat_template_kwargs="a=b"),
        ],
        "workers is": [
            lambda have, n=n: sepo.tokenize_pairs(have.dataset, have.tokenizer, workers=n)
            for n in (0, "two", 1.5, None)
        ],
    },
    "sample_pairs": {
        "the sample fraction is": [
            lambda have: sepo.sample_pairs(have.pairs, 30),
            lambda have: sepo.sample_pairs(have.pairs, -0.1),
            lambda have: sepo.sample_pairs(have.pairs, "x"),
            lambda have: sepo.sample_pairs(have.pairs, None),
        ],
        "table is of type": [
            lambda have: sepo.sample_pairs(have.dataset, 0.5),
            lambda have: sepo.sample_pairs(have.table, 0.5),
        ],
        "seed is": [lambda have: sepo.sample_pairs(have.pairs, 0.5, seed="x")],
    },
    "split_pairs": {
        "held_out is": [
            lambda have: sepo.split_pairs(have.pairs, held_out=-1),
            lambda have: sepo.split_pairs(have.pairs, held_out=1.5),
            lambda have: sepo.split_pairs(have.pairs, held_out="x"),
            lambda have: sepo.split_pairs(have.pairs, held_out=99),
        ],
        "the sample fraction is": [lambda have: sepo.split_pairs(have.pairs, held_out=1, sample=30)],
        "table is": [
            lambda have: sepo.split_pairs(have.dataset, held_out=1),
            lambda have: sepo.split_pairs(None, held_out=1),
            lambda have: sepo.split_pairs(have.logps, held_out=1),
        ],
    },
    "load_tokenizer": {
        "the model is": [
            lambda have: sepo.load_tokenizer(None),
            lambda have: sepo.load_tokenizer(have.tokenizer),
            lambda have: sepo.load_tokenizer(""),
        ]
    },
    "load_model": {
        "the model is of type": [
            lambda have: sepo.load_model(None),
            lambda have: sepo.load_model(have.model),
            lambda have: sepo.load_model(have.name, adapter=have.model),
        ],
        "dtype 'torch.float32' is unknown": [lambda have: sepo.load_model(have.name, dtype=torch.float32)],
        "device is of type": [
            lambda have: sepo.load_model(have.name, device=None),
            lambda have: sepo.load_model(have.name, device=0),
        ],
        "lora is of type": [
            lambda have: sepo.load_model(have.name, lora=16),
            lambda have: sepo.load_model(have.name, lora={"r": 8}),
            lambda have: sepo.load_model(have.name, lora=True),
        ],
        "quantization '8bit' is unknown": [lambda have: sepo.load_model(have.name, quantization="8bit")],
    },
    "save_model": {
        "the model is of type": [
            lambda have: sepo.save_model(have.name, have.tokenizer, have.folder / "a"),
            lambda have: sepo.save_model(None, have.tokenizer, have.folder / "a"),
        ],
        "tokenizer is of type": [lambda have: sepo.save_model(have.model, have.name, have.folder / "a")],
        "the folder is of type": [lambda have: sepo.save_model(have.model, have.tokenizer, None)],
    },
    "combine_scores": {
        "tables is of type": [
            lambda have: sepo.combine_scores(have.scores),
            lambda have: sepo.combine_scores([]),
            lambda have: sepo.combine_scores(have.table),
            lambda have: sepo.combine_scores(None),
        ],
        "table 1 is": [
            lambda have: sepo.combine_scores([have.scores, have.table]),
            lambda have: sepo.combine_scores([have.scores, have.pairs]),
        ],
        "combine is": [lambda have: sepo.combine_scores([have.scores], None)],
    },
    "pair_rewards": {
        "pairs is": [
            lambda have: sepo.pair_rewards("a", "b", "c"),
            lambda have: sepo.pair_rewards(have.dataset, have.logps, have.logps),
            lambda have: sepo.pair_rewards(have.logps, have.logps, have.pairs),
        ],
        "oracle is": [
            lambda have: sepo.pair_rewards(have.pairs, None, have.logps),
            lambda have: sepo.pair_rewards(have.pairs, have.model, have.logps),
            lambda have: sepo.pair_rewards(have.pairs, have.pairs, have.logps),
        ],
        "reference is": [lambda have: sepo.pair_rewards(have.pairs, have.logps, have.scores)],
    },
    "token_rewards": {
        "the oracle is": [
            lambda have: sepo.token_rewards(None, have.model, "a", ["b"]),
            lambda have: sepo.token_rewards(have.pairs, have.model, "a", ["b"]),
        ],
        "the reference is": [lambda have: sepo.token_rewards(have.name, have.pairs, "a", ["b"], oracle_tokenizer=have)],
        "prompt is": [lambda have: sepo.token_rewards(have.name, have.model, {"a": 1}, ["b"])],
        "responses is": [
            lambda have: sepo.token_rewards(have.name, have.model, "a", "b"),
            lambda have: sepo.token_rewards(have.name, have.model, "a", [5]),
        ],
        "allocation is": [lambda have: sepo.token_rewards(have.name, have.model, "a", ["b"], allocation=3)],
    },
    "select_key_tokens": {
        "scores is": [
            lambda have: sepo.select_key_tokens(have.table),
            lambda have: sepo.select_key_tokens(None),
            lambda have: sepo.select_key_tokens(have.pairs),
            lambda have: sepo.select_key_tokens(have.arrow),
            lambda have: sepo.select_key_tokens(have.dataset),
        ],
        "k_chosen is": [
            lambda have, k=k: sepo.select_key_tokens(have.scores, k)
            for k in (30, 0, -0.1, "30 %", None, True, float("nan"), [0.3])
        ],
        "k_rejected is": [lambda have: sepo.select_key_tokens(have.scores, 0.3, 30)],
        "rule_chosen is": [
            lambda have: sepo.select_key_tokens(have.scores, rule_chosen="best"),
            lambda have: sepo.select_key_tokens(have.scores, rule_chosen=None),
        ],
        "threshold_chosen is": [
            lambda have: sepo.select_key_tokens(have.scores, rule_chosen="threshold", threshold_chosen="x")
        ],
        "temperature is": [
            lambda have: sepo.select_key_tokens(have.scores, credit="soft", temperature="x"),
            lambda have: sepo.select_key_tokens(have.scores, credit="soft", temperature=0),
        ],
        "clip_low is": [lambda have: sepo.select_key_tokens(have.scores, credit="soft", clip_low=None)],
        "credit is": [lambda have: sepo.select_key_tokens(have.scores, credit=1)],
        "seed is": [
            lambda have: sepo.select_key_tokens(have.scores, rule_chosen="random", seed="x"),
            lambda have: sepo.select_key_tokens(have.scores, rule_chosen="random", seed=-1),
        ],
    },
    "pack": {
        "pairs is of type": [
            lambda have: sepo.pack([]),
            lambda have: sepo.pack(None),
            lambda have: sepo.pack(have.pairs),
            lambda have: sepo.pack(have.pair),
            lambda have: sepo.pack([ROWS[0]]),
        ],
        "pair 0: ": [
            lambda have: sepo.pack([sepo.Pair(0, (5,), (), (7,))]),
            lambda have: sepo.pack([sepo.Pair(0, (5,), (6,), (7,), (4,), (0,))]),
        ],
    },
    "token_logps": {
        "the model is of type": [lambda have: sepo.token_logps(have.name, sepo.pack([have.pair]))],
        "batch is of type": [
            lambda have: sepo.token_logps(have.model, [have.pair]),
            lambda have: sepo.token_logps(have.model, have.pairs),
            lambda have: sepo.token_logps(have.model, None),
        ],
    },
    "prepare_model": {
        "the model is of type": [
            lambda have: sepo.prepare_model(have.name),
            lambda have: sepo.prepare_model(None),
            lambda have: sepo.prepare_model(torch.nn.Linear(2, 2)),
        ],
        "layout is": [lambda have: sepo.prepare_model(have.model, "dense")],
    },
    "dataset_logps": {
        "the model is of type": [lambda have: sepo.dataset_logps(have.name, have.pairs)],
        "pairs is": [
            lambda have: sepo.dataset_logps(have.model, have.dataset),
            lambda have: sepo.dataset_logps(have.model, have.table),
            lambda have: sepo.dataset_logps(have.model, ROWS),
            lambda have: sepo.dataset_logps(have.model, None),
            lambda have: sepo.dataset_logps(have.model, have.logps),
        ],
        "tokens_per_row is": [
            lambda have, n=n: sepo.dataset_logps(have.model, have.pairs, tokens_per_row=n) for n in (-1, 0, "x", 2.5)
        ],
    },
    "PreferenceConfig": {
        "objective is": [
            lambda have: have.config(objective="ddpo"),
            lambda have: have.config(objective=None),
        ],
        "beta is": [lambda have, b=b: have.config(objective="dpo", beta=b) for b in (-1, 0, "x", None)],
        "gamma is": [lambda have, g=g: have.config(gamma=g) for g in (-1, None)],
        "margin is": [lambda have: have.config(margin=-1)],
        "alpha is": [lambda have: have.config(objective="cpo", alpha=-1)],
        "label_smoothing is": [lambda have, s=s: have.config(label_smoothing=s) for s in ("x", 0.7, 10)],
        "tokens_per_row is": [lambda have: have.config(tokens_per_row=-1)],
        "max_length is": [lambda have: have.config(max_length=0)],
        "layout is": [lambda have: have.config(layout="dense")],
        "output_dir is of type": [lambda have: sepo.PreferenceConfig(5, report_to="none", use_cpu=True)],
        "report_to names": [lambda have: sepo.PreferenceConfig("x", report_to="tensorbord", use_cpu=True)],
    },
    "PreferenceTrainer": {
        "model is of type": [lambda have: have.trainer(None), lambda have: have.trainer(5)],
        "no such model": [lambda have: have.trainer("nowhere/nothing"), lambda have: have.trainer(Path("/nowhere"))],
        "args is of type": [
            lambda have: have.trainer(args={"learning_rate": 1}),
            lambda have: have.trainer(args=TrainingArguments("x", use_cpu=True, report_to="none")),
        ],
        "train_dataset is": [
            lambda have: have.trainer(data=ROWS),
            lambda have: have.trainer(data="x.jsonl"),
            lambda have: have.trainer(data=have.frame),
            lambda have: have.trainer(data=have.splits),
            lambda have: have.trainer(data=have.stream),
            lambda have: have.trainer(data=have.arrow),
            lambda have: have.trainer(data=have.logps),
            lambda have: have.trainer(args=have.config(objective="sepo"), data=have.scores),
        ],
        "train_dataset holds no pair": [lambda have: have.trainer(data=have.pairs.slice(0, 0))],
        "eval_dataset is": [
            lambda have: have.trainer(eval_dataset=ROWS),
            lambda have: have.trainer(args=have.config(objective="simpo")).evaluate(ROWS),
        ],
        "processing_class": [
            lambda have: have.trainer(data=have.dataset, processing_class=have.name),
            lambda have: have.trainer(data=have.dataset),
        ],
        "reference_logps is": [
            lambda have: have.trainer(reference_logps=have.table),
            lambda have: have.trainer(reference_logps=have.model),
            lambda have: have.trainer(reference_logps=have.pairs),
        ],
        "callbacks is of type": [lambda have: have.trainer(callbacks=5)],
    },
    "build_report": {
        "the run folder is of type": [lambda have: sepo.build_report(5, out=have.page)],
        "nothing to report on": [lambda have: sepo.build_report(None, out=have.page)],
        "the score table is of type": [lambda have: sepo.build_report(None, table=have.scores, out=have.page)],
        "out is of type": [lambda have: sepo.build_report(None, table=have.table, out=None)],
        "max_pairs is": [
            lambda have, n=n: sepo.build_report(None, table=have.table, out=have.page, max_pairs=n)
            for n in ("x", None, 2.5, 0)
        ],
        "k_chosen is": [
            lambda have, k=k: sepo.build_report(None, table=have.table, out=have.page, k_chosen=k) for k in (30, "x")
        ],
        "tokenizer is of type": [
            lambda have: sepo.build_report(None, table=have.table, out=have.page, tokenizer=5),
        ],
        "no tokenizer.json in": [
            lambda have: sepo.build_report(None, table=have.table, out=have.page, tokenizer="gpt2"),
        ],
    },
    "save_figures": {
        "the run folder is of type": [
            lambda have: sepo.save_figures(None, have.folder),
            lambda have: sepo.save_figures(have.scores, have.folder),
        ],
        "the folder is of type": [lambda have: sepo.save_figures(have.table, None)],
        "formats is of type": [
            lambda have: sepo.save_figures(have.table, have.folder, "png"),
            lambda have: sepo.save_figures(have.table, have.folder, None),
        ],
        "no figure format": [lambda have: sepo.save_figures(have.table, have.folder, [5])],
    },
    "display": {
        "pair_or_table is": [
            lambda have: sepo.display(5),
            lambda have: sepo.display(None),
            lambda have: sepo.display(have.dataset),
            lambda have: sepo.display(have.pairs),
        ],
        "the pair has no 'chosen_ids'": [lambda have: sepo.display(ROWS[0])],
        "index is": [lambda have: sepo.display(have.scores, "a")],
        "no pair at row 99": [lambda have: sepo.display(have.scores, 99)],
        "k_chosen is": [lambda have: sepo.display(have.scores, k_chosen=30)],
        "tokenizer is of type": [lambda have: sepo.display(have.scores, tokenizer=5)],
    },
    "run_recipe": {
        "recipe is of type": [
            lambda have: sepo.run_recipe("recipe.yaml"),
            lambda have: sepo.run_recipe({"seed": 1}),
            lambda have: sepo.run_recipe(None),
        ]
    },
    "plan_run": {
        "recipe is of type": [lambda have: sepo.plan_run("recipe.yaml"), lambda have: sepo.plan_run(None)],
    },
    "read_table": {
        "the scores table is of type": [
            lambda have: read_table(None, "scores"),
            lambda have: list(iter_tables(have.scores, "scores")),
        ],
        "no kind of table is": [
            lambda have: read_table(have.table, "score"),
            lambda have: read_table(have.table, None),
        ],
    },
}
# Data classes, and the error itself.
NOT_CALLED = {"UserError", "LoraSettings", "Recipe", "Pair", "PackedBatch"}


def test_every_public_function_is_among_them():
    assert WRONG.keys() - {"read_table"} == set(sepo.__all__) - NOT_CALLED


@pytest.mark.parametrize("function", WRONG)
def test_a_wrong_argument_is_named_in_one_line(function, have, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named, calls in WRONG[function].items():
        for number, call in enumerate(calls):
            with pytest.raises(UserError) as caught:
                call(have)
            assert named in str(caught.value), (number, str(caught.value))
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_valid_arguments_of_any_type_are_accepted(have):
    """Paths of both kinds, numbers of numpy, rows in memory, devices of PyTorch."""
    assert len(sepo.load_tokenizer(Path(have.name))) == 101
    assert sepo.load_model(Path(have.name), device=torch.device("cpu")).dtype == torch.float32
    assert len(sepo.select_key_tokens(have.scores, np.float32(0.3), 1, seed=np.int64(3))) == 6
    for source in (ROWS, have.frame, have.arrow, have.dataset):
        assert len(sepo.load_preferences(source, columns={"prompt": "prompt"})) == 6
    assert sepo.tokenize_pairs(have.dataset, have.tokenizer, max_length=np.int64(64), progress=False)[1].kept == 6
    description = PairsFrom(responses=["chosen", "rejected"], label="l")
    assert len(sepo.load_preferences([{**row, "l": 0} for row in ROWS], pairs_from=description)) == 6
    assert have.trainer(Path(have.name)).processing_class is not None
    assert have.trainer(data=have.scores).train_dataset is not None  # an objective over all tokens
    assert sepo.dataset_logps(have.model, have.scores, tokens_per_row=np.int64(64)).num_rows == 6


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("inf"), 1j, 0, -1, 3, 2])
def test_a_number_is_checked_against_its_bounds(value):
    with pytest.raises(UserError, match=r"it is .*: expected a number above 0 and below 2"):
        check_number("it", value, above=0, below=2)
    check_number("it", 1.5, above=0, below=2)
    check_number("it", np.int32(1), least=1, most=1, whole=True)
