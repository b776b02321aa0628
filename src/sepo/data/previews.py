"""What of a prompt people need to see: not the system message and the control tokens that all prompts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def previews(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The text of each prompt without what it begins and ends with as most do."""
    rows = [list(prompt) for prompt in prompts]
    special = set(tokenizer.all_special_ids)

    def is_boundary(token: int) -> bool:
        return token in special or "\n" in tokenizer.decode([token])

    starts = common_starts(rows, is_boundary)
    ends = common_starts([row[::-1] for row in rows], is_boundary)
    return [
        str(tokenizer.decode(row[start : len(row) - end] if start + end < len(row) else row, skip_special_tokens=True))
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]


def common_starts(prompts: list[list[int]], is_boundary: Callable[[int], bool]) -> list[int]:
    """How many tokens at the start of each prompt are what most prompts begin with: a preview leaves them out.

    Counted to the last boundary (a control token or a newline), so that prompts which merely begin with the
    same words keep them. A prompt that begins otherwise, such as one cut off at the left, counts 0.
    """
    distinct = sorted({tuple(prompt) for prompt in prompts})
    if len(distinct) < 2:
        return [0] * len(prompts)
    # What more than half begin with, the one in the middle of the sorted prompts begins with.
    middle = distinct[len(distinct) // 2]

    def shared(prompt: Sequence[int]) -> int:
        differs = (i for i, (one, other) in enumerate(zip(prompt, middle, strict=False)) if one != other)
        return next(differs, min(len(prompt), len(middle)))

    count = sorted(map(shared, distinct), reverse=True)[len(distinct) // 2]
    while count and not is_boundary(middle[count - 1]):
        count -= 1
    return [count if shared(prompt) >= count else 0 for prompt in prompts]
