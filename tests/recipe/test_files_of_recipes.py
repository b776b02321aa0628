"""Recipe files as editors and shells write them: read, or refused in one line that says what to change."""

from __future__ import annotations

import pytest

from sepo.errors import UserError
from sepo.recipe.reading import load_recipe, parse_recipe
from sepo.study.grid import load_grid

TEXT = "name: mine\ndata: {source: prefs.jsonl}\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        b"data: {source: 'C:\\new\\prefs.jsonl'}\nname: mine\n",
    ],
)
def test_a_recipe_is_read_however_its_text_is_stored(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.data.source in ("prefs.jsonl", "C:\\new\\prefs.jsonl")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data:\n\tsource: a.jsonl\n", "indent with spaces"),
        (b'data: {source: "C:\\Users\\me\\a.jsonl"}\n', "single quotes"),
        (b'data: {source: "D:\\my\\a.jsonl"}\n', "single quotes"),
        (b'data: {source: "C:\\new\\table.jsonl"}\n', "single quotes"),
        (b'reference: {model: "C:\\temp"}\n', "single quotes"),
        ("name: größer\n".encode("latin-1"), "line 1: not UTF-8"),
        (TEXT.encode("utf-16-le"), "UTF-16 without its mark"),
    ],
)
def test_a_recipe_that_cannot_be_read_says_what_to_change(tmp_path, content, expected):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "fine"), [(3.9, False), (1.5, False), (3.0, True), (4, True), (0.5, True)])
def test_held_out_is_a_share_or_whole_pairs(value, fine):
    if fine:
        assert parse_recipe({"data": {"held_out": value}}).data.held_out == value
    else:
        with pytest.raises(UserError, match="whole number of pairs"):
            parse_recipe({"data": {"held_out": value}})


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("seed: 1\nseed: 2\n", "seed"),
        ("oracle: {beta: 0.2}\nname: mine\noracle: {count: 2}\n", "oracle"),
        ("data:\n  held_out: 1\n  source: a.jsonl\n  held_out: 2\n", "held_out"),
        ("policy: {training: {batch_size: 4, batch_size: 4}}\n", "batch_size"),
        ("'seed': 1\nseed: 1\n", "seed"),
    ],
)
def test_a_key_that_occurs_twice_is_refused_and_not_the_last_one_taken(tmp_path, content, key):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"line .*the key '{key}' occurs twice"):
        load_recipe(path)


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("0", 0), ("1_000", 1000), ("08", 8), ("7", 7)])
def test_whole_numbers_are_read_as_written_and_not_in_other_bases(text, seed):
    assert load_recipe(None, [f"seed={text}"]).seed == seed


@pytest.mark.parametrize("text", ["1:30", "0x1F", "0b11"])
def test_numbers_in_other_notations_are_refused(text):
    with pytest.raises(UserError, match="seed is"):
        load_recipe(None, [f"seed={text}"])


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("data.held_out=30%", "0.3 for 30 %"),
        ("data.held_out=2.5 %", "0.025 for 2.5 %"),
        ("data.sample=50", "0.5 for 50 %"),
        ("select.k_chosen=30", "0.3 for 30 %"),
        ("select.k_chosen=30%", "0.3 for 30 %"),
        ("oracle.training.warmup_ratio=3%", "0.03 for 3 %"),
        ("policy.lora.dropout=5", "0.05 for 5 %"),
    ],
)
def test_a_percentage_is_told_its_share(override, advice):
    with pytest.raises(UserError) as caught:
        load_recipe(None, [override])
    assert advice in str(caught.value)


def test_a_recipe_and_a_grid_that_were_mistaken_for_each_other_are_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT)
    (tmp_path / "grid.yaml").write_text("base: recipe.yaml\nvariants: {a: {}, b: {}}\n")
    with pytest.raises(UserError, match="so it is a grid: run it with `sepo compare`"):
        load_recipe(tmp_path / "grid.yaml")
    with pytest.raises(UserError, match="no grid: run a recipe with `sepo run`"):
        load_grid(tmp_path / "recipe.yaml")
