"""A table of pairs, and what the toy units make of it in this process."""

from pathlib import Path

import pytest

from sepo import work
from toy_units import make_job, make_source, tables


@pytest.fixture
def source(tmp_path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture
def expected(source, tmp_path) -> dict[str, bytes]:
    work.do(make_job(source, tmp_path / "local"))
    return tables(tmp_path / "local")
