"""How cost grows with the number of pairs: every stage's seconds a pair and peak memory, with one worker and with two.

    python benchmarks/scale.py --pairs 1000 10000 100000            some minutes; a machine that does nothing else
    python benchmarks/scale.py --pairs 1000000 --add                adds a size to the results that are there

A tiny model and short texts: what is measured is everything around a model. Each stage runs in a process of its own,
forked after the imports; its memory is the peak of that process above what the imports take. With two workers the
engine "files" shares passes and transfers between two processes (the memory is that of the larger one), tokenising uses
`data.workers`; stages without units are measured once. A million pairs take half an hour with one worker (`--workers
1`). Tokenising is also measured alone, on texts of a usual length, with one process and with two.

Writes scale.json, scale.md and scale.png into --out. What 10^7 pairs take on many devices is simulated
(`sepo.planning.units`) from the measured seconds of a unit outside of its model, the measured start of a worker, and
220,400 tokens a second, which an H200 reads with a model of 1.24 billion weights (results/gpu.md).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import sepo.report.build
from sepo import engines, processes, work
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.engines.files import Files, serve
from sepo.files import write_json, write_text
from sepo.forward.scoring import Types
from sepo.models.tokenizer import load_tokenizer
from sepo.planning.units import PROFILES, simulate, tokens_of_units
from sepo.recipe.reading import parse_recipe
from sepo.stages import data, logps, score, select
from sepo.transfer import stages as transfer
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer_of

FORK = multiprocessing.get_context("fork")
UNITS = ("logps", "transfer")
TOKENS_A_SECOND = 220_400
# Seconds to load 1.24 billion weights of two bytes at 1 GB/s, an assumption; a worker starts once for both models.
LOAD = 2.5
FLAT = 1.2
ROWS_OF_TEXT = 60_000


def measured(function: Callable[[], Any], helper: Callable[[], Any] | None = None) -> dict[str, float]:
    """Seconds and peak memory (GB above the start) of a function in a process of its own.

    Args:
        helper: runs in a second process meanwhile, which is ended after the first.
    """
    pipe, other = FORK.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        before = _peak()
        began, used = time.monotonic(), _cpu_seconds()
        function()
        found = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - used}
        other.send(found | {"memory_gb": _peak() - before})

    started = [FORK.Process(target=target) for target in (child, helper) if target is not None]
    for process in reversed(started):  # the helper first: it waits for work
        process.start()
    other.close()  # else the end of the child would not be seen
    try:
        found = pipe.recv()
    except EOFError:
        started[0].join()
        raise RuntimeError(f"a stage ended with exit code {started[0].exitcode}") from None
    started[0].join()
    for process in started[1:]:
        process.join(60)
        process.kill()
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (0, resource.RUSAGE_CHILDREN)))


def make_models(folder: Path) -> None:
    """A reference, an oracle and a policy with another tokenizer."""
    for name, family, seed in (("reference", "gpt2", 0), ("oracle", "gpt2", 1), ("policy", "llama2", 0)):
        tokenizer = tiny_tokenizer_of(family)
        tiny_model(
            "llama", vocab_size=len(tokenizer), max_position_embeddings=512, seed=seed, **_SMALL
        ).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


_SMALL = {
    **{"hidden_size": 16, "intermediate_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
}


def make_pairs(path: Path, number: int) -> None:
    """Preferences of short texts, two to a prompt, written row group by row group."""
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    draw = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, number, 10_000):
            rows = range(start, min(start + 10_000, number))
            words = draw.integers(0, 1000, (len(rows), 2))
            columns = {
                "prompt": [f"Is it {row // 2}?" for row in rows],
                "chosen": [f"Yes, it is {a}." for a in words[:, 0]],
                "rejected": [f"no, it is {b} here" for b in words[:, 1]],
            }
            file.write_table(pa.table(columns, schema))


def stages_of(folder: Path, models: Path, workers: int) -> dict[str, Callable[[], Any]]:
    """The stages by name, in order."""
    recipe = parse_recipe(
        {
            "data": {"source": str(folder / "pairs.parquet"), "held_out": 0, "workers": workers},
            "reference": {"model": str(models / "reference")},
            "policy": {"model": str(models / "policy")},
        },
        "benchmark",
    )
    engine = "local" if workers == 1 else "files"

    def pass_of(name: str) -> None:
        with engines.use(engine, folder):
            logps.logps_pass(
                str(models / name), folder / "pairs/train", folder / name, device="cpu", types=Types("float32")
            )

    def carry() -> None:
        with engines.use(engine, folder):
            transfer.carry_scores(
                recipe, folder / "scores", folder / "policy_pairs/train", folder / "carried", "transfer"
            )

    def report() -> None:
        build = sepo.report.build.build_report
        build(None, table=folder / "scores", tokenizer=models / "reference", out=folder / "report.html")

    tokenizer = models / "reference"
    return {
        "data": lambda: data.prepare_data(
            recipe.data, load_tokenizer(str(tokenizer)), folder / "pairs", progress=False
        ),
        "logps": lambda: pass_of("reference"),
        "oracle logps": lambda: pass_of("oracle"),
        "score": lambda: score.score_pairs(
            folder / "pairs/train", [folder / "oracle"], folder / "reference", folder / "scores"
        ),
        "select": lambda: select.select(folder / "scores", folder / "selection"),
        "policy pairs": lambda: transfer.prepare_pairs(recipe, folder / "pairs", folder / "policy_pairs"),
        "transfer": carry,
        "report": report,
    }


def measure(pairs: int, workers: int, models: Path, place: Path) -> dict[str, dict[str, float]]:
    """Every stage for a number of pairs."""
    folder = place / f"{pairs}-{workers}"
    folder.mkdir()
    measured(lambda: make_pairs(folder / "pairs.parquet", pairs))  # the memory that this leaves would be the stages'
    found = {}
    for name, function in stages_of(folder, models, workers).items():
        shared = workers > 1 and name in ("logps", "oracle logps", "transfer")
        found[name] = measured(function, (lambda: serve(folder, 600.0, "cpu")) if shared else None)
        print(f"{pairs:>9,} pairs, {workers} workers, {name:<13} {found[name]['seconds']:8.2f} s "
              f"{found[name]['memory_gb']:6.3f} GB", flush=True)  # fmt: skip
    shutil.rmtree(folder)
    return found


class Nothing:
    """A kind of work whose units take no time: what is left is the engine."""

    def __init__(self, settings: Any):
        self.settings = settings

    def __call__(self, units: Any, progress: Any) -> Any:
        for unit in units:
            yield unit, lambda: {}

    @staticmethod
    def result(settings: Any, unit: work.Unit) -> str:
        return "done"


def overhead(place: Path, units: int = 1000) -> float:
    """Seconds that the engine "files" adds to a unit."""
    work.PACKAGES.add("__main__")
    job = work.Job("__main__:Nothing", "nothing", {}, tuple(work.Unit(f"unit-{i:05d}", 1, {}) for i in range(units)))
    began = time.monotonic()
    with engines.use("files", place / "nothing"):
        work.do(job)
    return (time.monotonic() - began) / units


def make_texts(path: Path, number: int) -> None:
    """Preferences of a usual length: a prompt of 30 words, responses of 150 words."""
    draw = np.random.default_rng(0)
    vocabulary = np.array(["".join(map(chr, word)) for word in draw.integers(97, 123, (2000, 6))])
    lengths = {"prompt": 30, "chosen": 150, "rejected": 150}
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in lengths])) as file:
        for start in range(0, number, 1000):
            size = min(1000, number - start)
            texts = {name: draw.choice(vocabulary, (size, words)) for name, words in lengths.items()}
            file.write_table(pa.table({name: [" ".join(words) for words in rows] for name, rows in texts.items()}))


def tokenising(models: Path, place: Path) -> dict[str, Any]:
    """Seconds to tokenise texts of a usual length with one process and with two."""
    make_texts(place / "texts.parquet", ROWS_OF_TEXT)
    rows, tokenizer = load_preferences(place / "texts.parquet"), load_tokenizer(str(models / "reference"))
    found: dict[str, Any] = {"rows": ROWS_OF_TEXT}
    for workers in (1, 2):
        found[str(workers)] = measured(lambda n=workers: tokenize_pairs(rows, tokenizer, progress=False, workers=n))
        print(f"tokenising with {workers}: {found[str(workers)]}", flush=True)
    return found


def start_of_a_worker() -> float:
    """CPU seconds until a new process could load a model."""
    before = _cpu_seconds()
    subprocess.run([sys.executable, "-c", "import sepo.stages.logps, sepo.engines.files"], check=True)
    return _cpu_seconds() - before


def simulations(around_a_unit: float, start: float) -> list[dict[str, Any]]:
    """Two models read ten million pairs, one after the other; a worker starts once and loads each model."""
    rows = []
    for profile in PROFILES:
        units = tokens_of_units(profile, 10_000_000) / TOKENS_A_SECOND + around_a_unit
        for devices in (1, 8, 64):
            seconds = sum(simulate(units, devices, load=load).seconds for load in (start + LOAD, LOAD))
            busy = 2 * units.sum() / (devices * seconds)
            rows.append({"profile": profile, "devices": devices, "hours": seconds / 3600, "busy": busy})
    return rows


def not_flat(sizes: dict[int, dict[str, float]], what: str) -> int | None:
    """The first size whose value exceeds that of the size before by more than a fifth; None if there is none.

    Sizes below 10,000 pairs do not count: constants dominate there, and so do values below 50 MB and 1 s.

    Args:
        what: "seconds" or "cpu_seconds" (a pair), or "memory_gb".
    """
    order = sorted(size for size in sizes if size >= 10_000)
    for before, size in pairwise(order):
        if what == "memory_gb":
            old, new = (sizes[n][what] for n in (before, size))
            small = sizes[size][what] < 0.05
        else:
            old, new = (sizes[n][what] / n for n in (before, size))
            small = sizes[size][what] < 1
        if new > FLAT * old and not small:
            return size
    return None


HEAD = """\
# How cost grows with the number of pairs

{verdict}

`benchmarks/scale.py`, commit {commit}, {machine}{shared}.
A tiny model and short texts: what is measured is everything around a model. CPU seconds are those of the command's
process and of processes that it started, wall seconds beside them. Memory is the peak of a
stage's process above what its imports take; in a stage that workers share, that of the command's process.

![seconds a pair and peak memory](scale.png)
"""
TAIL = """\
*Stops being flat*: the first size at which seconds a pair (CPU seconds with one worker, wall seconds with two) or
memory exceed those of the size before by more than a fifth, from 10,000 pairs on; below 1 s or 50 MB not counted.
{tokenised}
## Ten million pairs, simulated

Two models read 10,000 units of 1,000 pairs, one after the other. A unit takes its tokens at {tokens_a_second:,} a
second (one H200, 1.24 billion weights), and {around_ms:.0f} ms of CPU time around the model, measured here. A worker
starts once, {start_seconds:.0f} s of CPU time here, and loads each model in {load_seconds:g} s (1 GB/s, assumed): on 64
devices that is most of the time in which they are not busy. The lengths are log-normal, fitted to two public datasets
(`sepo.planning.units`). This is arithmetic with measured pieces: no such machines were there.

| lengths | devices | hours | busy |
|---|---:|---:|---:|
"""


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    tables: list[str] = []
    for workers, by_size in results["measured"].items():
        sizes = sorted(map(int, by_size))
        tables += [f"## {workers} {'worker' if workers == '1' else 'workers'}", ""]
        columns = " | ".join(f"{n:,} pairs: CPU ms a pair | ms a pair | GB" for n in sizes)
        tables += [f"| stage | {columns} | stops being flat |", "|---|" + "---:|---:|---:|" * len(sizes) + "---|"]
        for stage, ends in ends_of(workers, by_size).items():
            values = {n: by_size[str(n)][stage] for n in sizes}
            cells = " | ".join(
                f"{1e3 * v['cpu_seconds'] / n:.3f} | {1e3 * v['seconds'] / n:.3f} | {v['memory_gb']:.3f}"
                for n, v in values.items()
            )
            ended = ", ".join(f"{name} at {n:,}" for name, n in ends.items())
            tables.append(f"| {stage} | {cells} | {ended or '–'} |")
        tables.append("")
    busy = [workers for workers in results["measured"] if workers in results["shared"]]
    names = [f"{n} {'worker was' if n == '1' else 'workers were'} measured" for n in busy]
    shared = f"; other programs ran on it while {' and '.join(names)}" if busy else ""
    where = {name: results[name] for name in ("machine", "commit")}
    text = HEAD.format(**where, shared=shared, verdict=verdict(results)) + "\n" + "\n".join(tables)
    words = {"around_ms": 1e3 * results["around_a_unit"], "tokenised": tokenised(results)}
    text += "\n" + TAIL.format(**results, **words)
    rows = (f"| {r['profile']} | {r['devices']} | {r['hours']:.2f} | {r['busy']:.1%} |" for r in results["simulated"])
    return text + "\n".join(rows) + "\n"


def tokenised(results: dict[str, Any]) -> str:
    """What two processes gain."""
    if "tokenising" not in results:
        return ""
    rows, one, two = (results["tokenising"][name] for name in ("rows", "1", "2"))
    return (
        f"\n## Tokenising\n\n{rows:,} pairs of 330 words: {one['seconds']:.1f} s with one process, "
        f"{two['seconds']:.1f} s with two, {one['seconds'] / two['seconds']:.2f} times as fast. CPU seconds of "
        f"all processes: {one['cpu_seconds']:.1f} and {two['cpu_seconds']:.1f}, so two free cores can be "
        f"{2 * one['cpu_seconds'] / two['cpu_seconds']:.2f} times as fast.\n"
    )


def ends_of(workers: str, by_size: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By stage, where time and memory stop being flat."""
    sizes = sorted(map(int, by_size))
    found = {}
    for stage in by_size[str(sizes[0])]:
        values = {n: by_size[str(n)][stage] for n in sizes}
        time = not_flat(values, "cpu_seconds" if workers == "1" else "seconds")
        ends = {"time": time, "memory": not_flat(values, "memory_gb")}
        found[stage] = {name: n for name, n in ends.items() if n is not None}
    return found


def verdict(results: dict[str, Any]) -> str:
    """What was found, in two sentences."""
    by_size = results["measured"]["1"]
    before, most = sorted(map(int, by_size))[-2:]
    stages = by_size[str(most)]
    times = {s: stages[s]["cpu_seconds"] * before / by_size[str(before)][s]["cpu_seconds"] / most - 1 for s in stages}
    grown = {s: stages[s]["memory_gb"] - by_size[str(before)][s]["memory_gb"] for s in stages}
    more = [s for s in stages if stages[s]["memory_gb"] > FLAT * by_size[str(before)][s]["memory_gb"]]
    first = (
        f"From {before:,} to {most:,} pairs, CPU seconds a pair change by {min(times.values()):+.0%} to "
        f"{max(times.values()):+.0%}, stage by stage"
    )
    rest = f"; peak memory grows by more than a fifth in {', '.join(f'{s} (+{grown[s]:.2f} GB)' for s in more)}"
    rest = rest if more else "; no stage's peak memory grows by more than a fifth"
    largest = max(values["memory_gb"] for values in stages.values())
    unmeasured = "" if "2" in results["measured"] else " Two workers were not measured."
    million = (
        "" if most >= 1_000_000 else " Nor a million pairs." if unmeasured else " A million pairs were not measured."
    )
    return (
        f"**{first}{rest}.** The largest takes {largest:.2f} GB. The report's figures and rows are a sample of at most "
        f"20,000 pairs, so its memory cannot grow much beyond that.{unmeasured}{million}"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for workers, style in (("1", "-"), ("2", "--")):
        by_size = results["measured"].get(workers, {})
        sizes = sorted(map(int, by_size))
        for number, stage in enumerate(by_size[str(sizes[0])] if sizes else ()):
            values = [by_size[str(n)][stage] for n in sizes]
            label = stage if workers == "1" else None
            of = "cpu_seconds" if workers == "1" else "seconds"
            seconds = [1e3 * v[of] / n for v, n in zip(values, sizes, strict=True)]
            axes[0].plot(sizes, seconds, style, color=f"C{number}", label=label)
            axes[1].plot(sizes, [max(v["memory_gb"], 1e-3) for v in values], style, color=f"C{number}")
    for axis, title in zip(axes, ("ms a pair (CPU with one worker)", "peak memory above the imports, GB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="pairs", title=title)
    axes[0].legend(fontsize=8, title="dashed: two workers, wall" if "2" in results["measured"] else None)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--add", action="store_true", help="add to the results in --out")
    parser.add_argument("--shared", action="store_true", help="say that other programs ran meanwhile")
    options = parser.parse_args()
    processes.log = lambda text: None  # type: ignore[assignment]
    gc.collect()
    gc.freeze()
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "scale.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if options.add else {"measured": {}}
    with tempfile.TemporaryDirectory(prefix="sepo-scale-") as name:
        place = Path(name)
        maker = FORK.Process(target=make_models, args=(place / "models",))
        maker.start()
        maker.join()
        for workers in options.workers:
            for pairs in options.pairs:
                found = measure(pairs, workers, place / "models", place)
                results["measured"].setdefault(str(workers), {})[str(pairs)] = found
                write_json(options.out / "scale-so-far.json", results)
        results["engine_seconds"] = overhead(place)
        if not options.shared:  # on a busy machine two processes are no faster than one
            results["tokenising"] = tokenising(place / "models", place)
    measured_now = set(map(str, options.workers))
    results["shared"] = sorted(
        {*results.get("shared", ())} - measured_now | (measured_now if options.shared else set())
    )
    results |= {"machine": f"{os.cpu_count()} CPU cores", "tokens_a_second": TOKENS_A_SECOND, "load_seconds": LOAD}
    results["start_seconds"] = start_of_a_worker()
    revision = ["git", "rev-parse", "--short", "HEAD"]
    results["commit"] = subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip()
    most = results["measured"]["1"][max(results["measured"]["1"], key=int)]
    pairs = int(max(results["measured"]["1"], key=int))
    # Around the model: the engine, and two transfers' worth of reading and writing a shard.
    results["around_a_unit"] = results["engine_seconds"] + 1000 * most["transfer"]["cpu_seconds"] / pairs
    results["simulated"] = simulations(results["around_a_unit"], results["start_seconds"])
    (options.out / "scale-so-far.json").unlink()
    write_json(stored, results)
    write_text(options.out / "scale.md", page(results))
    draw(results, options.out / "scale.png")
    gc.unfreeze()  # else bindings report leaks when the interpreter ends


if __name__ == "__main__":
    Files.patience = 30.0
    main()
