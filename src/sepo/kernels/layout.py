"""Where the documents of a packed row are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Document:
    """A document's place in a row: the prompt begins at `start`, the branches follow in order; lengths in tokens."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.branches)


@dataclass
class Layout:
    """The documents of one packed row of `length` tokens.

    `cache` keeps what the attention kernels derive from them, such as masks, for all layers of one forward.
    """

    documents: list[Document]
    length: int
    cache: dict = field(default_factory=dict, repr=False)

    def token_coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document, branch (-1 in a prompt) and position of every token, each `[length]`."""
        document = np.full(self.length, -1, np.int64)
        branch = np.full(self.length, -1, np.int64)
        position = np.zeros(self.length, np.int64)
        for index, doc in enumerate(self.documents):
            document[doc.start : doc.start + doc.length] = index
            position[doc.start : doc.start + doc.prompt] = np.arange(doc.prompt)
            at = doc.start + doc.prompt
            for number, size in enumerate(doc.branches):
                branch[at : at + size] = number
                position[at : at + size] = np.arange(doc.prompt, doc.prompt + size)
                at += size
        return document, branch, position
