"""The same responses as two tokenizers cut them: where the cuts of both lie on one axis.

The axis of a response is its text in bytes, and one unit more for the token that ends it. Most often both tokenizers
write the same bytes, and a cut lies where it lies. Where they do not, the first of these forms in which the two texts
agree gives the axis, and a cut inside something that a form changes is put in proportion:

    same        the bytes as they are
    ends        without white space at both ends: a template trims it, a "▁" stands before the first word
    normal      as NFKC writes it, and "▁" as the space it stands for: Qwen normalises (NFC), T5 and XLM-R do (NFKC)
    letters     as NFKD in lower case without accents and white space: WordPiece, or a "▁" put inside

A response that is not ended was cut to a length: the shorter text must be how the longer one begins. Texts that
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
_END = 0xFF  # for the token that ends a response; no UTF-8 text holds this byte


class Texts(NamedTuple):
    """Responses as tokens of bytes, one after the other.

    Attributes:
        data: `[bytes]` uint8; the token that ends a response is one byte 0xFF.
        tokens: `[tokens]`, the number of bytes of each.
        lengths: `[responses]`, the number of tokens of each.
        readable: `[responses]`, whether all of its tokens stand for known bytes.
    """

    data: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    readable: np.ndarray


class Alignment(NamedTuple):
    """The cuts of tokenizers A and B on the common axis of each response.

    Attributes:
        form: `[responses]`, the number of the form of `FORMS` in which the texts agree, `DIFFERENT` or `UNREADABLE`
            (a token stands for no bytes); what the others say of such a response means nothing.
        ends_a: `[tokens of A]` float64, where each token ends, from 0 at the start of the own response.
        ends_b: `[tokens of B]` float64.
        scored: `[responses]`, the number of tokens of B, from the first, that lie within what A has tokens for.
    """

    form: np.ndarray
    ends_a: np.ndarray
    ends_b: np.ndarray
    scored: np.ndarray


def response_texts(ids: np.ndarray, lengths: np.ndarray, read: TokenBytes, end_ids: list[int]) -> Texts:
    """Responses as bytes.

    Args:
        ids: `[tokens]`, all responses one after the other.
        lengths: `[responses]`, tokens of each.
        read: of the tokenizer.
        end_ids: tokens that end a response, where they stand last.
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
    """Put the cuts of the same responses under two tokenizers on one axis."""
    ends_a, sizes_a = _own_ends(a)
    ends_b, sizes_b = _own_ends(b)
    form = np.where(a.readable & b.readable, DIFFERENT, UNREADABLE)
    form[(form == DIFFERENT) & _same_bytes(a.data, sizes_a, b.data, sizes_b)] = FORMS.index("same")
    starts = [np.cumsum(counts) - counts for counts in (sizes_a, a.lengths, sizes_b, b.lengths)]
    for row in np.flatnonzero(form == DIFFERENT):
        byte_a, token_a, byte_b, token_b = (int(start[row]) for start in starts)
        one = a.data[byte_a : byte_a + sizes_a[row]].tobytes()
        other = b.data[byte_b : byte_b + sizes_b[row]].tobytes()
        if (found := _first_form(one, other)) is None:
            continue
        form[row], map_a, map_b = found
        for ends, start, count, place in (
            (ends_a, token_a, a.lengths[row], map_a), (ends_b, token_b, b.lengths[row], map_b),
        ):  # fmt: skip
            segment = slice(start, start + count)
            ends[segment] = place(ends[segment])
    rows = np.repeat(np.arange(len(b.lengths)), b.lengths)
    last = last_of(ends_a, a.lengths)[rows]
    begins = begins_of(ends_b, b.lengths)
    # A token without room after all that A scored (white space, where the form has none) was not scored either.
    inside = (ends_b <= last) & (begins < last)
    return Alignment(form, ends_a, ends_b, np.bincount(rows[inside], minlength=len(b.lengths)))


def last_of(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The last value of each segment `[segments]`; 0 of an empty one."""
    last = np.zeros(len(lengths), values.dtype)
    last[lengths > 0] = values[np.cumsum(lengths)[lengths > 0] - 1]
    return last


def begins_of(ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Where each token begins: where the one before it in its response ends, or at 0: `[tokens]`."""
    begins = np.concatenate([[0.0], ends])[:-1]
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = 0.0
    return begins


def _own_ends(texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Where each token ends in its own response `[tokens]` float64, and the bytes of each response `[responses]`."""
    total = np.concatenate([[0], np.cumsum(texts.tokens)])
    last = np.cumsum(texts.lengths)
    before = total[last - texts.lengths]
    return (total[1:] - np.repeat(before, texts.lengths)).astype(np.float64), total[last] - before


def _same_bytes(one: np.ndarray, sizes: np.ndarray, other: np.ndarray, other_sizes: np.ndarray) -> np.ndarray:
    """Which responses have the same bytes `[responses]` bool."""
    same = sizes == other_sizes
    rows = np.repeat(np.arange(len(sizes))[same], sizes[same])
    differ = one[np.repeat(same, sizes)] != other[np.repeat(same, other_sizes)]
    return same & (np.bincount(rows[differ], minlength=len(sizes)) == 0)


class _Form(NamedTuple):
    """A text in one form.

    Attributes:
        text: in bytes.
        own, axis: knots of the map from places in the bytes as they were to places in `text`, both ascending.
    """

    text: bytes
    own: np.ndarray
    axis: np.ndarray


def _first_form(one: bytes, other: bytes) -> tuple[int, Callable, Callable] | None:
    """The first form in which two texts agree, and the maps of the places in each to the axis; None if in none."""
    bodies = [text.removesuffix(bytes([_END])) for text in (one, other)]
    ended = [len(body) < len(text) for body, text in zip(bodies, (one, other), strict=True)]
    for number, form in enumerate((_as_it_is, _without_ends, _normal, _letters)):
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
    """From places in a text of `size` bytes, and one more for its end, to the axis."""

    def place(ends: np.ndarray) -> np.ndarray:
        return np.where(ends > size, len(form.text) + 1, np.interp(ends, form.own, form.axis))

    return place


def _as_it_is(text: bytes) -> _Form:
    places = np.array([0, len(text)])
    return _Form(text, places, places)


def _without_ends(text: bytes) -> _Form:
    kept = text.strip()
    start = len(text) - len(text.lstrip())
    return _Form(kept, np.array([0, start, start + len(kept)]), np.array([0, 0, len(kept)]))


def _normal(text: bytes) -> _Form:
    form = _in_clusters(text, lambda cluster: unicodedata.normalize("NFKC", cluster.replace("▁", " ")))
    kept, start = form.text.strip(), len(form.text) - len(form.text.lstrip())
    return _Form(kept, form.own, np.clip(form.axis - start, 0, len(kept)))


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
    """Change a text cluster by cluster: a character with the marks that may be composed with it."""
    clusters: list[str] = []
    for character in text.decode("utf-8", "surrogateescape"):
        if clusters and _goes_on(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    own, parts = [0], []
    known: dict[str, bytes] = {}
    for cluster in clusters:
        own.append(len(cluster.encode("utf-8", "surrogateescape")))
        if cluster not in known:
            known[cluster] = change(cluster).encode("utf-8", "surrogateescape")
        parts.append(known[cluster])
    return _Form(b"".join(parts), np.cumsum(own), np.cumsum([0, *map(len, parts)]))


def _goes_on(character: str) -> bool:
    """May a character be composed with the one before: a mark, or a vowel or final of Hangul?"""
    if character < "\u0300":
        return False
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
