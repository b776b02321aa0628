"""RewardBench for a DPO oracle: accuracy by subset and section, in the files of its own script.

The benchmark is Lambert et al. 2024, arXiv 2403.13787. Its `scripts/run_dpo.py` writes two JSON files: the share of
right pairs of each subset (`eval-set/MODEL.json`), and columns with every pair's scores
(`eval-set-scores/MODEL.json`). A score is log π_oracle − log π_reference of the whole response, without β. A section is
the mean of its subsets, weighted by the counts of the benchmark (math-prm counts as much as code).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np

from sepo.credit.rewards import pair_rewards, response_sums
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.data.ragged import as_read, ragged
from sepo.errors import UserError
from sepo.files import write_json
from sepo.processes import log
from sepo.rewards.passes import Models, kept_logps

# Subset -> its weight in its section, as in `rewardbench/constants.py`.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250,
        "xstest-should-respond": 154, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip


def read_benchmark(source: str, split: str) -> datasets.Dataset:
    """The pairs of a local copy of the data. Raises a UserError without the columns subset and id."""
    data = load_preferences(source, split=split)
    for name in ("subset", "id"):
        if name not in data.column_names:
            raise UserError(
                f"'{source}' has no column '{name}', so it is no copy of RewardBench's data (prompt, chosen, rejected, "
                f"subset, id): found {', '.join(data.column_names)}"
            )
    return data


def run_benchmark(
    models: Models,
    data: datasets.Dataset,
    out: Path,
    work: Path,
    names: tuple[str, str],
    max_length: int = 2048,
    device: str = "auto",
) -> dict[str, float]:
    """Score the pairs, write both files to `out`, and return accuracies: each section, then `subset/NAME`.

    Args:
        work: folder of what an interrupted command continues from.
        names: of oracle and reference, for the files.
    """
    pairs, report = tokenize_pairs(data, models.tokenizer, as_chat=True, max_length=max_length)
    log(f"  {report.summary()}")
    chosen, rejected = response_sums(pair_rewards(pairs, *kept_logps(models, pairs, work, device)), "rewards")
    rows = pairs.column("pair_id").to_pylist()
    subsets = [str(data[row]["subset"]) for row in rows]
    right = (chosen > rejected).astype(int)
    accuracy = {name: float(right[np.array(subsets) == name].mean()) for name in sorted(set(subsets))}
    common = {"model": names[0], "ref_model": names[1], "model_type": "DPO", "chat_template": "tokenizer"}
    decode = models.tokenizer.decode
    texts = {
        f"text_{side}": [
            decode([*prompt, *response])
            for prompt, response in zip(
                pairs.column("prompt_ids").to_pylist(), ragged(*as_read(pairs, side)[:2]).to_pylist(), strict=True
            )
        ]
        for side in ("chosen", "rejected")
    }
    columns = {
        "id": [data[row]["id"] for row in rows], "subset": subsets, "results": right.tolist(),
        "scores_chosen": chosen.tolist(), "scores_rejected": rejected.tolist(), **texts,
    }  # fmt: skip
    write_json(out / "eval-set" / "oracle.json", {**common, **accuracy})
    write_json(out / "eval-set-scores" / "oracle.json", {**common, **columns})
    return {**section_scores(accuracy), **{f"subset/{name}": value for name, value in accuracy.items()}}


def section_scores(accuracy: Mapping[str, float]) -> dict[str, float]:
    """The weighted mean of each section's subsets that are there, and the mean of all four sections."""
    scores = {}
    for section, weights in SECTIONS.items():
        there = {name: weight for name, weight in weights.items() if name in accuracy}
        if there:
            total = sum(accuracy[name] * weight for name, weight in there.items())
            scores[f"section/{section}"] = total / sum(there.values())
    if len(scores) == len(SECTIONS):
        scores["score"] = float(np.mean(list(scores.values())))
    return scores
