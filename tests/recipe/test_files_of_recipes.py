"""Recipe files as editors and shells write them: read, or refused in one line that says what to change."""

from __future__ import annotations

import pytest

from sepo.errors import UserError
from sepo.recipe.reading import load_recipe, parse_recipe

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
