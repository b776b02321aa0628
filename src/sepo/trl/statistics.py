"""Statistics of the next-token distribution at each target, which TRL logs: entropy, mean logit, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenStatistics:
    """Statistics of softmax(z) at each target, from the blocks of logits z that the LM head computes for the loss.

    Pass it to `sepo.kernels.lm_head.target_logps` as reader, then read `values`.

    Args:
        ids: `[N]`, the targets.
        names: any of entropy (nats), mean_logits (mean of z over the vocabulary), is_top1 (the target is the most
            likely token) and log_sum_sq_probs (log of the sum of squared probabilities).
    """

    def __init__(self, ids: Tensor, names: Sequence[str]) -> None:
        self._ids, self._names = ids, names
        self._sums: dict[int, list[dict[str, Tensor]]] = {}  # first target of a block -> its blocks

    @torch.no_grad()
    def __call__(self, rows: slice, columns: slice, logits: Tensor) -> None:
        """Read a block, `[targets, part of the vocabulary]`."""
        block = {"size": torch.full_like(logits[:, 0], logits.shape[1])}
        if "mean_logits" in self._names:
            block["sum"] = logits.sum(1)
        if set(self._names) - {"mean_logits"}:
            # A finite shift, so that a row of -inf only gives sums of 0.
            highest, place = logits.max(1)
            shift = block["shift"] = highest.clamp_min_(torch.finfo(logits.dtype).min)
            block["is_target"] = place + columns.start == self._ids[rows]
            centred = logits - shift[:, None]
            exponentials = centred.exp()
            block["total"] = exponentials.sum(1)
            block["squares"] = torch.linalg.vecdot(exponentials, exponentials)
            # -inf * 0 is NaN: a token of probability 0 adds nothing.
            centred.clamp_min_(torch.finfo(logits.dtype).min)
            block["expected"] = torch.linalg.vecdot(exponentials, centred)
        self._sums.setdefault(rows.start, []).append(block)

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """Each of the names, `[N]`."""
        groups = [_joined(blocks, self._names) for _, blocks in sorted(self._sums.items())]
        return {name: torch.cat([group[name] for group in groups]) for name in self._names}


def _joined(blocks: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Statistics of the same targets, from the parts of the vocabulary."""
    part = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    found = {}
    if "mean_logits" in names:
        found["mean_logits"] = part["sum"].sum(0) / part["size"].sum(0)
    if set(names) - {"mean_logits"}:
        shift, largest = part["shift"], part["shift"].amax(0)
        weight = (shift - largest).exp()
        total = (weight * part["total"]).sum(0)
        # H = log Z - E[z], both relative to the largest logit.
        expected = (weight * (part["expected"] + (shift - largest) * part["total"])).sum(0) / total
        found["entropy"] = total.log() - expected
        found["log_sum_sq_probs"] = (weight.square() * part["squares"]).sum(0).log() - 2 * total.log()
        first = (shift == largest).int().argmax(0, keepdim=True)  # of equal logits the first counts, as in TRL
        found["is_top1"] = part["is_target"].gather(0, first)[0]
    return found
