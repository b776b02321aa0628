"""Token boundaries of the same responses under two tokenizers, mapped to one axis.

The axis of a response is its text in bytes, plus one unit for the token that ends it. Usually both tokenizers give the
same bytes, and a boundary is a byte position. Otherwise the first of these forms in which both texts agree is the axis.
A boundary inside text that a form changes is interpolated.

    same        the bytes unchanged
    ends        without white space at both ends: templates trim it, and a "▁" may precede the first word
    normal      NFKC, with "▁" as a space: Qwen normalises (NFC), T5 and XLM-R (NFKC)
    letters     NFKD in lower case without accents and white space: WordPiece, or an inserted "▁"

A response without an end token was truncated: the shorter text must be the beginning of the longer one. Texts that
agree in no form are different texts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sepo.credit.selection import ends_response
from sepo.data.vocabulary import TokenBytes

FORMS = ("same", "ends", "normal", "letters")
DIFFERENT, UNREADABLE = -1, -2
_END = 0xFF  # marks the token that ends a response; UTF-8 never has this byte


class Texts(NamedTuple):
    """The bytes of all responses, concatenated.

    Attributes:
        data: `[bytes]` uint8; the token that ends a response is one byte 0xFF.
        tokens: `[tokens]`, number of bytes of each token.
        lengths: `[responses]`, number of tokens of each response.
        readable: `[responses]`, whether all tokens have known bytes.
    """

    data: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    readable: np.ndarray


class Alignment(NamedTuple):
    """Token boundaries of tokenizers A and B on the common axis of each response.

    Attributes:
        form: `[responses]`, index in `FORMS` of the form in which the texts agree, `DIFFERENT`, or `UNREADABLE` (a
            token has no known bytes). The other attributes are meaningless for `DIFFERENT` and `UNREADABLE`.
        ends_a: `[tokens of A]` float64, the end of each token; the response starts at 0.
        ends_b: `[tokens of B]` float64.
        scored: `[responses]`, number of first tokens of B within the text that A's tokens cover.
    """

    form: np.ndarray
    ends_a: np.ndarray
    ends_b: np.ndarray
    scored: np.ndarray


def response_texts(ids: np.ndarray, lengths: np.ndarray, read: TokenBytes, end_ids: list[int]) -> Texts:
    """The bytes of responses.

    Args:
        ids: `[tokens]`, all responses concatenated.
        lengths: `[responses]`, tokens of each response.
        read: maps ids of the tokenizer to bytes.
        end_ids: ids that end a response if they are last.
    """
    data, counts = read(ids)
    known = read.known(ids)
    ended = ends_response(ids, lengths, end_ids)
    if ended.any():
        known[ended] = True
        kept = np.repeat(~ended, counts)
        marks = (np.cumsum(np.where(ended, 0, counts)))[ended]
        data = np.insert(data[kept], marks, np.uint8(_END))
        counts = np.where(ended, 1, counts)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    unknown = np.bincount(rows[~known], minlength=len(lengths))
    return Texts(data, counts, lengths, unknown == 0)


def align(a: Texts, b: Texts) -> Alignment:
    """Map the token boundaries of the same responses under two tokenizers to one axis."""
    ends_a, sizes_a = _byte_ends(a)
    ends_b, sizes_b = _byte_ends(b)
    form = np.where(a.readable & b.readable, DIFFERENT, UNREADABLE)
    form[(form == DIFFERENT) & equal_segments(a.data, sizes_a, b.data, sizes_b)] = FORMS.index("same")
    starts = [np.cumsum(counts) - counts for counts in (sizes_a, a.lengths, sizes_b, b.lengths)]
    for row in np.flatnonzero(form == DIFFERENT):
        byte_a, token_a, byte_b, token_b = (int(start[row]) for start in starts)
        text_a = a.data[byte_a : byte_a + sizes_a[row]].tobytes()
        text_b = b.data[byte_b : byte_b + sizes_b[row]].tobytes()
        if (agreement := _first_form(text_a, text_b)) is None:
            continue
        form[row], map_a, map_b = agreement
        for ends, start, count, place in (
            (ends_a, token_a, a.lengths[row], map_a), (ends_b, token_b, b.lengths[row], map_b),
        ):  # fmt: skip
            segment = slice(start, start + count)
            ends[segment] = place(ends[segment])
    rows = np.repeat(np.arange(len(b.lengths)), b.lengths)
    last = last_of(ends_a, a.lengths)[rows]
    begins = begins_of(ends_b, b.lengths)
    # A token of no width at the end of A's text (white space that the form removes) was not scored.
    inside = (ends_b <= last) & (begins < last)
    return Alignment(form, ends_a, ends_b, np.bincount(rows[inside], minlength=len(b.lengths)))


def align_turns(a: Texts, b: Texts, turns_a: np.ndarray, turns_b: np.ndarray) -> Alignment:
    """`align` turn by turn: the axis of a response is that of its assistant turns, one after the other.

    Every turn that both tokenizers have but the last must be the same text as a whole. Turns that only A has, because
    B's response was truncated, follow on the axis; those that only B has are not scored.

    Args:
        a, b: the turns of all responses.
        turns_a, turns_b: number of turns of each response `[responses]`, 1 or more.
    """
    turns = np.minimum(turns_a, turns_b)
    in_a, in_b = first_of(turns_a, turns), first_of(turns_b, turns)
    of_a, of_b = np.repeat(in_a, a.lengths), np.repeat(in_b, b.lengths)
    part = align(_some(a, in_a), _some(b, in_b))
    ends_a, ends_b = _byte_ends(a)[0], _byte_ends(b)[0]
    ends_a[of_a], ends_b[of_b] = part.ends_a, part.ends_b
    sizes = last_of(ends_a, a.lengths)
    starts = np.cumsum(turns_a) - turns_a
    before = np.cumsum(sizes) - sizes
    before -= np.repeat(before[starts], turns_a)
    ends_a += np.repeat(before, a.lengths)
    ends_b[of_b] += np.repeat(before[in_a], b.lengths[in_b])
    last = np.zeros(int(turns.sum()), bool)
    last[np.cumsum(turns) - 1] = True
    whole = last_of(part.ends_b, b.lengths[in_b]) == sizes[in_a]
    form = np.where((part.form >= 0) & ~last & ~whole, DIFFERENT, part.form)
    scored = np.where(last, part.scored, b.lengths[in_b])
    first = np.cumsum(turns) - turns
    least, most = np.minimum.reduceat(form, first), np.maximum.reduceat(form, first)
    return Alignment(np.where(least < 0, least, most), ends_a, ends_b, np.add.reduceat(scored, first))


def _some(texts: Texts, kept: np.ndarray) -> Texts:
    """The texts that are `kept` `[responses]` bool."""
    of_tokens = np.repeat(kept, texts.lengths)
    data = texts.data[np.repeat(of_tokens, texts.tokens)]
    return Texts(data, texts.tokens[of_tokens], texts.lengths[kept], texts.readable[kept])


def first_of(lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mark the first `kept` items of each segment `[items]` bool."""
    position = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return position < np.repeat(kept, lengths)


def last_of(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The last value of each segment `[segments]`; 0 for an empty segment."""
    last = np.zeros(len(lengths), values.dtype)
    last[lengths > 0] = values[np.cumsum(lengths)[lengths > 0] - 1]
    return last


def begins_of(ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The beginning of each token: the end of the previous token of its response, or 0: `[tokens]`."""
    begins = np.concatenate([[0.0], ends])[:-1]
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = 0.0
    return begins


def _byte_ends(texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """The end of each token in its response `[tokens]` float64, and the bytes of each response `[responses]`."""
    total = np.concatenate([[0], np.cumsum(texts.tokens)])
    last = np.cumsum(texts.lengths)
    before = total[last - texts.lengths]
    return (total[1:] - np.repeat(before, texts.lengths)).astype(np.float64), total[last] - before


def equal_segments(a: np.ndarray, lengths_a: np.ndarray, b: np.ndarray, lengths_b: np.ndarray) -> np.ndarray:
    """Which segments of two flat arrays are equal `[segments]` bool."""
    same = lengths_a == lengths_b
    rows = np.repeat(np.arange(len(lengths_a))[same], lengths_a[same])
    differ = a[np.repeat(same, lengths_a)] != b[np.repeat(same, lengths_b)]
    return same & (np.bincount(rows[differ], minlength=len(lengths_a)) == 0)


class _Form(NamedTuple):
    """A text in one form.

    Attributes:
        text: the bytes in this form.
        original, axis: knots of the map from positions in the original bytes to positions in `text`, both ascending.
    """

    text: bytes
    original: np.ndarray
    axis: np.ndarray


def _first_form(a: bytes, b: bytes) -> tuple[int, Callable, Callable] | None:
    """The first form in which two texts agree, and the maps from each text to the axis; None if there is none."""
    bodies = [text.removesuffix(bytes([_END])) for text in (a, b)]
    ended = [len(body) < len(text) for body, text in zip(bodies, (a, b), strict=True)]
    for number, form in enumerate((_unchanged, _without_ends, _normal, _letters)):
        x, y = (form(body) for body in bodies)
        if _agree(x.text, ended[0], y.text, ended[1]):
            return number, _map(x, len(bodies[0])), _map(y, len(bodies[1]))
    return None


def _agree(x: bytes, x_ended: bool, y: bytes, y_ended: bool) -> bool:
    if len(x) == len(y):
        return x == y
    short, long, short_ended = (x, y, x_ended) if len(x) < len(y) else (y, x, y_ended)
    return not short_ended and bool(short) and long.startswith(short)


def _map(form: _Form, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """The map from positions in a text of `size` bytes, plus one for its end, to the axis."""

    def place(ends: np.ndarray) -> np.ndarray:
        return np.where(ends > size, len(form.text) + 1, np.interp(ends, form.original, form.axis))

    return place


def _unchanged(text: bytes) -> _Form:
    positions = np.array([0, len(text)])
    return _Form(text, positions, positions)


def _without_ends(text: bytes) -> _Form:
    kept = text.strip()
    start = len(text) - len(text.lstrip())
    return _Form(kept, np.array([0, start, start + len(kept)]), np.array([0, 0, len(kept)]))


def _normal(text: bytes) -> _Form:
    form = _in_clusters(text, lambda cluster: unicodedata.normalize("NFKC", cluster.replace("▁", " ")))
    kept, start = form.text.strip(), len(form.text) - len(form.text.lstrip())
    return _Form(kept, form.original, np.clip(form.axis - start, 0, len(kept)))


def _letters(text: bytes) -> _Form:
    if not text.isascii():
        return _in_clusters(text, _letters_of)
    kept = text.translate(_LOWER, _DROPPED)
    counted = np.cumsum(~np.isin(np.frombuffer(text, np.uint8), np.frombuffer(_DROPPED, np.uint8)))
    return _Form(kept, np.arange(len(text) + 1), np.concatenate([[0], counted]))


_LOWER = bytes(range(256)).lower()
_DROPPED = bytes([*range(33), 127])  # white space and controls


def _letters_of(cluster: str) -> str:
    cluster = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", cluster).casefold())
    return "".join(
        c for c in cluster if not c.isspace() and c != "▁" and unicodedata.category(c) not in ("Mn", "Cc", "Cf")
    )


def _in_clusters(text: bytes, change: Callable[[str], str]) -> _Form:
    """Change a text cluster by cluster; a cluster is a character with the marks that may compose with it."""
    clusters: list[str] = []
    for character in text.decode("utf-8", "surrogateescape"):
        if clusters and _composes(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    sizes, parts = [0], []
    known: dict[str, bytes] = {}
    for cluster in clusters:
        sizes.append(len(cluster.encode("utf-8", "surrogateescape")))
        if cluster not in known:
            known[cluster] = change(cluster).encode("utf-8", "surrogateescape")
        parts.append(known[cluster])
    return _Form(b"".join(parts), np.cumsum(sizes), np.cumsum([0, *map(len, parts)]))


def _composes(character: str) -> bool:
    """May a character compose with the previous one (a mark, or a vowel or final of Hangul)?"""
    if character < "\u0300":
        return False
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
