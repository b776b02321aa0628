"""A frozen model over a dataset: the log-probability of every response token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from sepo import processes
from sepo.data.ragged import ragged
from sepo.data.tables import check_pairs_differ, make_table, require_table
from sepo.errors import check_number
from sepo.forward.logps import token_logps
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch, Pair, fill_rows, pack, pad
from sepo.forward.prepare import prepare_model

LAYOUTS: dict[str, Callable[[Sequence[Pair]], PackedBatch]] = {"packed": pack, "padded": pad}
# In training; without gradients a row may be larger, as nothing is kept for a backward pass.
TOKENS_PER_ROW = {"cpu": 512, "cuda": 16384, "mps": 4096}


class NonFiniteError(RuntimeError):
    """A log-probability is NaN or infinite; the message names the pairs."""


def table_pairs(table: pa.Table) -> list[Pair]:
    """Read the rows of a pairs, scores or selection table as `Pair`s (selection positions and weights included)."""
    check_pairs_differ(table)
    names = [name for name in Pair.__dataclass_fields__ if name in table.column_names]
    columns = [table.column(name).to_pylist() for name in names]
    return [Pair(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def make_batches(pairs: Sequence[Pair], layout: str, tokens_per_row: int) -> list[PackedBatch]:
    """Lay out a set of pairs as batches of about `tokens_per_row` tokens each, packed or padded."""
    return [LAYOUTS[layout](row) for row in fill_rows(pairs, tokens_per_row)]


def tokens_per_row_for(device: torch.device | str, scoring: bool = False) -> int:
    """The token budget of a row that measured best on a kind of device (docs/performance.md)."""
    kind = torch.device(device).type
    budget = TOKENS_PER_ROW.get(kind, 4096)
    return 8 * budget if scoring and kind == "cpu" else budget


@torch.no_grad()
def dataset_logps(
    model: nn.Module,
    pairs: pa.Table,
    *,
    tokens_per_row: int | None = None,
    provenance: dict | None = None,
    progress: Callable[[int], None] | None = None,
    over_processes: bool = False,
) -> pa.Table:
    """Log-probability of every response token of `pairs` under a frozen model.

    Args:
        model: a causal LM, on its device.
        pairs: a table with the columns of kind "pairs".
        tokens_per_row: token budget of a packed row; a default for the device if None.
        progress: called with the number of pairs finished since the last call.
        over_processes: share the packed rows among the processes of the launch, all of which must call this and get
            the whole table. The rows are those of one process, so the numbers are too.

    Returns:
        a table of kind "logps", row for row with `pairs`.

    Raises:
        NonFiniteError: a log-probability is NaN or infinite.
    """
    require_table("pairs", pairs, "pairs")
    if tokens_per_row is not None:
        check_number("tokens_per_row", tokens_per_row, whole=True, least=1)
    layout = prepare_model(model)
    device = next(model.parameters()).device
    budget = tokens_per_row or tokens_per_row_for(device, scoring=True)
    rows = table_pairs(pairs.select(["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"]))
    lengths = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in rows], np.int64).reshape(-1, 2)
    starts = np.zeros_like(lengths)
    np.cumsum(lengths[:-1], axis=0, out=starts[1:])
    totals = lengths.sum(0)
    out = [np.zeros(totals[CHOSEN], np.float32), np.zeros(totals[REJECTED], np.float32)]
    row_of = {pair.pair_id: index for index, pair in enumerate(rows)}

    training = model.training
    model.eval()
    try:
        own = slice(processes.rank(), None, processes.size()) if over_processes else slice(None)
        for row in fill_rows(rows, budget)[own]:
            batch = LAYOUTS[layout](row)
            values = token_logps(model, batch.to(device)).float().cpu().numpy()
            if not np.isfinite(values).all():
                bad = np.unique(batch.segments.numpy()[~np.isfinite(values)] // 2)
                ids = [batch.pair_ids[index] for index in bad]
                raise NonFiniteError(f"log-probabilities of pair {ids[0]} (of {len(ids)} pairs) are not finite")
            at = 0
            for pair_id in batch.pair_ids:
                index = row_of[pair_id]
                for side in (CHOSEN, REJECTED):
                    size, start = lengths[index, side], starts[index, side]
                    out[side][start : start + size] = values[at : at + size]
                    at += size
            if progress:
                progress(batch.num_pairs)
    finally:
        model.train(training)
    if over_processes:
        out = [processes.add_up(values) for values in out]
    return make_table(
        "logps",
        {
            "pair_id": pairs.column("pair_id"),
            "chosen_logps": ragged(out[CHOSEN], lengths[:, CHOSEN]),
            "rejected_logps": ragged(out[REJECTED], lengths[:, REJECTED]),
        },
        provenance,
    )
