"""What a model can read: ids below its number of embeddings, and so many positions."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

# Parameters and buffers with a row for each position, and architectures that make such a table as they go.
_TABLE = re.compile(r"wpe|embed_positions|pos(ition)?s?_?embed")
_TABLE_AS_THEY_GO = ("ctrl", "mpt")


class Limits(NamedTuple):
    """Ids below `vocabulary`; sequences up to `positions` (None: any). `firm`: there is no position beyond."""

    vocabulary: int
    positions: int | None
    firm: bool


def model_limits(config: PreTrainedConfig) -> Limits:
    """The limits of a model, from its config alone.

    Rotary positions go on beyond those that a model was trained with, and it extrapolates. Tables of positions, learned
    or of sines, end. Recurrent models and ALiBi have no limit.
    """
    text = config.get_text_config()
    places = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((value for name in places if isinstance(value := getattr(text, name, None), int)), 0)
    if positions <= 0 or getattr(text, "alibi", False):
        return Limits(text.vocab_size, None, False)
    if text.model_type in _TABLE_AS_THEY_GO:
        return Limits(text.vocab_size, positions, True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if any(_TABLE.search(name) and max(tensor.shape, default=0) >= positions for name, tensor in tensors):
        # XGLM makes its table of sines longer when it has to.
        return Limits(text.vocab_size, None if text.model_type == "xglm" else positions, text.model_type != "xglm")
    rotary = getattr(text, "rope_parameters", None) is not None
    return Limits(text.vocab_size, positions if rotary else None, False)
