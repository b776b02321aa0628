"""One pair of the data as the models read it, for dry runs: a wrong chat template or boundary shows here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sepo.data.tables import iter_tables

_MOST = 400  # characters of one text; of a longer one, start and end are shown
_PARTS = (("prompt", "masked: read, not trained"), ("chosen", "trained"), ("rejected", "trained"))


def example_lines(folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """The first training pair, decoded with all its control tokens; line breaks are written as \\n.

    Args:
        folder: of the pairs, with `train`.
        name: of the model whose tokenizer this is.
    """
    row = next(iter_tables(folder / "train", "pairs")).slice(0, 1).to_pylist()[0]
    lines = [f"pair {row['pair_id']} as {name} reads it:"]
    for part, use in _PARTS:
        ids, context = row[f"{part}_ids"], row.get(f"{part}_context_ids")
        if context:
            use += f", with {len(context)} tokens between the turns: read, not trained"
            ids = np.insert(ids, row[f"{part}_context_at"], context).tolist()
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if len(text) > _MOST:
            text = f"{text[: _MOST // 2]} […] {text[-_MOST // 2 :]}"
        lines.append(f"  {part} ({len(row[f'{part}_ids'])} tokens, {use}): {_on_one_line(text)}")
    return lines


def _on_one_line(text: str) -> str:
    """A text with control characters as escapes, as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
