"""The words of a response, the word of each token, and what each token is worth by a known truth."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from sepo.data.vocabulary import special_ids


class Unit(NamedTuple):
    """A part of a response that a truth values: a word or a number, from character `start` to `stop`.

    Attributes:
        value: above 0 if the unit raises the gold reward, below 0 if it lowers it, 0 if it is neutral.
    """

    start: int
    stop: int
    value: float


# (question, response) -> the units of the response, in order.
Truth: TypeAlias = Callable[[str, str], Iterable[Unit]]


def text_words(text: str) -> Iterator[tuple[int, str]]:
    """Find the words of a text, each with the index of its first character.

    As in VADER, words are separated by whitespace and stripped of the ASCII punctuation around them. A word has at
    least one letter.

    >>> list(text_words('"Well," she said - 3 times.'))
    [(1, 'Well'), (8, 'she'), (12, 'said'), (21, 'times')]
    """
    position = 0
    for chunk in text.split():
        position = text.index(chunk, position)
        word = chunk.strip(string.punctuation)
        if any(character.isalpha() for character in word):
            yield position + chunk.index(word), word
        position += len(chunk)


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Split the text of `ids` into (number of tokens, text) pieces, most of them one token long.

    Tokens that hold only part of a character (byte-level vocabularies, emoji, CJK) are joined until the character is
    complete. A piece is the text that it adds when decoded after the piece before it. So markers of a leading space are
    right for every kind of tokenizer, and the cost is linear.
    """

    def text(start: int, stop: int) -> str:
        part = list(ids[start:stop])
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    context, done = 0, 0
    before = ""
    for stop in range(1, len(ids) + 1):
        after = text(context, stop)
        if after.endswith("\ufffd") and stop < len(ids):
            continue  # an incomplete character; at the end of a response it stays incomplete
        yield stop - done, after[len(before) :]
        context, done = done, stop
        before = text(context, done)


def token_words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Find the words of a response (`text_words`) and the word that each token belongs to.

    Returns:
        words, and for each token the index of the first word that it has a character of, or -1: `[tokens]` int64.
    """
    text, owners, counts = _characters(tokenizer, ids)
    words = list(text_words(text))
    return [word for _, word in words], _first_unit([(at, at + len(word)) for at, word in words], owners, counts)


def token_values(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], truth: Truth, question: str = ""
) -> np.ndarray:
    """Return the value of each token's unit, `[tokens]` float64; NaN for tokens outside all units.

    A token with characters of several units has the value of the first.
    """
    text, owners, counts = _characters(tokenizer, ids)
    units = list(truth(question, text))
    values = np.array([unit.value for unit in units] + [np.nan])  # index -1 reads the last
    return values[_first_unit([unit[:2] for unit in units], owners, counts)]


def _characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int], list[int]]:
    """The text of a response; by character its token, the first of a joined piece; by token the tokens of its piece.

    Special tokens become spaces, so that they separate words.
    """
    special = special_ids(tokenizer)
    owners: list[int] = []
    counts: list[int] = []  # 0 for all but the first token of a piece
    text = ""
    at = 0
    for count, piece in token_pieces(tokenizer, ids):
        if any(token in special for token in ids[at : at + count]):
            piece = " "
        text += piece
        owners.extend([at] * len(piece))
        counts.extend([count] + [0] * (count - 1))
        at += count
    return text, owners, counts


def _first_unit(spans: Sequence[tuple[int, int]], owners: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """For each token the first span that it has a character of, or -1: `[tokens]` int64."""
    index = np.full(len(counts), -1, dtype=np.int64)
    for number, (start, stop) in enumerate(spans):
        for token in dict.fromkeys(owners[start:stop]):
            span = index[token : token + counts[token]]
            span[span < 0] = number
    return index


def word_truth(valence: Callable[[str], float]) -> Truth:
    """The truth whose units are words, each with its `valence` wherever it stands."""
    return lambda question, text: (Unit(at, at + len(word), valence(word)) for at, word in text_words(text))
