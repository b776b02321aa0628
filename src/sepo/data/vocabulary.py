"""The bytes of every token id of a tokenizer, read from its vocabulary.

A token is a string of bytes, which may be a part of a character. Character offsets do not tell the bytes: the three
tokens of "☕" all have the offsets of the one character. The vocabulary does: byte-level letters (GPT-2, Llama 3, Qwen,
SmolLM2), "▁" and `<0xHH>` (Llama 2, Mistral, Gemma), "##" (WordPiece), and the text of added tokens.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from sepo.errors import UserError, one_line, wrong_type
from sepo.files import expand_home

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each token id.

    Attributes:
        pieces: bytes of every token id; None for an unused id.
        special: ids of control tokens such as an end-of-turn mark.
        unknown: id of the unknown token; None if there is none.
    """

    pieces: Sequence[bytes | None]
    special: frozenset[int]
    unknown: int | None = None


class TokenBytes:
    """Maps a flat array of token ids to bytes.

    >>> join = TokenBytes(Vocabulary([b"He", b"llo", None], frozenset()))
    >>> join(np.array([0, 1]))[0].tobytes()
    b'Hello'
    """

    def __init__(self, vocabulary: Vocabulary):
        pieces = [piece or b"" for piece in vocabulary.pieces]
        self._lengths = np.array([len(piece) for piece in pieces], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._data = np.frombuffer(b"".join(pieces), np.uint8)
        self._known = np.array([piece is not None for piece in vocabulary.pieces], bool)
        if vocabulary.unknown is not None:
            self._known[vocabulary.unknown] = False

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated bytes of `ids` `[tokens]`: `[bytes]` uint8, and the number of bytes of each: `[tokens]`.

        Raises:
            UserError: an id lies beyond the vocabulary.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._lengths):
            raise UserError(
                f"the table holds token ids up to {int(ids.max())}, the tokenizer has {len(self._lengths)} tokens: "
                "expected the tokenizer that the table was made with"
            )
        lengths = self._lengths[ids]
        first = np.repeat(self._starts[ids] - (np.cumsum(lengths) - lengths), lengths)
        return self._data[first + np.arange(len(first))], lengths

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Which ids have known bytes: `[tokens]` bool."""
        return self._known[ids]


def byte_alphabet() -> dict[str, int]:
    """The printable characters that represent the 256 bytes in byte-level tokenizers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def component_types(component: object) -> set[str]:
    """All `type` names in a component of tokenizer.json, nested sequences included."""
    if isinstance(component, Mapping):
        types = {component["type"]} if isinstance(component.get("type"), str) else set()
        return types.union(*(component_types(value) for value in component.values()))
    if isinstance(component, list):
        return set().union(*(component_types(value) for value in component))
    return set()


def vocabulary_from_json(spec: Mapping) -> Vocabulary:
    """Read the bytes of every token from the object in a `tokenizer.json`.

    Supports byte-level (GPT-2, Llama 3, Qwen), SentencePiece-like with byte fallback (Llama 2, Gemma), Unigram and
    WordPiece vocabularies. A WordPiece word gets a space in front, which its vocabulary entry lacks.
    """
    model = spec["model"]
    vocab = model["vocab"]
    items = list(vocab.items()) if isinstance(vocab, Mapping) else [(entry[0], i) for i, entry in enumerate(vocab)]
    types = component_types([spec.get("decoder"), spec.get("pre_tokenizer"), spec.get("post_processor")])
    word_prefix = model.get("continuing_subword_prefix") if "WordPiece" in types else None
    alphabet = byte_alphabet() if "ByteLevel" in types else None

    def encode(piece: str) -> bytes:
        if alphabet is not None:
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece)
        elif match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        elif word_prefix is not None:
            piece = piece.removeprefix(word_prefix) if piece.startswith(word_prefix) else f" {piece}"
        else:
            piece = piece.replace("▁", " ")
        return piece.encode("utf-8", "surrogatepass")

    added = spec.get("added_tokens") or []
    pieces: list[bytes | None] = [None] * (1 + max([i for _, i in items] + [token["id"] for token in added]))
    for piece, token_id in items:
        pieces[token_id] = encode(piece)
    for token in added:
        content = token["content"]
        # An added token of "▁" only (some Gemmas) stands for spaces; a typed "▁" is rare.
        spaces = alphabet is None and not token.get("special") and not content.strip("▁")
        pieces[token["id"]] = encode(content) if spaces else content.encode("utf-8", "surrogatepass")
    return Vocabulary(pieces, frozenset(token["id"] for token in added if token.get("special")), _unknown(model, items))


def _unknown(model: Mapping, items: Sequence[tuple[str, int]]) -> int | None:
    """The id of the unknown token, given by number (Unigram) or by name."""
    if isinstance(model.get("unk_id"), int):
        return model["unk_id"]
    return None if model.get("unk_token") is None else dict(items).get(model["unk_token"])


def load_vocabulary(tokenizer: str | os.PathLike | object) -> Vocabulary:
    """Read the vocabulary of a tokenizer folder (its `tokenizer.json`) or of a loaded fast tokenizer.

    Raises:
        UserError: there is no readable `tokenizer.json`.
    """
    if not isinstance(tokenizer, str | os.PathLike):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise wrong_type("tokenizer", tokenizer, "a folder with a tokenizer.json, or a fast tokenizer in memory")
        return vocabulary_from_json(json.loads(backend.to_str()))
    path = Path(expand_home(tokenizer, "the tokenizer"))
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return vocabulary_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"no tokenizer.json in '{path.parent}': expected a folder that save_pretrained of a fast tokenizer wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not a readable tokenizer.json ({type(error).__name__}: {error})") from None


_PROBE = "The quick brown fox (it is red) jumps over 12 lazy dogs; they sleep."


def token_bytes(tokenizer: Any, name: str) -> TokenBytes:
    """The bytes of a tokenizer's ids, tested on a sentence.

    Args:
        tokenizer: a fast tokenizer in memory.
        name: the user's name for its model.

    Raises:
        UserError: the vocabulary is of an unknown kind, so the bytes of the ids differ from the tokenised text.
    """
    try:
        vocabulary = load_vocabulary(tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the tokenizer of '{name}' cannot be mapped to bytes ({type(error).__name__}: {one_line(error, 80)}): "
            "expected a byte-level, SentencePiece-like or WordPiece vocabulary"
        ) from None
    read = TokenBytes(vocabulary)
    ids = np.array(tokenizer(_PROBE, add_special_tokens=False)["input_ids"], np.int64)
    text = read(ids)[0].tobytes().decode("utf-8", "replace")
    # If the vocabulary lacks a word of the probe, the test is skipped: rows with unknown tokens are dropped later.
    if read.known(ids).all() and _letters(text) != _letters(_PROBE):
        raise UserError(
            f"the tokenizer of '{name}' cannot be mapped to bytes (it reads '{one_line(_PROBE, 24)}' as "
            f"'{one_line(text, 24)}'): expected a byte-level, SentencePiece-like or WordPiece vocabulary"
        )
    return read


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


_SPECIAL: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens: those with a role, such as EOS, and others, such as Gemma's end of turn."""
    if tokenizer not in _SPECIAL:
        unnamed = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        _SPECIAL[tokenizer] = frozenset([*tokenizer.all_special_ids, *unnamed])
    return _SPECIAL[tokenizer]
