"""Settings and fixtures for all tests: no network, a fixed number of threads, one converted SmolLM2."""

from __future__ import annotations

import gc
import os

# Before any Hugging Face import reads them: a test that wants the network must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the GPU's kernels are imported

from sepo.errors import UserError
from sepo.models.names import check_model, resolve_model
from sepo.recipe.settings import DEFAULT_MODEL

# A machine that is shared is slow now and then; no example fails for that.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: a thread each, also in the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


# Files with tests that take a minute each.
LONGEST = ("test_faults", "test_package", "test_tutorials")
# Whole runs, launched processes, a browser, thousands of generated inputs: not for the inner loop (`make check`).
SLOW = (
    "runs/",
    "docs/",
    "cli/test_hostile",
    "data/test_data_fuzz",
    "report/test_report_browser",
    "test_golden",
    "cuda/",
)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if os.path.relpath(item.path, here).startswith(SLOW) or "smollm2_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    # A test of a minute that comes last is waited for by workers that have nothing left to do.
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_not_searched_for_garbage():
    """Every training and every evaluation ends in a collection, which looks at each object that PyTorch, Transformers
    and TRL made when they were imported, a million of them: most of the time of a run of a tiny model.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what is left when the interpreter ends, bindings report as leaked


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """The folder of SmolLM2-135M-Instruct in safetensors: converted at the first run, cached from then on."""
    try:
        check_model(DEFAULT_MODEL)
    except UserError as error:
        pytest.skip(str(error))
    return resolve_model(DEFAULT_MODEL)
