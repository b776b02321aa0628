"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import sepo

ROOT = Path(sepo.__file__).parent
WITH_EXAMPLES = sorted(path for path in ROOT.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_examples_of_a_module_hold(path, tmp_path, monkeypatch):
    name = ".".join(("sepo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted or "+SKIP" in path.read_text(encoding="utf-8")
    assert not result.failed
