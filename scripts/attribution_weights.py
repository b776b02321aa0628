"""Write token weights by TI-DPO's gradient attribution, for a recipe to import.

    python scripts/attribution_weights.py mine.yaml --out tidpo.parquet [SECTION.KEY=VALUE ...]
    sepo run mine.yaml oracle.rewards=tidpo.parquet policy.objective=tis_dpo \
        select.credit=reward select.k_chosen=1 select.k_rejected=1 select.include_end=true

TI-DPO (arXiv 2505.19653) weighs token t of a response of T tokens by

    w_t = share * |d z / d e_t|_1 + (1 - share) * exp(-((t - (T - 1) / 2) / (T / 4))^2 / 2)

with z the largest logit after the last token and e_t the embedding of token t; share is 0.7. Differences
here: both terms are scaled to a mean of 1 over the response (accounts of the paper disagree on the scale), so that
DPO's beta keeps its meaning; the weights come from the reference, once, where the paper recomputes them from the
policy; there is no triplet loss. The model runs in float32, one response at a time: a forward and half a backward pass.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers.utils import logging

from sepo.data.ragged import SIDES
from sepo.data.tables import read_table, write_parquet
from sepo.models.names import resolve_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.reading import load_recipe
from sepo.stages import data

SHARE = 0.7


def attribution(model: nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """L1 norm of the gradient of the largest last logit with respect to each response token's embedding: `[T]`."""
    device = next(model.parameters()).device
    tokens = torch.tensor([[*prompt, *response]], device=device)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
    embedded.requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1]
    (gradient,) = torch.autograd.grad(logits.max(), embedded)
    return gradient[0, len(prompt) :].abs().sum(-1)


def importance(norms: Tensor, share: float = SHARE) -> Tensor:
    """Weights with mean 1 from gradient norms and a Gaussian around the middle of the response: `[T]`."""
    number = len(norms)
    at = torch.arange(number, dtype=torch.float64)
    prior = torch.exp(-0.5 * ((at - (number - 1) / 2) / (number / 4)) ** 2)
    norms = norms.double().cpu()
    if not norms.sum() > 0:  # all gradients are 0: equal weights
        norms = torch.ones_like(norms)
    return share * norms / norms.mean() + (1 - share) * prior / prior.mean()


def weights_of(model: nn.Module, pairs: pa.Table, share: float) -> dict[str, list]:
    """Weights of every response token of a pairs table, as columns of the file."""
    columns: dict[str, list] = {"pair_id": pairs["pair_id"].to_pylist(), "chosen_rewards": [], "rejected_rewards": []}
    for row in pairs.to_pylist():
        for side in SIDES:
            norms = attribution(model, row["prompt_ids"], row[f"{side}_ids"])
            columns[f"{side}_rewards"].append(importance(norms, share).tolist())
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument("--share", type=float, default=SHARE, help="share of the gradient term (default 0.7)")
    arguments = parser.parse_args()
    if not 0 <= arguments.share <= 1:
        parser.error(f"--share is {arguments.share}: expected 0 to 1")
    logging.set_verbosity_error()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    model_folder = resolve_model(recipe.reference.model, revision=recipe.reference.revision)
    with tempfile.TemporaryDirectory() as folder:
        data.prepare_data(recipe.data, load_tokenizer(model_folder), Path(folder), recipe.seed)
        pairs = pa.concat_tables([read_table(Path(folder, part), "pairs") for part in ("train", "held_out")])
    model = load_model(model_folder, device=recipe.device, dtype="float32")
    lists = pa.list_(pa.float32())
    schema = pa.schema([("pair_id", pa.int64()), ("chosen_rewards", lists), ("rejected_rewards", lists)])
    write_parquet(arguments.out, pa.table(weights_of(model, pairs, arguments.share), schema=schema))
    print(f"{arguments.out}: token weights of {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
