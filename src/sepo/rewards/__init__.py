"""Wing: an oracle's rewards for any text, without preference pairs.

    token_rewards      the reward of every token of some responses
    sequence_reward    one reward a response, for best of n, filters and RL
    dense_reward       one reward a token, for RL (RTO's clamp and scale)
    RewardFunction     a reward function for TRL's GRPOTrainer and trainers alike

`sepo score` of a file without pairs and `sepo reward` use the same functions.
"""

from sepo.lazy import lazy_names

_MODULES = {
    "token_rewards": "function",
    "TokenRewards": "function",
    "sequence_reward": "signals",
    "dense_reward": "signals",
    "RewardFunction": "signals",
}

__all__ = sorted(_MODULES)

__getattr__ = lazy_names(__name__, {name: f"sepo.rewards.{module}" for name, module in _MODULES.items()})


def __dir__() -> list[str]:
    return __all__
