"""Which layout a model takes: tried out, not believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import UserError
from sepo.forward.attention import ATTENTION
from sepo.forward.layers import use_fast_layers
from sepo.forward.logps import token_logps
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch, Pair, pack, pad
from sepo.models.adapters import causal_lm


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
    if layout not in ("auto", "packed", "padded"):
        raise UserError(f"layout is '{layout}': expected auto, packed or padded")
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
