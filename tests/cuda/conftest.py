"""Tests that need a GPU: `make gpu-right`. Without one they are skipped."""

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
    """Matmuls in float32 are float32 here, whatever the environment says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
