"""Settings and fixtures for all tests: no network, a fixed number of threads, results that all workers share."""

from __future__ import annotations

import functools
import gc
import os
import random
import shutil
import signal
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

# Before any Hugging Face import reads them: a test that wants the network must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TQDM_DISABLE", "1")
# The package keeps oneDNN's code for 32 shapes only (`sepo.kernels`). Tests meet the same shapes of tiny models
# again and again: their code is made once.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")

import pytest
from filelock import FileLock

import spawn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tests of half a minute each: they start first, so that no worker waits for one at the end.
LONGEST = ("test_faults", "test_package", "test_tutorials", "test_many_processes", "test_sharded_reading")
# Not for the inner loop (`make check`): files of whole runs, launched processes, a browser, and the functions that took
# over 0.25 s when scripts/slow_tests.py recorded them last.
SLOW = (
    *("runs/", "hub/", "docs/", "cuda/", "test_golden", "test_spawn"),
    # Fixtures of seconds, which the first test of a file waits for.
    *("bench/test_credit", "engines/test_real_units", "sampling/test_sample", "sharded/"),
    *("study/test_compare", "study/test_judge_in_compare", "study/test_grid_parts"),
    *("cli/test_hostile", "cli/test_interrupt", "cli/test_terminal", "data/test_data_fuzz"),
    *("judging/test_judge_in_run", "judging/test_judge_killed", "judging/test_benchmarks_in_run"),
    *("judging/test_oracle_judge", "planning/test_plan", "training/test_logs", "report/test_report_browser"),
)
RECORDED = frozenset(Path(__file__).with_name("slow.txt").read_text().split())

# Where a GPU is, workers import for themselves: CUDA does not survive a fork.
GPUS = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd")))
FORKED = pytest.StashKey[bool]()  # is this process a worker that was forked?

# The tests in a browser that are not left to the nightly run.
BROWSER = ("test_the_sliders_select_the_tokens", "test_hostile_text_is_shown")


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run the nightly tests too, and properties on all inputs")


def pytest_configure(config):
    """Import what all tests import. Workers are forked from the process that hands out the tests, which has done so."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    has_workers = not is_worker and bool(config.getoption("numprocesses", None))
    if has_workers:
        # Workers share the cores: a thread each, also in the processes that tests start. NumPy reads it when imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if any(device.exists() for device in GPUS):
            return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this with & has it ignored
    gc.disable()  # until the tests are collected: importing makes a million objects, and none is garbage
    # No test cuts the power, so nothing need wait until a disk has its files: a tenth of the time of a run.
    os.fsync = lambda descriptor: None
    forked = config.stash[FORKED] = is_worker and "torch" in sys.modules
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton and the GPU's kernels are imported
        # Each seed is queued for a GPU that is never initialised, with the whole stack as text.
        for backend in (torch.cuda, torch.xpu, torch.mtia):
            backend.traceback = types.SimpleNamespace(format_stack=list)
    if not forked:
        _remember_entry_points()
    import transformers
    from hypothesis import settings

    import properties  # noqa: F401  registers the profiles of Hypothesis
    import sepo.models.weights  # noqa: F401

    if is_worker or has_workers:
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    settings.load_profile("nightly" if is_nightly(config) else "ordinary")
    # Transformers puts each config that it reads into a line of its log, as text, though nobody reads that log.
    for kind in (transformers.PreTrainedConfig, transformers.GenerationConfig):
        kind.__repr__ = object.__repr__
    if (has_workers or is_worker) and config.option.markexpr != "not slow":
        spawn.preload()  # workers of the whole suite need most of it too
    spawn.start_server(imports=not has_workers)
    if has_workers:
        spawn.fork_workers()
        gc.enable()


def _remember_entry_points() -> None:
    """Every look for entry points reads the metadata of all packages: once for each path is enough."""
    original = metadata.entry_points
    read = functools.cache(lambda path: original())
    metadata.entry_points = lambda **chosen: read(tuple(sys.path)).select(**chosen)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def is_nightly(config) -> bool:
    return config.getoption("--nightly") or config.option.markexpr == "nightly"


def leave_variants_to_the_night(items) -> None:
    """Of a test marked `daily(n)` n variants run each day: those that show values of its parameters not shown yet, then
    any, in an order drawn from the test's name. The others run at night.
    """
    tests: dict = {}
    for item in items:
        if item.get_closest_marker("daily") and not item.get_closest_marker("nightly"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, variants in tests.items():
        random.Random(name).shuffle(variants)
        shown: set = set()
        kept, others = [], []
        for item in variants:
            values = {(key, repr(value)) for key, value in item.callspec.params.items()}
            (others if values <= shown else kept).append(item)
            shown |= values
        for item in (kept + others)[variants[0].get_closest_marker("daily").args[0] :]:
            item.add_marker(pytest.mark.nightly)


def pytest_ignore_collect(collection_path, config):
    """`make check` does not import the files whose tests it leaves out."""
    left_out = config.option.markexpr == "not slow" and collection_path.suffix == ".py"
    return True if left_out and place(collection_path).startswith(SLOW) else None


def place(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).with_suffix("").as_posix()


def pytest_collection_modifyitems(config, items):
    for item in items:
        name = f"{place(item.path)}::{item.originalname}"
        if name.startswith(SLOW) or name in RECORDED or "smollm2_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        if item.path.name == "test_report_browser.py" and not item.originalname.startswith(BROWSER):
            item.add_marker(pytest.mark.nightly)
    leave_variants_to_the_night(items)
    if not is_nightly(config):
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_not_searched_for_garbage():
    """Every training and every evaluation ends in a collection, which looks at each object that PyTorch, Transformers
    and TRL made when they were imported, a million of them: most of the time of a run of a tiny model.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    spawn.stop_server()
    if config.stash.get(FORKED, False):
        gc.freeze()  # a fork ends without taking modules down: nothing need be looked through
    else:
        gc.unfreeze()  # what is left when the interpreter ends, bindings report as leaked


@pytest.fixture(scope="session")
def nightly_run(request) -> bool:
    """Is this the nightly run, for tests that try more then?"""
    return is_nightly(request.config)


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """The folder of SmolLM2-135M-Instruct in safetensors: converted at the first run, cached from then on."""
    from sepo.errors import UserError
    from sepo.models.names import check_model, resolve_model
    from sepo.recipe.settings import DEFAULT_MODEL

    try:
        check_model(DEFAULT_MODEL)
    except UserError as error:
        pytest.skip(str(error))
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that fills a folder, of a name and with a callable, once for all workers. Tests only read the folder:
    a test that changes something copies it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / f"once-{name}"
        with FileLock(f"{folder}.lock"):
            if not (root / f"once-{name}.finished").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                (root / f"once-{name}.finished").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def finished_run(made_once) -> Path:
    """The folder of `tiny_run.fill`: a model, preferences, a recipe and its finished run in `run`. Only read it."""
    import tiny_run

    return made_once("run", tiny_run.fill)


@pytest.fixture
def copied_run(finished_run, tmp_path) -> Path:
    """A copy of the finished run; `tiny_run.run_command` is the command that made it."""
    return shutil.copytree(finished_run / "run", tmp_path / "run")
