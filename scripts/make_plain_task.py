"""Make the second embedded task: pairs of the first task's answers, labelled by how plain their words are.

    python scripts/make_plain_task.py --out src/sepo/assets/plain_pairs.parquet

The distinct answers to each prompt of `sentiment_pairs.parquet` are paired again by the gold reward `plain` (1 minus
the share of long words); held-out prompts stay held out. Pairs of a prompt are drawn in random order, if their scores
differ enough and neither answer is in two pairs already. Labels are drawn like those of the first task, with a `tau`
that sets about as many against the score.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from make_sentiment_task import Response, label, row_of, summarise, write

from sepo.evaluate.gold import plain_scores
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import DEFAULT_MODEL, DataSettings
from sepo.stages.data import read_split


def answers_of(rows: Sequence[dict], tokens: Callable[[str], int]) -> list[tuple[list[dict], list[Response]]]:
    """Each prompt with its distinct answers and their plain scores, prompts and answers in alphabetical order."""
    found: dict[str, tuple[list[dict], set[str]]] = {}
    for row in rows:
        _, texts = found.setdefault(row["prompt"][-1]["content"], (row["prompt"], set()))
        texts.update(row[side][0]["content"] for side in ("chosen", "rejected"))
    return [
        (prompt, [Response(text, tokens(text), float(plain_scores([text])[0])) for text in sorted(texts)])
        for _, (prompt, texts) in sorted(found.items())
    ]


def pair_up(
    answers: Sequence[Response], rng: np.random.Generator, tau: float, min_gap: float, most: int
) -> list[tuple[Response, Response]]:
    """Pair answers whose scores differ by `min_gap`: (chosen, rejected). At most `most` pairs, two an answer."""
    possible = list(combinations(answers, 2))
    used: Counter[str] = Counter()
    pairs = []
    for index in rng.permutation(len(possible)):
        one, two = possible[index]
        if len(pairs) < most and abs(one.gold - two.gold) >= min_gap and max(used[one.text], used[two.text]) < 2:
            used.update((one.text, two.text))
            pairs.append(label(one, two, rng, tau))
    return pairs


def make_rows(args: argparse.Namespace, tokens: Callable[[str], int]) -> list[dict]:
    """Pairs of both splits, shuffled."""
    rng = np.random.default_rng(args.seed)
    rows = [
        row_of(prompt, chosen, rejected, split)
        for split in ("train", "held_out")
        for prompt, answers in answers_of(read_split(DataSettings(), split).to_list(), tokens)
        for chosen, rejected in pair_up(answers, rng, args.tau, args.min_gap, args.pairs_per_prompt)
    ]
    return [rows[index] for index in rng.permutation(len(rows))]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the parquet file to write")
    parser.add_argument("--tau", type=float, default=0.042, help="label noise: P = sigmoid(score difference / tau)")
    parser.add_argument("--min-gap", type=float, default=0.045, help="pairs whose scores differ by less are not made")
    parser.add_argument("--pairs-per-prompt", type=int, default=5, help="most pairs of one prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pairs and the labels")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    tokenizer = load_tokenizer(DEFAULT_MODEL)  # of the model that wrote the answers; their end token adds one
    rows = make_rows(args, lambda text: 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    summarise(rows)
    write(rows, args)


if __name__ == "__main__":
    main()
