"""Scoring tables: which process reads which rows, and when they are laid out."""

import time

import pytest

from pairs import awkward_pairs, pairs_table, some_pairs
from sepo import processes
from sepo.forward import scoring
from sepo.forward.packing import fill_rows, pack
from sepo.forward.scoring import dataset_logps, logps_of_parts, table_pairs
from sepo.stages import logps as stage_logps
from tiny_models import tiny_model


@pytest.mark.parametrize("shards", [1, 3, 4, 9])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_shard_is_scored_once_by_whole_shards_and_divided_ends(monkeypatch, shards, sharded):
    todo = [{"index": index} for index in range(shards)]
    monkeypatch.setattr(processes, "size", lambda: 4)
    monkeypatch.setattr(processes, "read_sharded", lambda: sharded)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(stage_logps._parts(todo)))
    assert len({len(of_rank) for of_rank in parts}) == 1
    scored = []
    for of_ranks in zip(*parts, strict=True):
        (shared,) = {shared for _, shared in of_ranks}
        if shared:  # in every process the same shards, never more than processes
            assert all(part == of_ranks[0][0] for part, _ in of_ranks)
            assert sharded or len(of_ranks[0][0]) < 4
        for part, _ in of_ranks[:1] if shared else of_ranks:
            assert len(part) <= (4 if shared else 1)
            scored += [item["index"] for item in part]
    assert sorted(scored) == list(range(shards))


def test_rows_of_several_tables_in_one_part_give_each_table_its_own_results():
    """In any number of processes: what each of them fills adds up."""
    tables = [pairs_table(awkward_pairs(seed)) for seed in range(3)]
    alone = [dataset_logps(tiny_model("llama"), table, tokens_per_row=64) for table in tables]
    for parts in ([(tables, True)], [(tables[:1], False), (tables[1:], True)], [([table], False) for table in tables]):
        together = [table for part in logps_of_parts(tiny_model("llama"), parts, tokens_per_row=64) for table in part]
        assert all(table.equals(other) for table, other in zip(together, alone, strict=True))


def test_the_next_rows_are_laid_out_while_a_row_is_read(monkeypatch):
    """And no more than the next two: memory does not grow with the table."""
    laid_out, ahead = [], []
    monkeypatch.setitem(scoring.LAYOUTS, "packed", (fill_rows, lambda pairs: laid_out.append(1) or pack(pairs)))
    read = scoring.read_logps

    def watched(model, batch):
        deadline = time.monotonic() + 10
        while len(laid_out) < min(len(ahead) + 3, rows) and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(len(laid_out) - len(ahead) - 1)
        return read(model, batch)

    pairs = table_pairs(some_pairs(20))
    rows = len(fill_rows(pairs, 64))
    monkeypatch.setattr(scoring, "read_logps", watched)
    dataset_logps(tiny_model("llama"), some_pairs(20), tokens_per_row=64)
    assert rows > 4
    assert ahead == [2] * (rows - 2) + [1, 0]
