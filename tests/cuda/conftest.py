"""Tests that need a GPU (`make gpu`); without a GPU they are skipped."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/cuda" in item.path.as_posix():
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _exact_float32():
    """Use full float32 matmuls, whatever the environment sets."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pytest_runtest_logreport(report):
    """Write each failure at once to $OUT, if set: a run that is interrupted prints no summary."""
    if report.failed and os.environ.get("OUT") and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.path.join(os.environ["OUT"], "failures.txt"), "a") as file:
            file.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext[-1500:]}\n")
