"""The words of a response, and the word of each token."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from sepo.data.vocabulary import special_ids


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

    Special tokens separate words.

    Returns:
        words, and for each token the index of the first word that it has a character of, or -1: `[tokens]` int64.
    """
    special = special_ids(tokenizer)
    owners: list[int] = []  # the token of each character of `text`; for a joined piece the first token
    counts: list[int] = []  # by token: the number of tokens in its piece, 0 for all but the first
    text = ""
    at = 0
    for count, piece in token_pieces(tokenizer, ids):
        if any(token in special for token in ids[at : at + count]):
            piece = " "
        text += piece
        owners.extend([at] * len(piece))
        counts.extend([count] + [0] * (count - 1))
        at += count

    words: list[str] = []
    index = np.full(len(ids), -1, dtype=np.int64)
    for start, word in text_words(text):
        for token in dict.fromkeys(owners[start : start + len(word)]):
            span = index[token : token + counts[token]]
            span[span < 0] = len(words)
        words.append(word)
    return words, index


def word_valences(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], valence: Callable[[str], float]
) -> np.ndarray:
    """Return the valence of each token's word, `[tokens]` float64: 0 for neutral words, NaN outside words."""
    words, index = token_words(tokenizer, ids)
    values = np.array([valence(word) for word in words] + [np.nan])  # index -1 reads the last
    return values[index]
