"""Previews of prompts for people, without the system message and the control tokens that all prompts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sepo.data.vocabulary import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def previews(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The text of each prompt without the beginning and end that most prompts share."""
    rows = [list(prompt) for prompt in prompts]
    special = special_ids(tokenizer)

    def is_boundary(token: int) -> bool:
        return token in special or "\n" in tokenizer.decode([token])

    starts = common_starts(rows, is_boundary)
    ends = common_starts([row[::-1] for row in rows], is_boundary)
    return [
        str(tokenizer.decode(row[start : len(row) - end] if start + end < len(row) else row, skip_special_tokens=True))
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]


def common_starts(prompts: list[list[int]], is_boundary: Callable[[int], bool]) -> list[int]:
    """Number of tokens at the start of each prompt that most prompts share.

    The count ends at a boundary (a control token or a newline), so that prompts which merely begin with the same words
    keep these words. A prompt with another beginning, such as one cut on the left, counts 0.
    """
    distinct = sorted({tuple(prompt) for prompt in prompts})
    if len(distinct) < 2:
        return [0] * len(prompts)
    # A beginning that more than half share is also that of the middle one of the sorted prompts.
    middle = distinct[len(distinct) // 2]

    def shared(prompt: Sequence[int]) -> int:
        differs = (i for i, (a, b) in enumerate(zip(prompt, middle, strict=False)) if a != b)
        return next(differs, min(len(prompt), len(middle)))

    count = sorted(map(shared, distinct), reverse=True)[len(distinct) // 2]
    while count and not is_boundary(middle[count - 1]):
        count -= 1
    return [count if shared(prompt) >= count else 0 for prompt in prompts]
