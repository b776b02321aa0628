"""Tasks whose truth is known token by token and is no list of words: the answer is right or wrong step by step.

    arithmetic   "Start with 14. Add 5. Double it."           "14 + 5 = 19; 19 x 2 = 38."
    tracking     "The key is in the red box. ... Move ..."    "1: key blue, coin green; 2: key blue, coin pink; ..."
    details      "Notes: name Mara; age 34; ..."              "Mara, 34, is a nurse from Oslo. She has a cat."

The same grammar checks made answers (`tasks.py`) and answers of models. A step is judged by the step
before it, as the answer states it: what follows rightly from a wrong step is right. So a planted mistake is wrong in
one place, and its consequences are not (BIG-Bench-Mistake, arXiv 2311.08516, marks the first wrong step too).

The reward of an answer is the share of the question's steps (facts) that it gives rightly, for `details` less the share
of false ones. Values of units: 1 where a step is right and had to be worked out, -1 where it is wrong, 0 else. Copying
what stands before is worth 0 if it is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from sepo.evaluate.gold import GoldReward
from sepo.evaluate.words import Unit

OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "Add": ("+", lambda left, right: left + right),
    "Subtract": ("-", lambda left, right: left - right),
    "Multiply by": ("x", lambda left, right: left * right),
}
DETAILS = {
    "age": ("23", "27", "31", "34", "38", "42", "46", "51", "57", "63"),
    "town": ("Oslo", "Lima", "Cairo", "Dublin", "Lyon", "Perth", "Quito", "Turin", "Kyoto", "Boston"),
    "job": ("nurse", "baker", "pilot", "lawyer", "farmer", "painter", "plumber", "teacher", "dentist", "barber"),
    "pet": ("cat", "dog", "parrot", "rabbit", "hamster", "turtle", "pony", "goat", "snake", "lizard"),
    "hobby": ("chess", "tennis", "sailing", "knitting", "fishing", "archery", "yoga", "boxing", "golf", "poker"),
}
_SLOT = {value: slot for slot, values in DETAILS.items() for value in values}
_WORD = re.compile(r"[A-Za-z0-9]+|[-+=]")


class Checked(NamedTuple):
    """An answer, checked: its reward, and the value of each character span that is right (1) or wrong (-1)."""

    reward: float
    values: dict[tuple[int, int], float]


Check = Callable[[str, str], Checked]


def scores(check: Check, questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Rewards of answers to their questions, `[answers]` float64."""
    return np.array([check(*pair).reward for pair in zip(questions, answers, strict=True)], dtype=np.float64)


def truth(check: Check, question: str, answer: str) -> Iterator[Unit]:
    """The words, numbers and signs of an answer with their values."""
    values = check(question, answer).values
    for match in _WORD.finditer(answer):
        yield Unit(*match.span(), values.get(match.span(), 0.0))


def check_arithmetic(question: str, answer: str) -> Checked:
    """Check the steps of a calculation.

    >>> check_arithmetic("Start with 14. Add 5. Subtract 8.", "14 + 5 = 18; 18 - 8 = 10.")
    Checked(reward=0.5, values={(9, 11): -1.0, (22, 24): 1.0})
    """
    first = re.search(r"Start with (\d+)\.", question)
    steps = re.findall(rf"({'|'.join(OPERATIONS)}) (\d+)\.", question)
    values: dict[tuple[int, int], float] = {}
    before, right = first.group(1) if first else "", 0
    written = re.finditer(r"(\d+) ([-+x]) (\d+) = (-?\d+)", answer)
    for (name, operand), match in zip(steps, written, strict=False):
        sign, apply = OPERATIONS[name]
        copied = [match[1] == before, match[2] == sign, match[3] == operand]
        values |= {match.span(group): -1.0 for group, same in zip((1, 2, 3), copied, strict=True) if not same}
        result = int(match[4]) == apply(int(match[1]), int(operand))
        # The sign of a negative result is a word of its own in `truth`; the tasks have none.
        values[match.span(4)] = 1.0 if result else -1.0
        right += result and all(copied)
        before = match[4]
    return Checked(right / max(len(steps), 1), values)


def check_tracking(question: str, answer: str) -> Checked:
    """Check where each thing is after each move.

    >>> asked = "The key is in the red box. The coin is in the blue box. Move the key to pink. Move the coin to red."
    >>> check_tracking(asked, "1: key gold, coin blue; 2: key gold, coin red.")
    Checked(reward=0.5, values={(7, 11): -1.0, (42, 45): 1.0})
    """
    places = dict(re.findall(r"The (\w+) is in the (\w+) box", question))
    moves = re.findall(r"Move the (\w+) to (\w+)\.", question)
    states = re.finditer(r"(\d+):([^;.]*)", answer)
    values: dict[tuple[int, int], float] = {}
    right = 0
    for (thing, box), state in zip(moves, states, strict=False):
        expected = {**places, thing: box}
        stated = list(re.finditer(r"(\w+) (\w+)", state[2]))
        for match in stated:
            at = state.start(2) + match.start(2), state.start(2) + match.end(2)
            if expected.get(match[1]) != match[2]:
                values[at] = -1.0
            elif match[1] == thing:
                values[at] = 1.0
        now = {match[1]: match[2] for match in stated}
        right += now == expected
        places = {**expected, **{name: value for name, value in now.items() if name in expected}}
    return Checked(right / max(len(moves), 1), values)


def check_details(question: str, answer: str) -> Checked:
    """Check the details of a description against the notes: false ones, and ones that the notes do not have.

    >>> check_details("Notes: name Mara; age 34; town Oslo.", "Mara, 34, lives in Lima and has a cat.")
    Checked(reward=-0.5, values={(6, 8): 1.0, (19, 23): -1.0, (34, 37): -1.0})
    """
    notes = dict(re.findall(r"(\w+) (\w+)(?=[;.])", question.partition("Notes:")[2]))
    values: dict[tuple[int, int], float] = {}
    given: set[str] = set()
    false = 0
    for match in _WORD.finditer(answer):
        slot = _SLOT.get(match[0])
        if slot is None:
            continue
        true = notes.get(slot) == match[0]
        values[match.span()] = 1.0 if true else -1.0
        given |= {slot} if true else set()
        false += not true
    known = max(sum(slot in DETAILS for slot in notes), 1)
    return Checked(max((len(given) - false) / known, -1.0), values)


CHECKS: dict[str, Check] = {
    "arithmetic": check_arithmetic,
    "tracking": check_tracking,
    "details": check_details,
}
# The gold rewards of these names (entry points in pyproject.toml).
arithmetic, tracking, details = (GoldReward(partial(scores, check), partial(truth, check)) for check in CHECKS.values())
