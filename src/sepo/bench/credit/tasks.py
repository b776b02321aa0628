"""The planted tasks: questions, answers with wrong steps, preference pairs, and demonstrations for a start.

Each question is answered several times. Every step of an answer is wrong with a probability, and what follows is worked
out from the wrong step. Pairs are two answers to a question whose rewards differ; the label is a draw from
sigmoid((a - b) / tau). The questions of the demonstrations, of training and of the held-out pairs differ. Everything
follows from the seed. `sepo.bench.credit.checks` checks the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sepo.bench.credit.checks import CHECKS, DETAILS, OPERATIONS, scores
from sepo.data.tables import write_parquet

THINGS = ("key", "coin", "ring")
BOXES = ("red", "blue", "green", "pink", "gold", "grey")
PEOPLE = ("Mara", "Joe", "Lena", "Omar", "Nina", "Paul", "Rita", "Sam", "Tess", "Ugo")

Answer = Callable[[np.random.Generator, float], str]  # (randomness, probability of a wrong step) -> an answer


def arithmetic(rng: np.random.Generator) -> tuple[str, Answer]:
    """Four operations on a number; all results lie between 0 and 99."""
    first = int(rng.integers(2, 30))
    steps: list[tuple[str, int]] = []
    number = first
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
    """Two things are moved from box to box, four times."""
    things = rng.choice(THINGS, 2, replace=False).tolist()
    start = dict(zip(things, rng.choice(BOXES, 2).tolist(), strict=True))
    moves = [(str(rng.choice(things)), str(rng.choice(BOXES))) for _ in range(4)]

    def answer(rng: np.random.Generator, wrong: float) -> str:
        places, parts = dict(start), []
        for number, (thing, box) in enumerate(moves, 1):
            false = [other for other in BOXES if other != box]
            places[thing] = str(rng.choice(false)) if rng.random() < wrong else box
            parts.append(f"{number}: " + ", ".join(f"{name} {place}" for name, place in places.items()))
        return "; ".join(parts) + "."

    begin = " ".join(f"The {thing} is in the {box} box." for thing, box in start.items())
    return f"{begin} " + " ".join(f"Move the {thing} to {box}." for thing, box in moves), answer


_FORMS = {
    "age": ("{name} is {value}.", "{name}'s age is {value}."),
    "town": ("{name} lives in {value}.", "Home is {value}."),
    "job": ("{name} works as a {value}.", "By trade {name} is a {value}."),
    "pet": ("{name} keeps a {value}.", "There is a {value} at home."),
    "hobby": ("{name} likes {value}.", "The evenings are for {value}."),
}


def details(rng: np.random.Generator) -> tuple[str, Answer]:
    """Four of five facts about a person, in sentences. A wrong step is a false fact, or one that the notes lack."""
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


class Sizes(NamedTuple):
    """How much of a task is made, and how noisy it is."""

    train: int = 600  # questions of the training pairs
    held_out: int = 150  # questions of the held-out pairs
    demos: int = 48_000  # questions that the start reads
    right: float = 0.75  # share of the demonstrations, the first, without wrong steps
    answers: int = 4  # to a question of the pairs
    wrong: float = 0.3  # probability that a step is wrong
    gap: float = 0.2  # pairs whose rewards differ by less are not made
    tau: float = 0.2  # noise of the labels


SIZES = Sizes()


class Task(NamedTuple):
    """Pairs of both splits as rows of a preference dataset, and demonstrations as (question, answer)."""

    train: list[dict]
    held_out: list[dict]
    demos: list[tuple[str, str]]


def make_task(name: str, sizes: Sizes = SIZES, seed: int = 0) -> Task:
    """Make a planted task. The first pairs of a larger task are those of a smaller one."""
    questions = _Questions(TASKS[name], [seed, list(TASKS).index(name)])
    train, held_out = ([*_pairs(name, questions, number, sizes)] for number in (sizes.train, sizes.held_out))
    demos = []
    for number in range(sizes.demos):
        text, answer = questions.next(repeat=True)
        demos.append((text, answer(questions.rng, 0.0 if number < sizes.right * sizes.demos else sizes.wrong)))
    return Task(train, held_out, demos)


class _Questions:
    """Questions that do not repeat those of pairs."""

    def __init__(self, task: Callable[[np.random.Generator], tuple[str, Answer]], seed: Sequence[int]):
        self.task, self.rng, self.asked = task, np.random.default_rng(seed), set[str]()

    def next(self, repeat: bool = False) -> tuple[str, Answer]:
        """Args: repeat: a question of demonstrations, which may occur twice."""
        while True:
            text, answer = self.task(self.rng)
            if text not in self.asked:
                if not repeat:
                    self.asked.add(text)
                return text, answer


def _pairs(name: str, questions: _Questions, number: int, sizes: Sizes) -> Iterator[dict]:
    rng = questions.rng
    for _ in range(number):
        text, answer = questions.next()
        texts = list(dict.fromkeys(answer(rng, sizes.wrong) for _ in range(sizes.answers)))
        rewards = scores(CHECKS[name], [text] * len(texts), texts)
        for first in range(0, len(texts) - 1, 2):
            gap = rewards[first] - rewards[first + 1]
            if abs(gap) < sizes.gap:
                continue
            better = first if rng.random() < 1 / (1 + np.exp(-gap / sizes.tau)) else first + 1
            sides = {"chosen": better, "rejected": 2 * first + 1 - better}
            yield {
                "prompt": [{"role": "user", "content": text}],
                **{side: [{"role": "assistant", "content": texts[index]}] for side, index in sides.items()},
                **{f"{side}_gold": float(rewards[index]) for side, index in sides.items()},
            }


def write_pairs(task: Task, folder: Path) -> Path:
    """Write train.parquet and held_out.parquet, preference data for any tool; returns `folder`."""
    for split, rows in (("train", task.train), ("held_out", task.held_out)):
        write_parquet(folder / f"{split}.parquet", pa.Table.from_pylist(rows))
    return folder
