"""Gold rewards: known, independent rewards that evaluate a policy and are never trained on.

A gold reward gives the reward of a text and the words that carry it, so that token rewards can be checked one by one
(`fidelity.py`). They are of different kinds, so that no method is tuned to one:

- `vader` (Hutto and Gilbert, ICWSM 2014) is about meaning: a human-rated sentiment lexicon with a few rules for
  negation, emphasis and contrast. Words are good or bad.
- `plain` is about form: the share of words that are not long. It has no lexicon and no rules beyond the word. Long
  words are bad; no word is good.

A package adds its own by an entry point `NAME = "module:REWARD"` of the group `sepo.gold_rewards`; `sepo.bench` adds
rewards that check what is right, step by step. All are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import NamedTuple

import numpy as np

from sepo.errors import UserError, nearest
from sepo.evaluate.words import Truth, text_words, word_truth

LONG = 8  # the fewest letters of a long word: 16 % of the words of the embedded texts are long


class GoldReward(NamedTuple):
    """A known reward of answers, and the parts of an answer that carry it.

    Attributes:
        scores: (questions, answers) -> rewards of the answers, `[answers]` float64.
        truth: (question, answer) -> the units of the answer with their part in the reward.
    """

    scores: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    truth: Truth


@lru_cache(maxsize=1)
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(
            "the gold reward 'vader' needs the package vaderSentiment, which is not installed: "
            "run `pip install -e '.[quickstart]'`"
        ) from None
    return SentimentIntensityAnalyzer()


def vader_scores(texts: Sequence[str]) -> np.ndarray:
    """Return the VADER compound sentiment of each text, `[texts]` float64 in [-1, 1]; 0 for an empty text.

    Raises:
        UserError: vaderSentiment is not installed.
    """
    analyzer = _analyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


def lexicon_valence(word: str) -> float:
    """Return the mean human rating of a word in VADER's lexicon, about -4 to 4; 0 for a word that is not in it.

    Case is ignored. VADER's rules for sentences ("not good") are not applied.

    >>> lexicon_valence("Good"), lexicon_valence("table")
    (1.9, 0.0)

    Raises:
        UserError: vaderSentiment is not installed.
    """
    return float(_analyzer().lexicon.get(word.lower(), 0.0))


def plain_scores(texts: Sequence[str]) -> np.ndarray:
    """Return 1 minus the share of long words (`plain_valence`) of each text, `[texts]` float64 in [0, 1].

    A text without words has the lowest reward, 0, so that an empty response cannot win.

    >>> plain_scores(["The soup was hot.", "The temperature was comfortable.", "", "..."]).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    parts = ([plain_valence(word) for _, word in text_words(text)] for text in texts)
    return np.array([1 + np.mean(part) if part else 0.0 for part in parts], dtype=np.float64)


def plain_valence(word: str) -> float:
    """Return -1 for a word of at least `LONG` letters, else 0; hyphens, apostrophes and digits are not letters.

    >>> plain_valence("landlord"), plain_valence("well-known"), plain_valence("sister's")
    (-1.0, -1.0, 0.0)
    """
    return -1.0 if sum(character.isalpha() for character in word) >= LONG else 0.0


GOLD_REWARDS: dict[str, GoldReward] = {
    "vader": GoldReward(lambda questions, answers: vader_scores(answers), word_truth(lexicon_valence)),
    "plain": GoldReward(lambda questions, answers: plain_scores(answers), word_truth(plain_valence)),
}


def gold_reward(name: str, setting: str = "the gold reward") -> GoldReward:
    """Return the gold reward called `name`, of `GOLD_REWARDS` or of an entry point, ready to use.

    Args:
        setting: what names it, for the message.

    Raises:
        UserError: the name is unknown, or a package that the reward needs is not installed.
    """
    added = {point.name: point for point in entry_points(group="sepo.gold_rewards")}
    if name not in GOLD_REWARDS and name not in added:
        known = [*GOLD_REWARDS, *sorted(added)]
        raise UserError(f"{setting} is '{name}'{nearest(name, known)}: expected one of {', '.join(known)}")
    reward = GOLD_REWARDS[name] if name in GOLD_REWARDS else added[name].load()
    reward.scores([], [])  # a missing package should be reported now, not after hours of training
    return reward
