"""A kind of work for tests of engines: it adds a number to a column, shard by shard, and misbehaves on demand.

Files beside the results steer it: `kill-NAME` kills the process at unit NAME (`SIGKILL`), `fail-NAME` raises an
OSError, `hold-NAME` stops there until the file is removed; `once-...` does so only for the first process. `opened` gets
a line for each process that loads the "model", `order` one for each finished unit.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa

from sepo import work
from sepo.data.tables import make_table, read_shard, shard_digest, shard_path, table_digest, write_shard

work.PACKAGES.add("toy_units")


def make_source(folder: Path, shards: int = 6, rows: int = 5) -> Path:
    """A pairs table."""
    for index in range(shards):
        ids = [[index + row + 1, row + 1] for row in range(rows)]
        rejected = [[9, row + 1] for row in range(rows)]
        pair_ids = [index * rows + row for row in range(rows)]
        columns = {"pair_id": pair_ids, "prompt_ids": ids, "chosen_ids": ids, "rejected_ids": rejected}
        write_shard(folder, index, make_table("pairs", columns, {"tokenizer": "t"}), shards)
    return folder


def make_job(source: Path, out: Path, oracle: str = "A", add: int = 1, title: str = "toy") -> work.Job:
    paths = sorted(source.glob("part-*.parquet"))
    settings = {"source": str(source), "out": str(out), "oracle": oracle, "add": add, "shards": len(paths)}
    units = tuple(work.Unit(path.stem, 5, {"index": index}) for index, path in enumerate(paths))
    return work.Job("toy_units:Toy", title, settings, units)


class Toy:
    def __init__(self, settings: Mapping):
        self.settings, self.out = settings, Path(settings["out"])
        self.out.mkdir(parents=True, exist_ok=True)
        self._note("opened", f"{os.getpid()}")

    def __call__(self, units: Iterable[work.Unit], progress: work.Progress) -> Iterator:
        for unit in units:
            self._steer(unit.name)
            index = unit.details["index"]
            table = read_shard(shard_path(Path(self.settings["source"]), index), "pairs")
            column = pa.array(
                [[x + self.settings["add"] for x in row] for row in table.column("chosen_ids").to_pylist()]
            )
            columns = {name: table.column(name) for name in table.column_names} | {"chosen_ids": column}
            provenance = {"oracle": self.settings["oracle"], "pairs": table_digest(table)}
            progress(unit.size)
            yield unit, partial(self._write, index, make_table("pairs", columns, provenance))

    def _write(self, index: int, table: pa.Table) -> work.Counts:
        write_shard(self.out, index, table, self.settings["shards"])
        self._note("order", f"{os.getpid()} {index}")
        return {"pairs": len(table), "index": index}

    def _steer(self, name: str) -> None:
        def asked(what: str) -> bool:
            once = self.out / f"once-{what}-{name}"
            try:
                once.unlink()
                return True
            except FileNotFoundError:
                return (self.out / f"{what}-{name}").exists()

        if asked("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if asked("fail"):
            raise OSError(errno.ENOSPC, "No space left on device")
        while (self.out / f"hold-{name}").exists():
            time.sleep(0.02)

    def _note(self, name: str, text: str) -> None:
        with open(self.out / name, "a") as file:
            file.write(text + "\n")

    @staticmethod
    def result(settings: Mapping, unit: work.Unit) -> str | None:
        expected = {"oracle": settings["oracle"], "shards": settings["shards"]}
        return shard_digest(shard_path(Path(settings["out"]), unit.details["index"]), expected)


def tables(folder: Path) -> dict[str, bytes]:
    """The shards of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def lines(folder: Path, name: str) -> list[str]:
    """The lines of a file; none if it is not there."""
    return (folder / name).read_text().splitlines() if (folder / name).exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
