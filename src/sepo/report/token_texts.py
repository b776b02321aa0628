"""Readable text for token ids, whatever the tokenizer and whatever the text.

A token is a string of bytes, often not of whole characters: a space and a word, half an emoji, a newline, a control
character. Each token of a response gets a `TokenText`:

    text     what the token adds to the response; search looks through it
    shown    what the page prints; `MARK_ON…MARK_OFF` encloses a stand-in for something invisible:
             · (space), ↵ (newline), ⟨0xE4⟩ (a byte), ⟨U+202E⟩ (a control character)
    label    the token by itself, for the tooltip

The token that completes a character prints it; the tokens before show their bytes: ⟨0xE4⟩⟨0xB8⟩世. `shown` has no
invisible character and no bidirectional control, so a token can neither hide nor reorder its surroundings. Equal token
texts are stored once: 974,000 tokens of AlpacaEval responses have 29,000 of them.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sepo.data.vocabulary import Vocabulary
from sepo.errors import UserError

MARK_ON, MARK_OFF = "\x01", "\x02"
_SPACE_MARK, _WIDE_SPACE_MARK, _NEWLINE_MARK, _TAB_MARK = "·", "␣", "↵", "⇥"
# Characters that print nothing, though Unicode does not class them as controls or formats.
_BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
_JOINERS = {0x200C, 0x200D}
_UNMARK = str.maketrans("", "", MARK_ON + MARK_OFF)
_LABEL = str.maketrans(" ", _SPACE_MARK, MARK_ON + MARK_OFF + "\n\t")


class TokenText(NamedTuple):
    """How a token is printed."""

    token_id: int
    text: str
    shown: str
    label: str


def mark(text: str) -> str:
    return f"{MARK_ON}{text}{MARK_OFF}" if text else ""


def _hex(data: bytes) -> str:
    return mark("".join(f"⟨0x{byte:02X}⟩" for byte in data))


def _is_selector(code: int) -> bool:
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF


def _visible_character(character: str, after_visible: bool) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8; `surrogateescape` decodes it so
        return _hex(bytes([code - 0xDC00]))
    if (code in _JOINERS or _is_selector(code)) and after_visible:
        return character  # part of a written character: an emoji sequence, a Persian word
    category = unicodedata.category(character)
    if category == "Zs":
        return mark(_WIDE_SPACE_MARK)
    if category in {"Cc", "Cf", "Cs", "Zl", "Zp"} or code in _BLANK or _is_selector(code):
        return mark(f"⟨U+{code:04X}⟩")
    return character


def visible(text: str) -> str:
    """Mark every character that is invisible or would move its surroundings.

    A single space between words stays a space; spaces alone, in runs or at an end become marks. A newline is
    marked and kept, so lines still break.

    >>> visible(" the").replace(MARK_ON, "[").replace(MARK_OFF, "]")
    ' the'
    >>> visible("  \\u202ea\\n").replace(MARK_ON, "[").replace(MARK_OFF, "]")
    '[·][·][⟨U+202E⟩]a[↵]\\n'
    """
    out = []
    for i, character in enumerate(text):
        if character == " ":
            lone = not text[i - 1 : i].isspace() and not (text[i + 1 : i + 2] or " ").isspace()
            out.append(" " if lone else mark(_SPACE_MARK))
        elif character == "\n":
            out.append(mark(_NEWLINE_MARK) + "\n")
        elif character == "\t":
            out.append(mark(_TAB_MARK) + "\t")
        elif character.isascii() and character.isprintable():
            out.append(character)
        else:
            after_visible = i > 0 and not text[i - 1].isspace() and unicodedata.category(text[i - 1])[0] != "C"
            out.append(_visible_character(character, after_visible))
    return "".join(out)


def _whole_token(token_id: int, data: bytes, special: bool) -> TokenText | None:
    """The text of a token of whole characters; None if it holds part of a character."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    shown = visible(text)
    if special:
        shown = mark(shown.translate(_UNMARK))
    return TokenText(token_id, text, shown, shown.translate(_LABEL))


def _split_tokens(ids: Iterable[int], vocabulary: Vocabulary) -> list[TokenText]:
    """The token texts of a response in which some tokens hold parts of characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    texts = []
    for token_id in ids:
        data = vocabulary.pieces[token_id] or b""
        carried = len(decoder.getstate()[0])
        text = decoder.decode(data)
        pending = decoder.getstate()[0]
        # Earlier tokens showed the bytes that they carried over, so bytes that never complete are not shown again.
        broken = 0
        while broken < carried and text[broken : broken + 1] and 0xDC80 <= ord(text[broken]) <= 0xDCFF:
            broken += 1
        text = text[broken:]
        whole = None
        if carried == 0 or broken == carried or token_id in vocabulary.special:
            whole = _whole_token(token_id, data, token_id in vocabulary.special)
        if whole is not None:
            texts.append(whole)
            continue
        unfinished = pending[max(0, len(pending) - len(data)) :]
        searched = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        label = "".join(f"⟨0x{byte:02X}⟩" for byte in data)
        texts.append(TokenText(token_id, searched, visible(text) + _hex(unfinished), label))
    return texts


@dataclass
class TokenTexts:
    """Token texts, each stored once, in the order of first use.

    `encode` maps token ids to numbers in `texts`; without a vocabulary a token is printed as its id.
    """

    vocabulary: Vocabulary | None
    texts: list[TokenText] = field(default_factory=list)
    _number: dict[TokenText, int] = field(default_factory=dict)
    _whole: dict[int, int] = field(default_factory=dict)

    def _intern(self, text: TokenText) -> int:
        number = self._number.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number

    def _number_of_whole(self, token_id: int) -> int:
        """The number of the text of a token of whole characters; -1 for part of a character."""
        if token_id not in self._whole:
            self._whole[token_id] = self._look_up(token_id)
        return self._whole[token_id]

    def _look_up(self, token_id: int) -> int:
        if self.vocabulary is None:
            return self._intern(TokenText(token_id, "", mark(f"⟨{token_id}⟩"), f"⟨{token_id}⟩"))
        if not 0 <= token_id < len(self.vocabulary.pieces) or self.vocabulary.pieces[token_id] is None:
            raise UserError(
                f"the tokenizer has no token {token_id}, which the score table holds: "
                "give the folder of the tokenizer that the table was made with"
            )
        text = _whole_token(token_id, self.vocabulary.pieces[token_id] or b"", token_id in self.vocabulary.special)
        return -1 if text is None else self._intern(text)

    def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Map token ids `[tokens]`, in responses of `lengths` tokens, to numbers of their texts `[tokens]`.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        # Frequent tokens first: small numbers for most of the text compress better.
        by_count = np.argsort(-counts, kind="stable")
        numbers = np.empty(len(distinct), dtype=np.int64)
        for i in by_count:
            numbers[i] = self._number_of_whole(int(distinct[i]))
        out = numbers[inverse].reshape(-1)
        ends = np.cumsum(lengths)
        partial = np.unique(np.searchsorted(ends, np.flatnonzero(out < 0), side="right"))
        for row in partial:
            assert self.vocabulary is not None  # without a vocabulary no token is partial
            segment = slice(ends[row] - lengths[row], ends[row])
            out[segment] = [self._intern(text) for text in _split_tokens(ids[segment].tolist(), self.vocabulary)]
        return out
