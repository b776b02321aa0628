"""The one forward path: log-probabilities of target tokens, given packed pairs.

`token_logps` runs the backbone once over a packed row, gathers the hidden states that predict the targets and projects
only those through the LM head. Scoring, DPO and SePO differ in which targets they ask for and what they do with the
answers; none has a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo import processes
from sepo.attention import ATTENTION
from sepo.errors import UserError
from sepo.layers import last_mlp, rows_only, use_fast_layers
from sepo.lm_head import LogitTransform, target_logps
from sepo.models import causal_lm
from sepo.packing import CHOSEN, REJECTED, PackedBatch, Pair, fill_rows, pack, pad
from sepo.tables import make_table, ragged

LAYOUTS: dict[str, Callable[[Sequence[Pair]], PackedBatch]] = {"packed": pack, "padded": pad}
# In training; without gradients a row may be larger, as nothing is kept for a backward pass.
TOKENS_PER_ROW = {"cpu": 512, "cuda": 16384, "mps": 4096}


class NonFiniteError(RuntimeError):
    """A log-probability is NaN or infinite; the message names the pairs."""


def token_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-probability of every target of a batch, with gradients if they are enabled.

    Args:
        model: a Transformers causal LM or a PEFT model of one; `prepare_model` was called on it.
        batch: from `packing.pack` (or `packing.pad`), on the model's device. `N` targets.

    Returns:
        `[N]` float32 (float64 for a float64 model), in nats, in the order of `batch.segments`.
    """
    lm = causal_lm(model)
    targets = target_hidden(lm, batch)
    return target_logps(targets, lm.get_output_embeddings(), batch.target_ids, LogitTransform.from_config(lm.config))


def target_hidden(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states that predict the targets, `[N, hidden]`: what an LM head is applied to."""
    inputs: dict = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.layout is not None:
        inputs["layout"] = batch.layout
        # A 4D mask is taken as it is: no [T, T] mask is built, and the packed attention function ignores this one.
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
    with rows_only(_prunable_mlp(lm, batch), batch.target_rows):
        hidden = getattr(lm, lm.base_model_prefix)(**inputs).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.target_positions)


def _prunable_mlp(lm: PreTrainedModel, batch: PackedBatch) -> nn.Module | None:
    """The last block's MLP where it may skip rows: checkpointing runs it again later, outside of this forward."""
    if batch.layout is None or not getattr(lm, "sepo_prunable", False):
        return None
    # Transformers' own property for this goes by another name from 5.23 on.
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    return None if checkpointing else last_mlp(lm)


def segment_sums(logps: Tensor, batch: PackedBatch, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """Sum target log-probabilities by pair and side.

    Returns:
        chosen and rejected sums, each `[B]`; weighted by `batch.weights` if asked.
    """
    values = logps * batch.weights if weighted else logps
    sums = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, values)
    return sums[CHOSEN::2], sums[REJECTED::2]


def segment_weights(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sum of target weights by pair and side (the number of targets where all weights are 1), each `[B]`."""
    sums = batch.weights.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, batch.weights)
    return sums[CHOSEN::2], sums[REJECTED::2]


# --- which layout a model takes -------------------------------------------------------------------------------------


def prepare_model(model: nn.Module, layout: str = "auto") -> str:
    """Make a model read packed rows if it can, checked on a tiny input; returns "packed" or "padded".

    Packed rows need the model to pass keyword arguments on to Transformers' attention interface, and their logits
    transformed in a way that `LogitTransform` knows. Both are checked rather than believed: a few tokens go through
    the packed path, the padded path and the model's own forward, and the log-probabilities must agree.

    Args:
        layout: "auto", or "packed" / "padded" to insist.

    Raises:
        UserError: the model's own logits are not reproduced, or packed rows were insisted on and do not work.
    """
    known = getattr(model, "sepo_layout", None)
    if known is not None and layout in ("auto", known):
        return known
    lm = causal_lm(model)
    name = lm.config.name_or_path or type(lm).__name__
    before = lm.config._attn_implementation
    training = model.training
    model.eval()
    try:
        expected = _probe_plain(lm)
        # The model's own logits are rounded to its type; ours are not.
        exact = lm.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(lm.device.type)
        tolerance = 2e-3 if exact else 0.25
        _require_agreement(_probe(model, pad), expected, tolerance, name)
        chosen = "padded"
        if layout != "padded":
            try:
                lm.set_attn_implementation(ATTENTION)
                packed = _probe(model, pack)
                works = bool((packed - expected).abs().max() <= tolerance)
            except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                works = False
                if layout == "packed":
                    raise UserError(f"model '{name}' does not take packed rows ({error}); use layout=padded") from error
            if works:
                chosen = "packed"
                use_fast_layers(lm)
                lm.sepo_prunable = _prunable(model, lm, expected, tolerance)  # type: ignore[assignment]
            elif layout == "packed":
                raise UserError(f"model '{name}' gives other results on packed rows; use layout=padded")
            else:
                lm.set_attn_implementation(before)
    finally:
        model.train(training)
    model.sepo_layout = chosen  # type: ignore[assignment]
    return chosen


def _prunable(model: nn.Module, lm: PreTrainedModel, expected: Tensor, tolerance: float) -> bool:
    """Does the model give the same where the last block's MLP sees only the rows of targets?"""
    lm.sepo_prunable = True  # type: ignore[assignment]
    try:
        return bool((_probe(model, pack) - expected).abs().max() <= tolerance)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, IndexError):
        return False


_PROBE = (
    Pair(0, (3, 5, 7), (11, 13, 5, 2), (17, 3)),
    Pair(1, (3, 5, 7), (17, 3), (4, 4, 6)),
    Pair(2, (8,), (9,), (10, 12, 6)),
)


@torch.no_grad()
def _probe(model: nn.Module, layout: Callable[[Sequence[Pair]], PackedBatch]) -> Tensor:
    return token_logps(model, layout(_PROBE).to(next(model.parameters()).device))


@torch.no_grad()
def _probe_plain(lm: PreTrainedModel) -> Tensor:
    """The probe's log-probabilities by the model's own forward, one sequence at a time."""
    device = next(lm.parameters()).device
    parts = []
    for pair in _PROBE:
        for side in (CHOSEN, REJECTED):
            ids = pair.side(side)[0]
            tokens = torch.tensor([[*pair.prompt_ids, *ids]], device=device)
            logits = lm(input_ids=tokens, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logps = torch.log_softmax(logits.double(), -1)
            parts.append(logps.gather(1, tokens[0, len(pair.prompt_ids) :, None])[:, 0])
    return torch.cat(parts)


def _require_agreement(got: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    if not bool((got - expected).abs().max() <= tolerance):
        raise UserError(
            f"model '{name}' changes its logits in a way this release does not reproduce "
            f"(log-probabilities differ by {float((got - expected).abs().max()):.3g}): it cannot be used"
        )


# --- a frozen model over a dataset ----------------------------------------------------------------------------------


def table_pairs(table: pa.Table) -> list[Pair]:
    """Read the rows of a pairs, scores or selection table as `Pair`s (selection positions and weights included)."""
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
