"""The data stage keeps its pairs on disk: the same bytes as from memory, and memory that does not grow with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import spawn
from sepo.data import encoding, formats, spool
from sepo.data.loading import load_preferences
from sepo.data.splits import prompt_numbers, split_pairs, take_pairs
from sepo.data.spool import Spool
from sepo.recipe.settings import DataSettings
from sepo.stages import data
from tiny_models import tiny_tokenizer


def rows_of(number: int) -> list[dict]:
    """Rows of which some are dropped, some are too long, and whose prompts repeat far apart."""
    rows = []
    for i in range(number):
        row = {"prompt": f"Is it {i % 23}?" + " very" * (i % 23), "chosen": f"yes {i}", "rejected": f"no {i}" * (i % 5)}
        if i % 17 == 3:
            row["chosen"] = "w" * 90 + str(i)
        rows.append(row)
    return rows


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("held_out", [0, 11, 0.2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sample", [1.0, 0.6])
@pytest.mark.daily(2)
def test_pairs_from_disk_are_byte_for_byte_those_from_memory(tmp_path, monkeypatch, held_out, own, sample):
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(data, "PAIRS_PER_SHARD", 25)
    for name, rows in (("a", rows_of(150)), ("b", rows_of(190)[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, seed = tiny_tokenizer(), 3
    settings = DataSettings(
        source=str(tmp_path / "a.jsonl"), held_out=held_out, sample=sample, as_chat=True, max_length=60
    )
    if own:
        settings = settings.model_copy(update={"held_out_source": str(tmp_path / "b.jsonl")})
    found = data.prepare_data(settings, tokenizer, tmp_path / "disk", seed, progress=False)

    table = data.read_pairs(settings, tokenizer, progress=False)
    number = int(held_out) if held_out >= 1 else settings.held_out
    train, held = split_pairs(table, held_out=0 if own else number, sample=sample, seed=seed)
    if own:
        held = data.read_pairs(data.held_out_data(settings, None)[0], tokenizer, progress=False)
        held = take_pairs(held, held_out, seed=seed) if held_out >= 1 else held
    for name, part in (("train", train), ("held_out", held)):
        data.write_pairs(tmp_path / "memory" / name, part)
        assert found["extremes"][name] == data.extremes(part)
        assert found[name] == len(part)
    numbers = prompt_numbers(pa.concat_tables([train.replace_schema_metadata(), held.replace_schema_metadata()]))
    assert found["shared_prompts"] == len(set(numbers[: len(train)]) & set(numbers[len(train) :]))
    assert found["report"]["train"]["truncated_prompts"] > 0
    assert found["report"]["train"]["dropped"]
    assert written(tmp_path / "disk") == written(tmp_path / "memory")


def test_rows_of_a_spool_come_back_in_any_order(tmp_path):
    table = pa.table({"n": pa.array(range(50)), "ids": pa.array([[i] * (i % 4) for i in range(50)])})
    spooled = Spool(tmp_path, table.schema)
    assert list(tmp_path.iterdir()) == []
    for start in range(0, 50, 7):
        spooled.append(table.slice(start, 7))
    spooled.append(table.slice(0, 0))
    assert len(spooled) == 50
    assert pa.concat_tables(spooled).equals(table)
    rows = np.random.default_rng(0).permutation(50)[:31]
    assert spooled.take(rows).equals(table.take(pa.array(rows)))
    assert len(spooled.take(rows[:0])) == 0


def test_a_large_parquet_file_stays_on_disk_and_gives_the_same_pairs(tmp_path, monkeypatch):
    """Also from a folder with several files; columns of bytes are read whole."""
    rows = pa.Table.from_pylist([{**row, "more": [{"a": i}]} for i, row in enumerate(rows_of(60))])
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "b").mkdir()
    for number in range(2):
        pq.write_table(rows.slice(30 * number, 30), tmp_path / "b" / f"train-{number:05d}-of-00002.parquet")
    as_bytes = rows.set_column(0, "prompt", rows["prompt"].cast(pa.binary()))
    pq.write_table(as_bytes, tmp_path / "c.parquet")
    names = ("a.parquet", "b", "c.parquet")
    wanted = [load_preferences(tmp_path / name) for name in names]
    monkeypatch.setattr(formats, "LARGE", 0)
    monkeypatch.setattr(spool, "_NUMBERS_AT_ONCE", 7)
    assert formats._table_on_disk(tmp_path / "a.parquet", 1).equals(rows)
    assert formats._table_on_disk(tmp_path / "c.parquet", 1) is None
    for name, dataset in zip(names, wanted, strict=True):
        found = load_preferences(tmp_path / name)
        assert found.features == dataset.features
        assert found.to_list() == dataset.to_list()


MEMORY = """
import os, resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from sepo.data.loading import load_preferences

def peak(number):
    if os.fork() == 0:  # what writing takes does not count
        with pq.ParquetWriter(sys.argv[1], pa.schema([(name, pa.string()) for name in ("chosen", "rejected")])) as file:
            for start in range(0, number, 10_000):
                texts = [str(row) for row in range(start, start + 10_000)]
                file.write_table(pa.table({"chosen": texts, "rejected": texts[::-1]}))
        os._exit(0)
    os.wait()
    assert load_preferences(sys.argv[1])[number - 1]["pair_id"] == number - 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak(200_000)
print((peak(1_000_000) - before) / 800_000)
"""


@pytest.mark.nightly
def test_a_row_takes_a_few_bytes_of_memory(tmp_path):
    """Rows and their numbers are on disk; of what is measured, about 20 bytes are pages of these files."""
    assert float(spawn.run(["-c", MEMORY, str(tmp_path / "rows.parquet")]).stdout) < 35
