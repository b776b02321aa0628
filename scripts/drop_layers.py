"""Make a smaller model by dropping layers, and the texts to heal it with.

    python scripts/drop_layers.py --keep 15 --out models/smollm2-half

The first and the last layer stay, and of those between as many as asked for, evenly spaced. What is left shares
tokenizer and chat template with its source, so it can be reference and oracle for it (weak to strong). It writes
nonsense until it is fine-tuned: `heal.jsonl` holds the responses of the embedded task's training split, chosen and
rejected alike so that healing teaches no preference, as conversations for `reference.sft`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from sepo.files import write_text
from sepo.models.adapters import causal_lm
from sepo.models.names import resolve_model
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import DEFAULT_MODEL, DataSettings
from sepo.stages.data import read_split


def drop_layers(model: torch.nn.Module, keep: int) -> list[int]:
    """Drop all but `keep` decoder layers, evenly spaced with both ends; returns the indices that stay."""
    lm = causal_lm(model)
    layers = lm.base_model.layers
    if not 2 <= keep <= len(layers):
        raise SystemExit(f"--keep {keep}: expected 2 to {len(layers)}, the model's number of layers")
    kept = np.linspace(0, len(layers) - 1, keep).round().astype(int).tolist()
    lm.base_model.layers = torch.nn.ModuleList(layers[index] for index in kept)
    for place, layer in enumerate(lm.base_model.layers):
        layer.self_attn.layer_idx = place  # where the layer keeps its keys and values when generating
    lm.config.num_hidden_layers = keep
    if getattr(lm.config, "layer_types", None):
        lm.config.layer_types = [lm.config.layer_types[index] for index in kept]
    return kept


def healing_rows() -> list[dict]:
    """Every response of the embedded training split once, as a conversation."""
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
    source = resolve_model(arguments.model)
    model = load_model(source, device="cpu")
    kept = drop_layers(model, arguments.keep)
    save_model(model, load_tokenizer(source), arguments.out)
    rows = healing_rows()
    write_text(arguments.out / "heal.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: layers {kept}, {size / 1e6:.0f}M parameters; {len(rows)} responses in heal.jsonl")


if __name__ == "__main__":
    main()
