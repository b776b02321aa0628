"""Make the tasks with planted truth: answers with wrong steps, and texts to fine-tune a start on.

    python scripts/make_planted_tasks.py --out src/sepo/assets

Each question is answered several times. Every step of an answer is wrong with a probability, and what follows is worked
out from the wrong step. Pairs are two answers to a question whose rewards differ; the label is a draw from
sigmoid((a - b) / tau). The questions of the demonstrations, of training and of the held-out pairs differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.data.tables import write_parquet
from sepo.evaluate.planted import CHECKS, DETAILS, OPERATIONS, scores

NAMES = ("Ann", "Ben", "Cy", "Dora")
COLOURS = ("red", "blue", "green", "pink")
PEOPLE = ("Mara", "Joe", "Lena", "Omar", "Nina", "Paul", "Rita", "Sam", "Tess", "Ugo")

Answer = Callable[[np.random.Generator, float], str]  # (randomness, probability of a wrong step) -> an answer


def arithmetic(rng: np.random.Generator) -> tuple[str, Answer]:
    """Four operations on a number; all results lie between 0 and 99."""
    first = int(rng.integers(2, 30))
    steps, number = [], first
    while len(steps) < 4:
        name = str(rng.choice(list(OPERATIONS), p=(0.45, 0.45, 0.1)))
        operand = int(rng.integers(2, 4 if name == "Multiply by" else 20))
        result = OPERATIONS[name][1](number, operand)
        if 0 <= result <= 99:
            steps.append((name, operand))
            number = result

    def stays(number: int, later: Sequence[tuple[str, int]]) -> bool:
        values = accumulate(later, lambda left, step: OPERATIONS[step[0]][1](left, step[1]), initial=number)
        return all(0 <= value <= 99 for value in values)

    def answer(rng: np.random.Generator, wrong: float) -> str:
        number, parts = first, []
        for index, (name, operand) in enumerate(steps):
            sign, apply = OPERATIONS[name]
            result = apply(number, operand)
            if rng.random() < wrong:
                near = [result + change for change in (-10, -3, -2, -1, 1, 2, 3, 10)]
                possible = [value for value in near if stays(value, steps[index + 1 :])]
                result = int(rng.choice(possible)) if possible else result
            parts.append(f"{number} {sign} {operand} = {result}")
            number = result
        return "; ".join(parts) + "."

    return f"Start with {first}. " + " ".join(f"{name} {operand}." for name, operand in steps), answer


def tracking(rng: np.random.Generator) -> tuple[str, Answer]:
    """Three people swap balls three times."""
    names, colours = (rng.choice(values, 3, replace=False).tolist() for values in (NAMES, COLOURS))
    swaps = [rng.choice(3, 2, replace=False).tolist() for _ in range(3)]

    def answer(rng: np.random.Generator, wrong: float) -> str:
        holds, parts = list(colours), []
        for number, swap in enumerate(swaps, 1):
            moves = [[0, 1], [0, 2], [1, 2]]
            if rng.random() < wrong:
                swap = moves[int(rng.choice([i for i, move in enumerate(moves) if move != sorted(swap)]))]
            holds[swap[0]], holds[swap[1]] = holds[swap[1]], holds[swap[0]]
            parts.append(f"{number}: " + ", ".join(f"{a} {b}" for a, b in zip(names, holds, strict=True)))
        return "; ".join(parts) + "."

    start = " ".join(f"{name} has the {colour} ball." for name, colour in zip(names, colours, strict=True))
    return f"{start} " + " ".join(f"{names[a]} and {names[b]} swap." for a, b in swaps), answer


_FORMS = {
    "age": ("{name} is {value}.", "{name}'s age is {value}."),
    "town": ("{name} lives in {value}.", "Home is {value}."),
    "job": ("{name} works as a {value}.", "By trade {name} is a {value}."),
    "pet": ("{name} keeps a {value}.", "There is a {value} at home."),
    "hobby": ("{name} likes {value}.", "The evenings are for {value}."),
}


def details(rng: np.random.Generator) -> tuple[str, Answer]:
    """Four of five facts about a person, told in sentences; a wrong step is a false fact, or one that the notes lack."""
    name = str(rng.choice(PEOPLE))
    known = rng.permutation(list(DETAILS)).tolist()
    notes = {slot: str(rng.choice(DETAILS[slot])) for slot in known[:4]}

    def answer(rng: np.random.Generator, wrong: float) -> str:
        told = {}
        for slot in rng.permutation(list(notes)).tolist():
            false = [value for value in DETAILS[slot] if value != notes[slot]]
            told[slot] = str(rng.choice(false)) if rng.random() < wrong else notes[slot]
        if rng.random() < wrong:
            told[known[4]] = str(rng.choice(DETAILS[known[4]]))
        items = [(slot, told[slot]) for slot in rng.permutation(list(told)).tolist()]
        return " ".join(str(rng.choice(_FORMS[slot])).format(name=name, value=value) for slot, value in items)

    listed = "; ".join(f"{slot} {value}" for slot, value in notes.items())
    return f"Tell me about {name}. Notes: name {name}; {listed}.", answer


TASKS: dict[str, Callable[[np.random.Generator], tuple[str, Answer]]] = {
    "arithmetic": arithmetic,
    "tracking": tracking,
    "details": details,
}


def make(task: str, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Pairs of both splits, and demonstrations."""
    rng = np.random.default_rng([args.seed, list(TASKS).index(task)])
    asked: set[str] = set()

    def question() -> tuple[str, Answer]:
        while True:
            text, answer = TASKS[task](rng)
            if text not in asked:
                asked.add(text)
                return text, answer

    demos = []
    for _ in range(args.demos):
        text, answer = question()
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer(rng, args.wrong)}]
        demos.append({"messages": turns})
    rows = []
    for split, number in (("train", args.train), ("held_out", args.held_out)):
        for _ in range(number):
            text, answer = question()
            texts = list(dict.fromkeys(answer(rng, args.wrong) for _ in range(args.answers)))
            rewards = scores(CHECKS[task], [text] * len(texts), texts)
            for one in range(0, len(texts) - 1, 2):
                first, second = rewards[one], rewards[one + 1]
                if abs(first - second) < 0.2:
                    continue
                swap = rng.random() > 1 / (1 + np.exp(-(first - second) / args.tau))
                chosen, rejected = (one + 1, one) if swap else (one, one + 1)
                sides = {
                    side: [{"role": "assistant", "content": texts[index]}]
                    for side, index in (("chosen", chosen), ("rejected", rejected))
                }
                golds = {"chosen_gold": float(rewards[chosen]), "rejected_gold": float(rewards[rejected])}
                rows.append({"prompt": [{"role": "user", "content": text}], **sides, **golds, "split": split})
    return [rows[index] for index in rng.permutation(len(rows))], demos


def summarise(task: str, rows: Sequence[dict], demos: Sequence[dict]) -> None:
    for split in ("train", "held_out"):
        of_split = [row for row in rows if row["split"] == split]
        chosen, rejected = (np.array([row[f"{side}_gold"] for row in of_split]) for side in ("chosen", "rejected"))
        print(
            f"{task} {split}: {len(of_split)} pairs, {len({row['prompt'][0]['content'] for row in of_split})} questions, "
            f"reward {chosen.mean():.3f} / {rejected.mean():.3f}, against the reward {(chosen < rejected).mean():.1%}"
        )
    print(f"{task}: {len(demos)} demonstrations; {rows[0]['prompt'][0]['content']!r}")
    print(f"  + {rows[0]['chosen'][0]['content']!r}\n  - {rows[0]['rejected'][0]['content']!r}")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--train", type=int, default=300, help="questions of the training pairs")
    parser.add_argument("--held-out", type=int, default=100, help="questions of the held-out pairs")
    parser.add_argument("--demos", type=int, default=600, help="texts to fine-tune a start on")
    parser.add_argument("--answers", type=int, default=4, help="answers to a question")
    parser.add_argument("--wrong", type=float, default=0.3, help="probability that a step is wrong")
    parser.add_argument("--tau", type=float, default=0.2, help="label noise: P = sigmoid(reward difference / tau)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    for task in args.task or TASKS:
        rows, demos = make(task, args)
        summarise(task, rows, demos)
        made_with = {key: value for key, value in vars(args).items() if key not in ("out", "task")}
        for name, items in (("pairs", rows), ("demos", demos)):
            table = pa.Table.from_pylist(items).replace_schema_metadata({"made_with": str(made_with)})
            write_parquet(args.out / f"{task}_{name}.parquet", table)


if __name__ == "__main__":
    main()
