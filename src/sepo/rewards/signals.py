"""Rewards for RL and for choosing among answers, from token rewards.

    sequence    β Σ_t s_t: the DPO reward of a response, up to a term of the prompt alone
                (Rafailov et al. 2023, arXiv 2305.18290, eq. 5)
    dense       clamp(0.05 s_t, −0.05, 0.05) at each token, and a score of the whole response at its last token
                (RTO: Zhong et al. 2024, arXiv 2404.18922; the numbers are those of its published training)

RTO subtracts a KL penalty of the policy at each token as well, which an RL trainer adds itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sepo.data.ragged import flat, segment_sums
from sepo.errors import UserError, check_number, wrong_type
from sepo.rewards.answers import tokenize_answers
from sepo.rewards.function import TokenRewards, load_scorers

RTO_SCALE, RTO_CLAMP = 0.05, 0.05
Rewards = Sequence[TokenRewards] | Sequence[np.ndarray] | Sequence[Sequence[float]]


def sequence_reward(rewards: Rewards, *, beta: float = 0.1, mean: bool = False) -> np.ndarray:
    """The reward of each response: β times the sum of its token rewards.

    Args:
        rewards: of each response its `TokenRewards`, or s of its tokens in nats `[tokens]`.
        beta: of the oracle's training; it changes no order.
        mean: divide by the number of tokens. The sum grows with the length of a response where an oracle prefers long
            ones.

    Returns:
        `[responses]` float64. Only differences between responses to one prompt have a meaning.

    Raises:
        UserError: a response has no token, or a reward that is not finite.
    """
    check_number("beta", beta, above=0)
    values = [_finite(number, item) for number, item in enumerate(_listed(rewards))]
    return np.array([beta * (row.mean() if mean else row.sum()) for row in values], np.float64)


def dense_reward(
    rewards: Rewards,
    *,
    scale: float = RTO_SCALE,
    clamp: float = RTO_CLAMP,
    final: Sequence[float] | np.ndarray | None = None,
) -> list[np.ndarray]:
    """The reward of each token: clamp(scale · s, ±clamp), and `final` at the last token of each response.

    Args:
        rewards: as in `sequence_reward`.
        scale: 0.05 in RTO, the β of its DPO model times its weight of token rewards.
        clamp: largest size of a token's reward, before `final` is added.
        final: a score of each response, such as a reward model's, `[responses]`.

    Returns:
        of each response `[tokens]` float64.

    Raises:
        UserError: as in `sequence_reward`; or `final` has another length, or is not finite.
    """
    check_number("scale", scale, above=0)
    check_number("clamp", clamp, above=0)
    values = [np.clip(scale * _finite(number, item), -clamp, clamp) for number, item in enumerate(_listed(rewards))]
    if final is not None:
        scores = np.asarray(final, np.float64)
        if scores.shape != (len(values),) or not np.isfinite(scores).all():
            raise UserError(
                f"final holds {scores.size} scores: expected a finite one for each of {len(values)} responses"
            )
        for row, score in zip(values, scores, strict=True):
            row[-1] += score
    return values


def _listed(rewards: Any) -> list[Any]:
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Sequence | np.ndarray):
        raise wrong_type("rewards", rewards, "a list: the rewards of each response, such as token_rewards returns")
    return list(rewards)


def _finite(number: int, item: Any) -> np.ndarray:
    values = np.asarray(item.rewards if isinstance(item, TokenRewards) else item)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "fiu":
        raise UserError(f"the rewards of response {number + 1} are no list of at least one number")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"response {number + 1} has a token reward that is not finite")
    return values


class RewardFunction:
    """An oracle's reward as a function of prompts and completions, for TRL's GRPOTrainer (`reward_funcs`) and RLOO.

    The models are loaded once. In a call the prompt of a group is read once for all of its completions.

    Args:
        oracle, reference, oracle_tokenizer, device, tokens_per_row: as in `token_rewards`.
        beta, mean: as in `sequence_reward`.
        as_chat: wrap prompts that are texts as one user turn.
        name: under which the trainer logs the reward.

    Example:
        >>> reward = RewardFunction("oracle", "base")  # doctest: +SKIP
        >>> GRPOTrainer("policy", reward_funcs=reward, train_dataset=prompts)  # doctest: +SKIP
    """

    def __init__(
        self,
        oracle: Any,
        reference: Any = None,
        *,
        beta: float = 0.1,
        mean: bool = False,
        oracle_tokenizer: Any = None,
        as_chat: bool = False,
        device: str = "auto",
        tokens_per_row: int | None = None,
        name: str = "oracle_reward",
    ):
        check_number("beta", beta, above=0)
        self.scorers = load_scorers(oracle, reference, oracle_tokenizer=oracle_tokenizer, device=device)
        self.beta, self.mean, self.as_chat, self.tokens_per_row = beta, mean, as_chat, tokens_per_row
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        """The reward of each completion; None, which TRL leaves out, where it is empty or cannot be read.

        Args:
            prompts: texts, or lists of messages.
            completions: texts, or lists of one assistant message.
        """
        if len(prompts) != len(completions):
            raise UserError(f"there are {len(prompts)} prompts and {len(completions)} completions: expected as many")
        rows = [
            {"row": number, "answer": 0, "prompt": prompt, "chosen": completion}
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        table, _report = tokenize_answers(rows, self.scorers.tokenizer, as_chat=self.as_chat)
        results: list[float | None] = [None] * len(rows)
        if len(table):
            values, lengths = flat(self.scorers.scores(table, self.tokens_per_row).column("chosen_rewards"))
            sums = segment_sums(values, lengths)
            rewards = self.beta * (sums / lengths if self.mean else sums)
            for row, reward in zip(table.column("row").to_pylist(), rewards.tolist(), strict=True):
                results[row] = reward
        return results
