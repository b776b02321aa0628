"""Make a smaller model by dropping layers, and the texts to heal it with.

    python scripts/drop_layers.py --keep 15 --out models/smollm2-half

Keeps the first and the last layer and evenly spaced layers between them. The smaller model shares tokenizer and chat
template with its source, so it can be its reference and oracle (weak to strong). It writes nonsense until it is
fine-tuned: `heal.jsonl` holds the responses of the embedded task's training split as conversations for `reference.sft`,
chosen and rejected alike, so that healing teaches no preference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sepo.files import write_text
from sepo.models.shrink import shrink_model
from sepo.planning.sizes import load_shape
from sepo.recipe.settings import DEFAULT_MODEL, DataSettings
from sepo.stages.data import read_split


def healing_rows() -> list[dict]:
    """Each response of the embedded training split once, as a conversation."""
    rows = {}
    for row in read_split(DataSettings(), "train"):
        for side in ("chosen", "rejected"):
            messages = [*row["prompt"], *row[side]]
            rows[json.dumps(messages)] = {"messages": messages}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model to shrink (default: the quickstart's)")
    parser.add_argument("--keep", type=int, required=True, help="number of layers to keep")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and heal.jsonl")
    arguments = parser.parse_args()
    kept = shrink_model(arguments.model, arguments.keep, arguments.out)
    rows = healing_rows()
    write_text(arguments.out / "heal.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    size = load_shape(arguments.out).parameters
    print(f"{arguments.out}: layers {kept}, {size / 1e6:.0f}M parameters; {len(rows)} responses in heal.jsonl")


if __name__ == "__main__":
    main()
