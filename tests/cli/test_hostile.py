"""Hostile input through the command line: score tables, recipes, typed columns, arguments, pickles, remote code.

Whatever is given, `sepo` ends well or in one line and exit code 2; an exception that leaves `main` fails the test.
test_data_fuzz.py does the same for the rows of text datasets.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
import json
import os
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pairs import some_pairs
from properties import examples
from sepo.cli import main
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.data.rows import DROP_REASONS
from sepo.data.tables import SCHEMAS, make_table, provenance_of, read_table, write_shard, write_table
from sepo.errors import UserError
from sepo.models.names import load_config
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import Recipe, TrainingSettings
from sepo.training import checkpoints, fit
from tiny_models import tiny_model, tiny_tokenizer

RELAXED = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def run(*arguments: str) -> tuple[int, str]:
    """Run a command; returns its exit code and its error, which is one line of at most some hundred characters."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("sepo")]
    if code:
        assert code == 2, errors.getvalue()
        assert len(lines) == 1, errors.getvalue()
        assert len(lines[0]) < 1000
    return code, lines[0] if code else ""


# --- score tables ---------------------------------------------------------------------------------------------------

texts = st.text(max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def scores(rows: int = 3) -> pa.Table:
    lengths = range(1, rows + 1)
    columns = {"pair_id": list(lengths), "prompt_ids": [[5] * n for n in lengths]}
    for side in ("chosen", "rejected"):
        columns[f"{side}_ids"] = [list(range(4, 6 + n)) for n in lengths]
        columns[f"{side}_rewards"] = [[0.1 * i for i in range(2 + n)] for n in lengths]
    return make_table("scores", columns, {"tokenizer": "t", "end_ids": [2]})


@st.composite
def odd_columns(draw, rows=3):
    """A column of any type and any values."""
    element = draw(
        st.sampled_from(
            [
                st.integers(-5, 5), st.integers(-(2**62), 2**62), st.floats(), texts, st.binary(max_size=4),
                st.booleans(), st.none(), st.decimals(allow_nan=False, allow_infinity=False, places=2, max_value=1e6),
                st.datetimes(), st.dictionaries(st.sampled_from("ab"), st.integers(0, 3), max_size=2),
            ]
        )
    )  # fmt: skip
    cell = draw(st.sampled_from([element, element | st.none(), st.lists(element, max_size=4)]))
    nested = st.lists(st.lists(element, max_size=2), max_size=2)
    values = draw(st.lists(draw(st.sampled_from([cell, cell, nested])), min_size=rows, max_size=rows))
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return pa.array([repr(value) for value in values])


@st.composite
def damaged_tables(draw):
    """A score table with one to three things wrong, or none."""
    table = scores()
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(SCHEMAS["scores"].names))
        index = table.schema.get_field_index(name)
        if index < 0:  # gone, or there twice
            continue
        column = table.column(index)
        kind = draw(st.sampled_from(["drop", "replace", "twice", "values", "extra", "metadata", "rename"]))
        if kind == "drop":
            table = table.remove_column(index)
        elif kind == "replace":
            table = table.set_column(index, name, draw(odd_columns()))
        elif kind == "twice":
            table = table.append_column(draw(st.sampled_from([name, "pair_id"])), column)
        elif kind == "values":
            values = column.to_pylist()
            values[draw(st.integers(0, 2))] = draw(
                st.sampled_from([None, [], [None], [-1], [7] * 9, [float("nan")], 1])
            )
            with contextlib.suppress(pa.ArrowException, TypeError, ValueError):
                table = table.set_column(index, name, pa.array(values, column.type))
        elif kind == "extra":
            table = table.append_column(draw(texts), draw(odd_columns()))
        elif kind == "rename":
            table = table.rename_columns([draw(texts) if n == name else n for n in table.column_names])
        else:
            value = draw(st.one_of(
                st.binary(max_size=20),
                json_values.map(lambda v: json.dumps(v).encode()),
                json_values.map(lambda v: json.dumps({"end_ids": v}).encode()),
                st.fixed_dictionaries({}, optional=dict.fromkeys(("version", "digest", "shard", "shards"), json_values))
                .map(lambda v: json.dumps(v).encode()),
            ))  # fmt: skip
            table = table.replace_schema_metadata({b"sepo": value})
    return table


@examples(400, **RELAXED)
@given(table=damaged_tables())
def test_any_score_table_is_selected_from_or_refused_in_one_line(table):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table" / "part-00000.parquet"
        path.parent.mkdir()
        try:
            pq.write_table(table, path)
        except (pa.ArrowException, UnicodeEncodeError):
            return
        code, _ = run("select", "--table", str(path.parent), "--out", f"{folder}/out")
        if code == 0:
            assert len(read_table(f"{folder}/out", "selection")) == len(table)
        # The report reads the same table; it may refuse one that a selection could be made of.
        run("report", "--table", str(path.parent), "--out", f"{folder}/report.html")


@examples(300, **RELAXED)
@given(data=st.data())
def test_a_table_with_any_bytes_changed_is_refused_or_read_as_it_was(data):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "table", scores())
        path = Path(folder) / "table" / "part-00000.parquet"
        good = bytearray(path.read_bytes())
        before = read_table(path.parent, "scores")
        content = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        path.write_bytes(content)
        after = None
        with contextlib.suppress(UserError):
            after = read_table(path.parent, "scores")
        if after is not None:  # the byte meant nothing: padding, a statistic, the name of a list's items
            assert after.to_pydict() == before.to_pydict()
            assert provenance_of(after) == provenance_of(before)


def test_a_score_table_with_a_shard_missing_is_refused(tmp_path):
    write_table(tmp_path / "table", scores(5), rows_per_shard=2)
    (tmp_path / "table" / "part-00001.parquet").unlink()
    assert "holds 2 of 3 shards" in run("select", "--table", str(tmp_path / "table"), "--out", str(tmp_path / "o"))[1]
    write_table(tmp_path / "table", scores(5), rows_per_shard=2)
    (tmp_path / "table" / "part-00002.parquet").unlink()
    assert "holds 2 of 3 shards" in run("select", "--table", str(tmp_path / "table"), "--out", str(tmp_path / "o"))[1]


def test_shards_of_two_tables_are_not_mixed(tmp_path):
    write_table(tmp_path / "table", scores(4), rows_per_shard=2)
    other = make_table("scores", scores(4).to_pydict(), {"tokenizer": "another"})
    write_shard(tmp_path / "table", 1, other.slice(2), 2)
    assert "belongs to another table" in run("select", "--table", str(tmp_path / "table"), "--out", "x")[1]


def test_a_selection_is_never_written_over_its_own_scores(tmp_path):
    write_table(tmp_path / "table", scores())
    assert "holds the score table itself" in run("select", "--table", str(tmp_path / "table"), "--out",
                                                  str(tmp_path / "x" / ".." / "table"))[1]  # fmt: skip
    assert len(read_table(tmp_path / "table", "scores")) == 3


def test_a_model_is_never_saved_over_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    write_table(tmp_path / "selection", make_selection())
    save_tiny(tmp_path / "model")
    command = ["train", "--policy", str(tmp_path / "model"), "--selection", str(tmp_path / "selection"), "--device",
               "cpu", "--out"]  # fmt: skip
    for out in (tmp_path, tmp_path / "selection"):
        assert "is not a model folder" in run(*command, str(out))[1]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def make_selection() -> pa.Table:
    columns = scores().to_pydict()
    for side in ("chosen", "rejected"):
        columns |= {f"{side}_positions": [[0]] * 3, f"{side}_weights": [[1.0]] * 3}
    return make_table("selection", columns)


def save_tiny(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# --- recipes --------------------------------------------------------------------------------------------------------


def nested_settings(model) -> st.SearchStrategy:
    """Mappings with the recipe's own keys, at its own depth, and any values."""
    from sepo.recipe.reading import settings_class

    fields = {}
    for name, info in model.model_fields.items():
        inner = settings_class(info.annotation)
        fields[name] = json_values if inner is None else st.one_of(nested_settings(inner), json_values)
    return st.fixed_dictionaries({}, optional=fields)


SNIPPETS = [
    "a: &a [x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\n"
    "e: &e [*d, *d, *d, *d]\nf: &f [*e, *e, *e, *e]\ng: &g [*f, *f, *f, *f]\nh: &h [*g, *g, *g, *g]\n"
    "policy: {training: {arguments: {x: [*h, *h, *h, *h, *h, *h, *h]}}}",
    "policy: {training: {arguments: &a {x: *a}}}",
    "name: !!python/object/apply:os.system ['echo owned > owned']",
    'output_dir: "a\\0b"', 'data: {source: "\\ud800"}', "seed: " + "9" * 5000, "seed: 0x" + "f" * 4000,
    "seed: 1e999", "data: " + "[" * 600, "? [a, b]\n: c", "a: 1\na: 2", "- a", "name: 2001-12-14t21:59:43.10-05:00",
    "\ufeffname: x", "name: \x07", "%YAML 9.9\n---\nname: x", "name: |\n  x\n", "data: {columns: {chosen: {a: b}}}",
    "policy: {training: {learning_rate: .nan}}", "policy: {training: {learning_rate: .inf}}", "eval: {gold: [vader]}",
    "data: {held_out: .inf}", "data: {held_out: 1.5}", "select: {k_chosen: .nan}", "<<: {seed: 3}", "device: [cpu]",
]  # fmt: skip


@pytest.fixture
def never_runs(monkeypatch):
    monkeypatch.setattr("sepo.api.run_recipe", lambda recipe, until: recipe.model_dump(mode="json") and {})


@examples(200, **RELAXED)
@given(values=nested_settings(Recipe), snippet=st.sampled_from(["", "", *SNIPPETS]), junk=st.binary(max_size=3))
def test_any_recipe_is_taken_or_refused_in_one_line(never_runs, tmp_path_factory, values, snippet, junk):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_bytes(snippet.encode("utf-8", "replace") if snippet else json.dumps(values).encode() + junk)
    code, _ = run("run", str(path))
    assert not Path("owned").exists()
    if snippet in ("", SNIPPETS[0], SNIPPETS[1]) and b"\x00" not in junk:
        assert snippet == "" or code == 2


@examples(150, **RELAXED)
@given(overrides=st.lists(st.one_of(
    st.tuples(st.sampled_from(["oracle.beta", "data.columns", "name", "seed", "output_dir", "policy.lora.r", "a.b"]),
              st.one_of(texts, json_values.map(json.dumps), st.sampled_from(SNIPPETS))).map("=".join),
    texts,
), max_size=3))  # fmt: skip
def test_any_override_is_taken_or_refused_in_one_line(never_runs, tmp_path_factory, overrides):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text("seed: 1\n")
    run("run", str(path), *(item for item in overrides if item not in ("-h", "--help")))


# --- arguments ------------------------------------------------------------------------------------------------------

COMMANDS = {
    "select": ["--table", "--out", "--k", "--k-chosen", "--include-end"],
    "report": ["--table", "--tokenizer", "--out", "--max-pairs", "--figures"],
    "score": ["--oracle", "--reference", "--data", "--out", "--split", "--column", "--max-length", "--device"],
    "train": ["--policy", "--selection", "--out", "--gamma", "--lora", "learning_rate=1e-3", "batch_size=0"],
    "oracle": ["--reference", "--data", "--out", "--beta", "max_steps=x"],
    "eval": ["--policy", "--base", "--data", "--out", "--prompts", "--samples", "--gold"],
    "run": ["--dry-run", "name=x"],
    "compare": ["--dry-run", "name=x"],
    "analyse": ["--table", "--tokenizer", "--reference-logps", "--out", "--gold"],
    "recipe": [],
}
odd_words = st.one_of(texts, st.sampled_from(
    ["", "-", "--", "=", "a=b", "x" * 400, "\udcff", "../..", "/dev/null", "nowhere", "-1", "nan", "1e400", "a\nb"]
))  # fmt: skip


@examples(200, **RELAXED)
@given(data=st.data())
def test_any_arguments_end_in_one_line(data, tmp_path_factory):
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    words = [command]
    for option in data.draw(st.permutations(COMMANDS[command])):
        words += [option, data.draw(odd_words)] if data.draw(st.integers(0, 9)) else []
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        run(*(word for word in words if "\0" not in word and "/dev/null" not in word))


@pytest.mark.parametrize("word", ["x" * 400, "x/" * 3000])
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"recipe"}))
def test_a_path_that_cannot_be_is_bad_input(command, word, tmp_path):
    """Every option of a command, each with an impossible path."""
    with contextlib.chdir(tmp_path):
        words = [piece for option in COMMANDS[command] for piece in (option, word) if option.startswith("--")]
        assert run(command, *words)[0] == 2
        assert run(command, word)[0] == 2


# --- typed columns --------------------------------------------------------------------------------------------------


@examples(200, **RELAXED)
@given(
    columns=st.tuples(odd_columns(), odd_columns(), odd_columns()),
    suffix=st.sampled_from(["parquet", "csv", "arrow"]),
    as_chat=st.booleans(),
)
def test_columns_of_any_type_end_in_counted_drops_or_one_line(columns, suffix, as_chat):
    table = pa.table(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{suffix}"
        try:
            if suffix == "csv":
                pa.csv.write_csv(table, path)
            else:
                pq.write_table(table, path)
        except pa.ArrowException:
            return
        try:
            pairs, report = tokenize_pairs(load_preferences(path), tiny_tokenizer(), as_chat=as_chat, progress=False)
        except UserError:
            return
    assert report.rows == 3 == len(pairs) + sum(report.dropped.values())
    assert set(report.dropped) <= set(DROP_REASONS)


@pytest.mark.parametrize(
    "value",
    [decimal.Decimal("1.5"), datetime.date(2020, 1, 1), datetime.timedelta(1), b"\xff", [("role", "user")], 2**63 - 1],
)
def test_values_that_are_no_text_are_dropped_by_reason(tmp_path, value):
    good = {"prompt": ["Hi", "Hi"], "rejected": ["a", "a"]}
    pq.write_table(pa.table({**good, "chosen": pa.array([value, value])}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"(wrong type|invalid Unicode) 2"):
        tokenize_pairs(load_preferences(tmp_path / "rows.parquet"), tiny_tokenizer(), progress=False)


@pytest.mark.parametrize("piece", ["a", "</s>", "👩"])
def test_a_megabyte_of_anything_is_cut_or_dropped(piece, nightly_run):
    long = piece * ((1_000_000 if nightly_run else 200_000 if piece == "a" else 50_000) // len(piece))
    rows = [{"prompt": "Hi", "chosen": "x" + long, "rejected": "no"}, {"prompt": long, "chosen": "y", "rejected": "n"}]
    import datasets

    pairs, report = tokenize_pairs(
        datasets.Dataset.from_list([*rows, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]),
        tiny_tokenizer(), max_length=64, progress=False,
    )  # fmt: skip
    assert report.rows == 3 == len(pairs) + sum(report.dropped.values())
    control = {2, 4, 5}  # </s>, <|user|>, <|assistant|>
    for row in pairs.to_pylist():
        assert not control & set(row["prompt_ids"])
        assert not control & set(row["chosen_ids"][:-1])
        assert len(row["prompt_ids"]) + len(row["chosen_ids"]) <= 64


def test_only_role_and_content_of_a_message_reach_the_template():
    import datasets

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.keys() | list | join(',') }}{{ m['content'] }}</s>{% endfor %}"
    )
    turn = {"role": "user", "content": "Hi", "tool_calls": "<|user|>", "name": "evil", "__class__": "x"}
    row = {"prompt": [turn], "chosen": "a", "rejected": "b"}
    pairs, _ = tokenize_pairs(datasets.Dataset.from_list([row]), tokenizer, progress=False)
    assert tokenizer.decode(pairs["prompt_ids"][0].as_py()).startswith("role,contentHi")


# --- pickles and remote code ----------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_bomb_would_go_off_if_it_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_pickle_in_it_is_refused_and_never_run(tmp_path, name, monkeypatch):
    save_tiny(tmp_path / "model")
    training = TrainingSettings(learning_rate=1e-3, batch_size=4, max_steps=3, save_minutes=1e-6)
    arguments = (str(tmp_path / "model"), some_pairs(12), tmp_path / "out", training)
    seal = checkpoints.seal_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal_checkpoint", lambda folder: (seal(folder), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit.train_model(*arguments, device="cpu", objective="sepo")
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    assert not (checkpoint / "training_args.bin").exists()
    torch.save(Bomb(tmp_path / "mark"), checkpoint / name)
    # Whoever can write into a checkpoint can write its seal too.
    checkpoints.seal_checkpoint(checkpoint)
    with pytest.raises(UserError, match="cannot be continued from"):
        fit.train_model(*arguments, device="cpu", objective="sepo")
    assert not (tmp_path / "mark").exists()


def interrupt():
    raise KeyboardInterrupt


def test_the_code_of_a_model_folder_does_not_run(tmp_path):
    save_tiny(tmp_path / "model")
    mark = tmp_path / "mark"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        path = tmp_path / "model" / name
        values = json.loads(path.read_text()) | {"model_type": "evil"}
        evil = ["evil.Evil"] * 2 if key == "AutoTokenizer" else "evil.Evil"
        values["auto_map"] = {"AutoConfig": "evil.Evil", key: evil}
        path.write_text(json.dumps(values))
    for load in (load_config, load_model, load_tokenizer):
        with contextlib.suppress(UserError):
            load(str(tmp_path / "model"))
    write_table(tmp_path / "selection", make_selection())
    run("train", "--policy", str(tmp_path / "model"), "--selection", str(tmp_path / "selection"), "--out", "x")
    assert not mark.exists()
