"""`~` is the home folder in every path that an option, a recipe, a grid or a function takes; else a clear word."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pwd
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from pairs import some_pairs
from report_fixtures import score_table, word_tokenizer
from sepo import load_model, load_preferences, load_tokenizer
from sepo.cli import main
from sepo.cli.arguments import build_parser
from sepo.data.loading import load_rows, source_fingerprint
from sepo.data.tables import iter_tables, read_table, table_paths, write_table
from sepo.errors import UserError
from sepo.files import expand_home
from sepo.models.fingerprint import model_fingerprint
from sepo.models.gguf import converted_folder
from sepo.models.names import check_model, load_config, resolve_model
from sepo.models.saving import save_model
from sepo.recipe.reading import load_recipe, parse_recipe, set_key
from sepo.recipe.settings import Recipe
from sepo.report.build import build_report
from sepo.report.figures import save_figures
from sepo.report.notebook import display
from sepo.study.grid import Grid, load_grid
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with a model, preferences, tables, a recipe and a grid."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(20)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(folder / "scores", score_table(word_tokenizer()))
    (folder / "recipe.yaml").write_text(
        "name: mine\noutput_dir: ~/run\ndevice: cpu\ndata: {source: ~/prefs.jsonl, held_out_source: ~/prefs.jsonl}\n"
        "reference: {model: ~/model}\npolicy: {model: ~/model}\neval: {prompts: 0}\n"
    )
    (folder / "grid.yaml").write_text(
        "base: ~/recipe.yaml\noutput_dir: ~/compared\nwork_dir: ~/work\nset: {eval.prompts: 2}\n"
        "variants: {a: {set: {policy.model: ~/other}}}\n"
    )
    return folder


@pytest.fixture
def at_home(home, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    yield home
    assert not list(tmp_path.glob("~*"))


# --- options --------------------------------------------------------------------------------------------------------

# Options that take a text which is no path. A new option is a path unless it is put here.
NO_PATH = {
    *("overrides", "training", "split", "column", "pairs_from", "chat_template", "objective", "device"),
    "recipe name",  # a built-in recipe's
    *("key_header", "header", "request", "judge_temperature"),
    *("server", "key_variable", "model_name", "prompt_name", "judge"),  # a judge is a kind with a name, tried below
    *("gold", "engine"),  # an engine is a kind with a folder, tried below
    *("merge dtype", "sample temperature", "best-of n"),
    *("run until", "run processes"),
    *("generate name", "winrate baseline", "push to", "push base", "push license"),
}


def options() -> Iterator[tuple[str, argparse.Action]]:
    """Every option that takes a free text, with its command."""
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            text = action.type not in (int, float) and action.nargs != 0 and not action.choices
            if text and not {action.dest, f"{name} {action.dest}"} & NO_PATH:
                yield name, action


def test_the_options_that_take_a_path_are_found():
    found = {(command, action.dest) for command, action in options()}
    assert len(found) >= 24
    for one in (("run", "recipe"), ("select", "table"), ("eval", "base"), ("report", "figures"), ("oracle", "out")):
        assert one in found


@pytest.mark.parametrize(("command", "action"), options(), ids=lambda one: getattr(one, "dest", one))
def test_every_option_that_takes_a_path_knows_the_home_folder(command, action, at_home):
    read = action.type
    assert read("~/some/place") == str(at_home / "some" / "place")
    assert read("~") == str(at_home)
    assert read("some/~/place") == "some/~/place"
    assert read("model~") == "model~"


def test_a_table_with_a_name_knows_it_too(at_home):
    arguments = build_parser().parse_args(["analyse", "--table", "best=~/scores", "--table", "~/scores"])
    assert arguments.table == [f"best={at_home}/scores", f"{at_home}/scores"]


# --- recipes and grids ----------------------------------------------------------------------------------------------

# Settings that are texts and no paths. A new text setting is a path unless it is put here.
NO_PATH_SETTINGS = {
    *("name", "device", "data.split", "data.config_name", "data.held_out_split", "data.pairs_from"),
    *("reference.sft.split", "reference.sft.config_name", "reference.revision", "policy.revision"),
    "oracle.reward_columns",
    *("engine", "eval.gold", "data.on_policy.gold"),
    *("data.sources.split", "data.sources.config_name", "data.sources.pairs_from"),
    *(
        f"{section}.judge.{name}"
        for section in ("eval", "data.on_policy")
        for name in ("function", "key_variable", "key_header", "model", "prompt_name", "revision", "server")
    ),
    *(f"{part}.lora.target_modules" for part in ("oracle", "policy")),
    *(
        f"{part}.training.{name}"
        for part in ("reference.sft", "oracle", "policy")
        for name in ("lr_scheduler_type", "report_to")
    ),
}
# What some settings need beside them.
SERVER = {"server": "http://localhost:1/v1", "model": "m", "prompt": "p.txt"}
BESIDE = {
    "eval.judge.cache": {"eval": {"judge": SERVER}},
    "eval.judge.prompt": {"eval": {"judge": SERVER}},
    "eval.judge.reference": {"eval": {"judge": {"oracle": "o"}}},
    "data.on_policy.model": {"data": {"on_policy": {"gold": "vader"}}},
    "data.on_policy.prompts": {"data": {"on_policy": {"gold": "vader"}}},
    "data.on_policy.judge.cache": {"data": {"on_policy": {"judge": SERVER}}},
    "data.on_policy.judge.prompt": {"data": {"on_policy": {"judge": SERVER}}},
    "data.on_policy.judge.reference": {"data": {"on_policy": {"judge": {"oracle": "o"}}}},
}
LISTS = ("eval.tasks",)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def text_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings that may be a text."""
    for name, field in model.model_fields.items():
        kinds = list(parts(field.annotation))
        for inner in {one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)}:
            if inner.__name__ not in ("PairsFrom", "Variant"):
                yield from text_settings(inner, f"{prefix}{name}.")
        plain = [one for one in kinds if not isinstance(one, types.GenericAlias)]
        if str in plain and not any(getattr(one, "__origin__", one) is dict for one in kinds):
            yield f"{prefix}{name}"


RECIPE_PATHS = sorted(set(text_settings(Recipe)) - NO_PATH_SETTINGS)


def test_the_settings_that_take_a_path_are_found():
    assert [
        *("data.held_out_source", "data.on_policy.judge.cache", "data.on_policy.judge.oracle"),
        *("data.on_policy.judge.prompt", "data.on_policy.judge.reference", "data.on_policy.judge.reward_model"),
        *("data.on_policy.model", "data.on_policy.prompts", "data.source", "data.sources.source"),
        *("eval.base", "eval.judge.cache", "eval.judge.oracle"),
        *("eval.judge.prompt", "eval.judge.reference", "eval.judge.reward_model"),
        *("eval.tasks", "oracle.model", "oracle.rewards", "output_dir", "policy.model", "policy.reference"),
        *("reference.model", "reference.sft.source"),
    ] == RECIPE_PATHS


@pytest.mark.parametrize("setting", RECIPE_PATHS)
def test_every_setting_that_takes_a_path_knows_the_home_folder(setting, at_home):
    values: dict[str, Any] = copy.deepcopy(BESIDE.get(setting, {}))
    if setting == "data.sources.source":
        sources = parse_recipe({"data": {"sources": [{"source": "~/some/place"}, {"source": "b"}]}}).data.sources
        assert [one.source for one in sources] == [str(at_home / "some" / "place"), "b"]
        return
    set_key(values, setting, ["~/some/place"] if setting in LISTS else "~/some/place", "test")
    value: Any = parse_recipe(values)
    for part in setting.split("."):
        value = getattr(value, part)
    assert value == ([str(at_home / "some" / "place")] if setting in LISTS else str(at_home / "some" / "place"))


def test_a_judge_in_one_text_and_the_files_of_benchmarks_know_it_too(at_home):
    settings = parse_recipe({"eval": {"judge": "reward:~/some/place", "benchmarks": {"alpaca_eval": "~/a.json"}}}).eval
    assert settings.judge is not None
    assert settings.judge.reward_model == str(at_home / "some" / "place")
    assert settings.benchmarks == {"alpaca_eval": str(at_home / "a.json")}


@pytest.mark.parametrize("setting", sorted(set(text_settings(Grid)) - {"name", "seeds_vary"}))
def test_every_path_of_a_grid_knows_the_home_folder(setting, at_home):
    grid = Grid(**{"name": "grid", "variants": {"a": {}}, setting: "~/some/place"})
    assert getattr(grid, setting) == str(at_home / "some" / "place")


def test_a_path_among_the_arguments_of_a_training_knows_it_and_other_texts_stay(at_home):
    arguments = {"deepspeed": "~/ds.json", "optim": "adamw_torch", "seed": 3}
    recipe = parse_recipe({"oracle": {"training": {"arguments": arguments}}})
    assert recipe.oracle.training.arguments == {**arguments, "deepspeed": f"{at_home}/ds.json"}


# --- whole commands -------------------------------------------------------------------------------------------------


def test_commands_read_and_write_in_the_home_folder(at_home, capsys):
    assert main(["run", "~/recipe.yaml", "--dry-run"]) == 0
    assert main(["compare", "~/grid.yaml", "--dry-run"]) == 2  # the variant's is not there
    assert f"{at_home}/other" in capsys.readouterr().err
    assert main(["select", "--table=~/scores", "--out=~/selection"]) == 0
    assert main(["report", "--table=~/scores", "--out=~/report.html", "--figures=~/figures"]) == 0
    assert main(["analyse", "--table=best=~/scores", "--out=~/analysis"]) == 0
    for name in ("selection/part-00000.parquet", "report.html", "figures/token-rewards.png", "analysis/analysis.md"):
        assert (at_home / name).is_file()
    grid, settings = load_grid("~/grid.yaml")
    assert grid.results_folder == at_home / "compared"
    assert settings["a"][0].recipe.run_folder == at_home / "work"


def test_functions_know_the_home_folder(at_home):
    assert load_recipe("~/recipe.yaml").name == "mine"
    check_model("~/model")
    assert resolve_model("~/model") == str(at_home / "model")
    assert resolve_model(Path("~/model")) == str(at_home / "model")
    assert len(load_tokenizer("~/model")) == 101
    assert load_config("~/model").vocab_size == 101
    assert model_fingerprint("~/model") == model_fingerprint(at_home / "model")
    save_model(load_model("~/model", device="cpu"), load_tokenizer("~/model"), "~/copy")
    assert (at_home / "copy" / "config.json").is_file()
    assert len(load_preferences("~/prefs.jsonl")) == len(load_rows(Path("~/prefs.jsonl"))) == 20
    assert source_fingerprint("~/prefs.jsonl") == source_fingerprint(at_home / "prefs.jsonl")
    write_table("~/pairs", some_pairs(3))
    assert len(read_table("~/pairs", "pairs")) == len(next(iter_tables("~/pairs", "pairs"))) == 3
    assert table_paths("~/pairs", "pairs") == [at_home / "pairs" / "part-00000.parquet"]
    build_report(None, table="~/scores", out="~/of-python.html")
    assert (at_home / "of-python.html").is_file()
    assert save_figures("~/scores", "~/drawn", ["png"])[0].parent == at_home / "drawn"
    assert "pre-wrap" in display("~/scores")._repr_html_()
    assert yaml.safe_load((at_home / "recipe.yaml").read_text())["output_dir"] == "~/run"  # a file of the user's


# --- no home folder -------------------------------------------------------------------------------------------------


def test_without_home_the_systems_own_record_of_users_says_where_it_is(monkeypatch):
    monkeypatch.delenv("HOME")
    assert expand_home("~/x") == os.path.join(pwd.getpwuid(os.getuid()).pw_dir, "x")


@pytest.mark.parametrize("empty", [True, False])
def test_a_path_in_a_home_folder_that_is_not_known_is_refused_in_one_line(empty, monkeypatch, tmp_path, capsys):
    def no_user(number):
        raise KeyError(number)

    if empty:
        monkeypatch.setenv("HOME", "")
    else:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", no_user)  # a container with the number of a user that it does not know
    monkeypatch.chdir(tmp_path)
    recipe = {"data": {"source": "~/prefs.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for command in (
        ["select", "--table", "~/scores", "--out", "x"],
        ["analyse", "--table", "a=~/scores", "--out", "x"],
        ["run", "recipe.yaml", "--dry-run"],
        ["run", "recipe.yaml", "data.source=x.jsonl", "output_dir=~"],
    ):
        assert main(command) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "there is no home folder to put for ~: set HOME, or write the full path" in said
    for call in (lambda: load_preferences("~/x.jsonl"), lambda: resolve_model("~/m"), lambda: read_table("~", "pairs")):
        with pytest.raises(UserError, match="set HOME"):
            call()
    with pytest.raises(UserError, match="set HOME"):
        converted_folder(tmp_path / "model.gguf")
    assert not list(tmp_path.glob("~*"))


def test_the_home_of_a_user_who_is_not_there_is_a_name_like_any_other(capsys):
    assert expand_home("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    with pytest.raises(UserError, match=r"no file or folder at '~nobody-of-this-name/x.jsonl'"):
        load_preferences("~nobody-of-this-name/x.jsonl")


def test_an_empty_path_is_refused(tmp_path, monkeypatch, capsys):
    """What a shell makes of a variable that is not set: the working folder is nobody's wish."""
    monkeypatch.chdir(tmp_path)
    for words in (["select", "--table", "x", "--out", ""], ["analyse", "--table", "a=", "--out", "x"]):
        assert main(words) == 2
        assert "is empty: expected a path" in capsys.readouterr().err
    with pytest.raises(UserError, match="output_dir is empty"):
        parse_recipe({"output_dir": ""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, 3, ["a"], b"bytes", b"~/bytes"])
def test_what_is_no_path_is_refused_in_one_line(value):
    with pytest.raises(UserError, match=r"the thing is of type \w+: expected a path"):
        expand_home(value, "the thing")
