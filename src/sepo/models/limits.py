"""Limits of a model: token ids below its number of embeddings, and a number of positions."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sepo.data.ragged import SIDES, flat, read_lengths
from sepo.errors import UserError, one_line
from sepo.processes import log_once

# Names of parameters and buffers with a row for each position, and architectures that compute such a table.
_TABLE = re.compile(r"wpe|embed_positions|pos(ition)?s?_?embed")
_COMPUTE_TABLE = ("ctrl", "mpt")


class ModelLimits(NamedTuple):
    """Ids below `vocabulary`; sequences up to `positions` (None: any). `firm`: the model fails on longer sequences."""

    vocabulary: int
    positions: int | None
    firm: bool


def model_limits(model: PreTrainedModel | PreTrainedConfig) -> ModelLimits:
    """The limits of a model, or of the model of a config, which is created on "meta".

    With rotary positions a model extrapolates beyond its trained positions. Tables of positions, learned or sines, are
    finite. Recurrent models and ALiBi have no limit.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)
    if positions <= 0 or getattr(text, "alibi", False):
        return ModelLimits(text.vocab_size, None, False)
    if text.model_type in _COMPUTE_TABLE:
        return ModelLimits(text.vocab_size, positions, True)
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if any(_TABLE.search(name) and max(tensor.shape, default=0) >= positions for name, tensor in tensors):
        # XGLM extends its table of sines.
        return ModelLimits(text.vocab_size, None if text.model_type == "xglm" else positions, text.model_type != "xglm")
    rotary = getattr(text, "rope_parameters", None) is not None
    return ModelLimits(text.vocab_size, positions if rotary else None, False)


def check_ids(
    table: pa.Table, name: str, limits: ModelLimits, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise a UserError if a table of pairs holds an id without an embedding in the model.

    Args:
        name: the user's name for the model.
        tokenizer: names the token in the message.
    """
    for part in ("prompt", *SIDES, *(f"{side}_context" for side in SIDES)):
        if f"{part}_ids" not in table.column_names:
            continue
        ids, _ = flat(table.column(f"{part}_ids"))
        if len(ids) and (largest := int(ids.max())) >= limits.vocabulary:
            token = "" if tokenizer is None else f" '{one_line(tokenizer.convert_ids_to_tokens(largest), 40)}'"
            raise UserError(
                f"a {part} holds the token{token} with id {largest}, but '{name}' has {limits.vocabulary} embeddings: "
                "tokens were added to its tokenizer only; resize the embeddings and train them, or remove the tokens"
            )


def check_lengths(table: pa.Table, name: str, limits: ModelLimits, answers: int = 0) -> None:
    """Raise a UserError if pairs are longer than a model can read; log a line if the model would extrapolate.

    Args:
        answers: check the prompts with so many generated tokens; 0 checks the pairs.
    """
    if limits.positions is None or not len(table):
        return
    prompts = flat(table.column("prompt_ids"))[1]
    lengths = prompts + (answers or np.maximum(*(read_lengths(table, side) for side in SIDES)))
    beyond = int((lengths > limits.positions).sum())
    if not beyond:
        return
    what = f"prompts with eval.max_new_tokens {answers:,}" if answers else "pairs"
    text = (
        f"{beyond:,} of {len(table):,} {what} are longer than the {limits.positions:,} positions of '{name}', the "
        f"longest by {int(lengths.max()) - limits.positions:,} tokens"
    )
    remedy = "lower eval.max_new_tokens" if answers else f"set data.max_length to {limits.positions}"
    if limits.firm:
        raise UserError(f"{text}: {remedy}")
    log_once(f"  {text}: it extrapolates unless you {remedy}")
