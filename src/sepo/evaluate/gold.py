"""Gold rewards: known, independent rewards that judge a policy and are never trained on.

A gold reward is a function from a list of texts to one number a text. VADER (Hutto and Gilbert, ICWSM 2014) is a
human-rated sentiment lexicon with a few rules for negation, emphasis and contrast; it is deterministic, and it says
which words carry the reward, so that token rewards can be checked one by one (`fidelity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from sepo.errors import UserError, nearest

GoldReward = Callable[[Sequence[str]], np.ndarray]


@lru_cache(maxsize=1)
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(
            "the gold reward 'vader' needs the package vaderSentiment, which is not installed: "
            "run `pip install 'sepo[quickstart]'`"
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

    Case is ignored. This is the word on its own: the rules that a sentence adds ("not good") are not applied.

    >>> lexicon_valence("Good"), lexicon_valence("table")
    (1.9, 0.0)

    Raises:
        UserError: vaderSentiment is not installed.
    """
    return float(_analyzer().lexicon.get(word.lower(), 0.0))


GOLD_REWARDS: dict[str, GoldReward] = {"vader": vader_scores}


def gold_reward(name: str) -> GoldReward:
    """Return the gold reward called `name` (a key of `GOLD_REWARDS`), ready to use.

    Raises:
        UserError: no such reward, or what it needs is not installed.
    """
    if name not in GOLD_REWARDS:
        raise UserError(
            f"unknown gold reward '{name}'{nearest(name, GOLD_REWARDS)}: expected one of {', '.join(GOLD_REWARDS)}"
        )
    reward = GOLD_REWARDS[name]
    reward([])  # what is missing should be missed now, not after hours of training
    return reward
