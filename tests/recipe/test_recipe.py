"""Recipes: every setting checked, unknown keys refused by name, overrides, and the shipped recipes."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.cli.recipe import describe_recipe
from sepo.errors import UserError
from sepo.recipe.reading import dump_recipe, load_recipe, parse_recipe
from sepo.recipe.settings import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oracle.betta=1", "unknown key 'oracle.betta' (did you mean 'beta'?)"),
        ("policy.training.learning_rat=1", "did you mean 'learning_rate'?"),
        ("foo=1", "unknown key 'foo'"),
        ("select.k_chosen=0", "select.k_chosen is 0"),
        ("select.k_rejected=1.5", "select.k_rejected is 1.5"),
        ("oracle.beta=-1", "oracle.beta is -1"),
        ("policy.training.learning_rate=abc", "policy.training.learning_rate is 'abc'"),
        ("data=3", "data is 3"),
        ("beta", "expected key=value"),
        ("seed.x=1", "'seed' is a value"),
        ("name=../evil", "name is '../evil'"),
        ("oracle.training.batch_size=[", "not valid YAML"),
    ],
)
def test_bad_settings_are_refused_in_one_line_that_names_them(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text("seed: 3\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_any_depth_and_numbers_are_read_as_people_write_them():
    recipe = load_recipe(None, ["policy.training.learning_rate=5e-7", "oracle.lora.r=4", "data.source=a b.json"])
    assert recipe.policy.training.learning_rate == 5e-7
    assert recipe.oracle.lora is not None
    assert recipe.oracle.lora.r == 4
    assert recipe.data.source == "a b.json"


def test_the_description_is_the_default_recipe():
    values = yaml.safe_load(describe_recipe())
    assert parse_recipe(values) == Recipe()


def test_missing_and_malformed_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (
        ("- a\n- b\n", "expected a mapping"),
        ("a: [1\n", "line 2"),
        ("1: 2\n", "keys must be words|unknown"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(path)


@examples(300)
@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_one_line_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UserError):  # one clear line is what is asked for; anything else fails the test
        load_recipe(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@examples(300)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), values, max_size=4))
def test_any_mapping_is_a_recipe_or_a_one_line_error(mapping):
    with contextlib.suppress(UserError):
        parse_recipe(mapping)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("policy.training.lr", "learning_rate"),
        ("policy.lr", "training.learning_rate"),
        ("oracle.epochs", "training.num_train_epochs"),
        ("policy.learning_rate", "training.learning_rate"),
        ("oracle.training.bs", "batch_size"),
        ("reference.model_name_or_path", "model"),
        ("data.dataset", "source"),
        ("data.max_seq_length", "max_length"),
        ("policy.betta", "beta"),
    ],
)
def test_an_unknown_key_gets_the_setting_that_other_trainers_call_so(key, meant):
    with pytest.raises(UserError, match=rf"unknown key '{key}' \(did you mean '{meant}'\?\)"):
        load_recipe("quickstart", [f"{key}=1"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("policy.training.learning_rate", "fast"),
        ("policy.training.learning_rate", -1),
        ("policy.training.report_to", 3),
        ("policy.lora.target_modules", 3),
        ("data.workers", 0),
    ],
)
def test_a_wrong_value_of_a_setting_of_several_types_is_one_problem_under_its_name(setting, value):
    values = {"name": "a", "data": {"source": "x.jsonl"}}
    *sections, last = setting.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    with pytest.raises(UserError, match=rf"{setting} is {value!r}: input should .* or input should ") as problem:
        parse_recipe(values, "here")
    assert "more problems" not in str(problem.value)
    place["no_such_setting"] = 1
    with pytest.raises(UserError, match="1 more problem"):
        parse_recipe(values, "here")
