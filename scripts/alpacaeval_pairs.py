"""Split AlpacaEval pairs by prompt into pairs for a judge, pairs for a policy, and prompts to measure the policy on.

    python scripts/alpacaeval_pairs.py alpacaeval_prefs.parquet --out data/alpacaeval
    sepo run alpacaeval-judge data.source=data/alpacaeval/judge.parquet \\
        data.held_out_source=data/alpacaeval/check.parquet
    sepo run alpacaeval-smollm2 data.source=data/alpacaeval/train.parquet \\
        data.held_out_source=data/alpacaeval/measured.parquet

No prompt is in two parts: the judge sees neither the prompts that it judges nor the labels that the policy's own oracle
learns from. A hash of the seed and the prompt's text assigns the parts. Only short pairs are kept, so that nothing is
truncated.

The chosen response is the longer one in 84 % of the pairs; a judge trained on that would reward length. So the judge's
pairs are balanced: each pair with a shorter chosen response is matched with a pair whose chosen response is longer by
about as many tokens, and pairs of about equal lengths are added. Shorter chosen responses are rare, so the judge gets
the greater share of the prompts. The policy's pairs are not balanced.

check.parquet has short pairs of the measured prompts. They train nothing; they measure the judge's accuracy where it
judges.

Writes judge.parquet, check.parquet, train.parquet, measured.parquet (one pair a prompt) and split.json with counts and
the SHA-256 of the source. The same source gives the same files. Takes seconds; runs no model.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.errors import UserError
from sepo.files import file_digest, write_json
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import DEFAULT_MODEL

PARTS = ("judge", "check", "train", "measured")


class Lengths(NamedTuple):
    """Tokens of each pair's prompt (through the chat template) and responses (ends included); `[pairs]` each.

    All three are 0 for a pair that the tokenizer drops.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def short(self, most: int, together: int) -> np.ndarray:
        """Pairs with responses of at most `most` tokens, and at most `together` with the prompt: `[pairs]` bool."""
        longest = np.maximum(self.chosen, self.rejected)
        return (self.prompt > 0) & (longest <= most) & (self.prompt + longest <= together)


def lengths_of(source: str, model: str) -> Lengths:
    """Token counts of a file's pairs under a model's tokenizer."""
    dataset = load_preferences(source)
    table, _ = tokenize_pairs(dataset, load_tokenizer(model), max_length=2**20, as_chat=True)
    rows = table.column("pair_id").to_numpy()
    found = []
    for part in ("prompt", "chosen", "rejected"):
        column = np.zeros(len(dataset), np.int64)
        column[rows] = [len(ids) for ids in table.column(f"{part}_ids").to_pylist()]
        found.append(column)
    return Lengths(*found)


def hashed(seed: int, text: str) -> str:
    """Sort key that depends on the seed and the text alone."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def parts_of_prompts(prompts: list[str], measured: int, judge: float, seed: int) -> dict[str, str]:
    """Assign each distinct prompt to a part.

    Args:
        measured: number of prompts to measure on.
        judge: share of the remaining prompts for the judge.
    """
    order = sorted(set(prompts), key=lambda prompt: hashed(seed, prompt))
    if measured >= len(order):
        raise UserError(f"--measured {measured}: there are {len(order)} prompts; expected fewer")
    cut = measured + round(judge * (len(order) - measured))
    return {
        prompt: "measured" if place < measured else "judge" if place < cut else "train"
        for place, prompt in enumerate(order)
    }


def balanced(gains: np.ndarray, rows: np.ndarray, tolerance: int) -> list[int]:
    """Match pairs with a shorter chosen response to pairs with one that is longer by nearly as much; returns both.

    Args:
        gains: `[pairs]`, tokens of the chosen response minus tokens of the rejected one.
        rows: pairs to choose from, in order of preference.
        tolerance: how many tokens the two differences of a match may differ by.
    """
    longer = [int(row) for row in rows if gains[row] > 0]
    kept = []
    for row in rows:
        if gains[row] >= 0 or not longer:
            continue
        match = min(longer, key=lambda other: abs(gains[other] + gains[row]))
        if abs(gains[match] + gains[row]) <= tolerance:
            longer.remove(match)
            kept += [int(row), match]
    return kept


def split(table: pa.Table, lengths: Lengths, settings: argparse.Namespace) -> dict[str, list[int]]:
    """Row numbers of each part, ascending."""
    prompts = table.column("prompt").to_pylist()
    part = parts_of_prompts(prompts, settings.measured, settings.judge_share, settings.seed)
    gains = lengths.chosen - lengths.rejected
    short = lengths.short(settings.most_tokens, settings.max_length)
    order = sorted(range(len(prompts)), key=lambda row: hashed(settings.seed, f"{row}:{prompts[row]}"))
    of = {
        name: np.array([row for row in order if part[prompts[row]] == name], np.int64)
        for name in ("judge", "train", "measured")
    }
    of_short = {name: rows[short[rows]] for name, rows in of.items()}
    judge = balanced(gains, of_short["judge"], settings.tolerance)
    judge += [int(row) for row in of_short["judge"] if abs(gains[row]) <= settings.even and row not in set(judge)]
    # One pair a prompt is enough; the shortest costs least.
    read = lengths.prompt + lengths.chosen + lengths.rejected
    first: dict[str, int] = {}
    for row in sorted(of["measured"].tolist(), key=lambda row: (read[row], row)):
        if 0 < lengths.prompt[row] <= settings.max_length - settings.answer:
            first.setdefault(prompts[row], row)
    found = {
        "judge": judge[: settings.judge_pairs],
        "check": of_short["measured"].tolist()[: settings.check_pairs],
        "train": of_short["train"].tolist()[: settings.train_pairs],
    }
    return {**{name: sorted(rows) for name, rows in found.items()}, "measured": sorted(first.values())}


def counts(rows: list[int], prompts: list[str], lengths: Lengths) -> dict[str, Any]:
    """Statistics of a part, for split.json."""
    gain = (lengths.chosen - lengths.rejected)[rows]
    read = [lengths.prompt[rows], lengths.chosen[rows], lengths.rejected[rows]]
    return {
        "pairs": len(rows),
        "prompts": len({prompts[row] for row in rows}),
        "chosen_longer": int((gain > 0).sum()),
        "chosen_shorter": int((gain < 0).sum()),
        "mean_difference": float(gain.mean()),
        "mean_tokens": dict(zip(("prompt", "chosen", "rejected"), (float(one.mean()) for one in read), strict=True)),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="parquet with prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=int, default=120, help="prompts to measure the policy on")
    parser.add_argument("--judge-share", type=float, default=0.6, help="share of the other prompts for the judge")
    parser.add_argument("--judge-pairs", type=int, default=400, help="maximum of pairs for the judge")
    parser.add_argument("--check-pairs", type=int, default=150, help="maximum of pairs that measure the judge")
    parser.add_argument("--train-pairs", type=int, default=300, help="maximum of pairs for the policy")
    parser.add_argument("--most-tokens", type=int, default=200, help="maximum length of a response")
    parser.add_argument("--max-length", type=int, default=256, help="maximum tokens of prompt and response together")
    parser.add_argument("--answer", type=int, default=128, help="tokens of --max-length left for the answer")
    parser.add_argument("--tolerance", type=int, default=10, help="tokens between the length differences of a match")
    parser.add_argument("--even", type=int, default=25, help="length difference in tokens that counts as about equal")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model whose tokenizer counts the tokens")
    return parser.parse_args()


def main() -> None:
    settings = parse()
    if not settings.pairs.is_file():
        raise UserError(f"no pairs at '{settings.pairs}': expected a parquet file with prompt, chosen, rejected")
    table = pq.read_table(settings.pairs)
    lengths = lengths_of(str(settings.pairs), settings.model)
    found = split(table, lengths, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    prompts = table.column("prompt").to_pylist()
    record: dict[str, Any] = {
        "source": {"file": settings.pairs.name, "sha256": file_digest(settings.pairs), "pairs": len(table)},
        "settings": {key: value for key, value in vars(settings).items() if key not in ("pairs", "out")},
    }
    for name, rows in found.items():
        pq.write_table(table.take(pa.array(rows, pa.int64())), settings.out / f"{name}.parquet")
        record[name] = counts(rows, prompts, lengths)
        print(name, record[name])
    write_json(settings.out / "split.json", record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
