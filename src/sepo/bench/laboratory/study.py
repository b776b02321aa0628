"""The experiments of the laboratory: what a log-ratio estimates, how fast, and what perfect credit would gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from sepo.bench.laboratory.measures import TOP, accuracy, agreement, key_tokens, key_tokens_in_common
from sepo.bench.laboratory.training import (
    MODELS,
    Objective,
    contrast,
    dpo,
    draw_pairs,
    list_pairs,
    pair_chances,
    recurrent_model,
    train,
    train_oracle,
)
from sepo.bench.laboratory.tree import (
    KINDS,
    Array,
    advantage,
    along,
    best_gain,
    gain_and_kl,
    make_tree,
    random_start,
    rewards_of,
    value_change,
    values,
    visits,
)

INFINITE = "infinite"
LOW_KL = 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the laboratory.

    Attributes:
        seeds: number of worlds (another start, reward, sample and first weights each).
        beta: of DPO, and of the truth.
        spread: standard deviation of the reward of a response; 1 makes labels as noisy as those of people.
        sizes: numbers of pairs; a fifth of them decides when an oracle stops.
        policy_sizes: numbers of pairs of the policies and their oracles.
        kl: policies are compared at this KL from the start, in nats a response.
    """

    tokens: int = 4
    length: int = 5
    seeds: int = 8
    seed: int = 0
    beta: float = 0.5
    spread: float = 1.0
    sharpness: float = 1.0
    sizes: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    policy_sizes: tuple[int, ...] = (100, 1_000, 10_000)
    kl: float = 0.2
    gamma: float = 2.0
    oracle_steps: int = 240
    policy_steps: int = 80
    kinds: tuple[str, ...] = tuple(KINDS)


class World:
    """Starts and rewards of one kind, one for each seed, with everything that is known about them."""

    def __init__(self, settings: Settings, kind: str) -> None:
        self.settings = settings
        self.tree = make_tree(settings.tokens, settings.length)
        self.rng = np.random.default_rng([settings.seed, list(KINDS).index(kind)])
        self.start = random_start(self.tree, settings.seeds, self.rng, settings.sharpness)
        self.rewards = rewards_of(self.tree, kind, self.start, self.rng, settings.spread)
        self.chances = pair_chances(self.tree, self.start, self.rewards)
        self.weights = visits(self.tree, self.start)
        known = (self.tree, self.start, self.rewards)
        self.truths = {
            "advantage": advantage(*known, settings.beta),
            "start's advantage": advantage(*known, np.inf),
            "value change": value_change(*known, settings.beta),
            "Q": values(*known, settings.beta)[1],
            "token reward": self.rewards,
        }

    def agreements(self, score: Array, truth: str) -> dict[str, list[float]]:
        """The measures of a score against a truth, a list over seeds."""
        rows = [agreement(*row) for row in zip(score, self.truths[truth], self.weights, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def measure(self, score: Array) -> dict[str, Any]:
        """Everything about a token score."""
        advantages = self.truths["advantage"]
        return {
            **{truth: self.agreements(score, truth) for truth in self.truths},
            "key tokens": key_tokens_in_common(self.tree, score, advantages, self.chances)[0].tolist(),
            "accuracy": accuracy(self.tree, score, self.chances).tolist(),
        }

    def oracle(self, model: str, number: int, noise_free: bool = False) -> tuple[Array, Array]:
        """Token rewards s of an oracle of `number` pairs, and the shares of the pairs."""
        chances = pair_chances(self.tree, self.start, self.rewards, noise_free) if noise_free else self.chances
        held_out, rest = (draw_pairs(chances, size, self.rng) for size in (number // 5, number - number // 5))
        trained, _ = train_oracle(
            self.tree,
            self.start,
            self.settings.beta,
            MODELS[model](self.tree, self.start, self.rng),
            list_pairs(rest),
            list_pairs(held_out),
            self.settings.oracle_steps,
        )
        return trained - self.start, (rest * 4 + held_out) / 5

    def barely_trained(self, model: str, number: int) -> Array:
        """Token rewards s of an oracle where its KL from the start first passes `LOW_KL`."""
        pairs = list_pairs(draw_pairs(self.chances, number, self.rng))
        begun = MODELS[model](self.tree, self.start, self.rng)
        objective = dpo(self.tree, self.start, self.settings.beta)
        score, waiting = np.zeros_like(self.start), np.ones(len(self.start), bool)
        for logps in train(self.tree, begun, objective, pairs, 60):
            passed = gain_and_kl(self.tree, logps, self.start, self.rewards)[1] > LOW_KL
            score[waiting & passed] = (logps - self.start)[waiting & passed]
            waiting &= ~passed
        return score

    def label_counts(self, shares: Array, number: int) -> Array:
        """A score of the token alone: the standardised difference of its counts in chosen and rejected responses."""
        tokens = np.append(np.tile(np.arange(self.tree.tokens), len(self.tree.texts)), self.tree.tokens)
        counts = np.stack([(tokens[self.tree.paths] == token).sum(-1) for token in range(self.tree.tokens)], -1)
        chosen, rejected = number * shares.sum(2) @ counts, number * shares.sum(1) @ counts
        return np.broadcast_to(
            ((chosen - rejected) / np.sqrt(chosen + rejected + 1))[:, None, :], self.start.shape
        ).copy()


# --- oracles --------------------------------------------------------------------------------------------------------


def oracles_of(world: World) -> dict[str, Any]:
    """Measures of oracles by model and number of pairs, and of some that are not the usual ones."""
    settings = world.settings
    results: dict[str, Any] = {}
    for model in MODELS:
        rows: dict[str, Any] = {str(size): world.measure(world.oracle(model, size)[0]) for size in settings.sizes}
        results[model] = {"by pairs": rows, "rate": rates(rows, settings.sizes)}
        middle = sorted(settings.sizes)[len(settings.sizes) // 2]
        results[model]["noise-free labels"] = world.measure(world.oracle(model, middle, noise_free=True)[0])
        results[model]["barely trained"] = world.measure(world.barely_trained(model, max(settings.sizes)))
    exact = world.truths["advantage"] / settings.beta
    results["table"]["by pairs"][INFINITE] = world.measure(exact)
    return results


def rates(rows: dict[str, Any], sizes: tuple[int, ...]) -> list[float]:
    """Slope of log error against log pairs, for each seed: -1 halves the error with twice the pairs."""
    errors = np.log([np.maximum(rows[str(size)]["advantage"]["error"], 1e-12) for size in sizes])
    return [float(np.polyfit(np.log(sizes), seed, 1)[0]) for seed in errors.T]


# --- policies -------------------------------------------------------------------------------------------------------


def policies_of(world: World, number: int) -> dict[str, list[float]]:
    """What policies gain at one KL, as a share of the most that any policy could gain there, by method."""
    score, shares = world.oracle("recurrent", number)
    pairs = list_pairs(shares)
    most = best_gain(world.tree, world.start, world.rewards, world.settings.kl)
    first = int(world.rng.integers(2**31))  # all methods begin with the same weights
    return {
        method: (gain_at_kl(world, objective, pairs, first) / most).tolist()
        for method, objective in _methods(world, score, world.label_counts(shares, number)).items()
    }


def _methods(world: World, score: Array, counts: Array) -> dict[str, Objective]:
    tree, gamma, beta = world.tree, world.settings.gamma, world.settings.beta
    truth = world.truths["advantage"]

    def selected(scores: Array) -> Objective:
        return contrast(key_tokens(tree, scores, 1), key_tokens(tree, scores, -1), gamma)

    def dpo_on_selected(scores: Array) -> Objective:
        return Objective(beta * key_tokens(tree, scores, 1), beta * key_tokens(tree, scores, -1), world.start)

    def weighted(scores: Array) -> Objective:
        return contrast(np.maximum(along(tree, scores), 0), np.maximum(-along(tree, scores), 0), gamma)

    everything = np.broadcast_to(tree.real, (len(truth), *tree.paths.shape))
    return {
        "all tokens (SimPO)": contrast(everything, everything, gamma),
        "all tokens (DPO)": dpo(tree, world.start, beta),
        "random 30 %": selected(world.rng.normal(size=truth.shape)),
        "s, 30 %": selected(score),
        "s as weights": weighted(score),
        "label counts, 30 %": selected(counts),
        "advantage, 30 %": selected(truth),
        "advantage as weights": weighted(truth),
        "token reward, 30 %": selected(world.rewards),
        "s, 30 %, DPO": dpo_on_selected(score),
        "advantage, 30 %, DPO": dpo_on_selected(truth),
    }


def gain_at_kl(world: World, objective: Objective, pairs: Any, first: int) -> Array:
    """Gain of a policy where its training passes the KL, linear in √KL; of its furthest step if it does not."""
    model = recurrent_model(world.tree, world.start, np.random.default_rng(first))._replace(learning_rate=0.005)
    gains, kls = [], []
    for logps in train(world.tree, model, objective, pairs, world.settings.policy_steps):
        gain, kl = gain_and_kl(world.tree, logps, world.start, world.rewards)
        gains.append(gain)
        kls.append(np.sqrt(np.maximum(kl, 0)))
        if (np.max(kls, 0) ** 2 > world.settings.kl).all():
            break
    root = np.sqrt(world.settings.kl)
    return np.array([_read(*curve, root) for curve in zip(np.transpose(kls), np.transpose(gains), strict=True)])


def _read(roots: Array, gains: Array, root: float) -> float:
    passed = np.flatnonzero(roots > root)
    if not len(passed):
        return float(gains[np.argmax(roots)])
    after = passed[0]
    part = (root - roots[after - 1]) / (roots[after] - roots[after - 1])
    return float(gains[after - 1] + part * (gains[after] - gains[after - 1]))


# --- everything -----------------------------------------------------------------------------------------------------


def study_kind(settings: Settings, kind: str) -> dict[str, Any]:
    """All experiments with one kind of reward; every list is over seeds."""
    world = World(settings, kind)
    chance = key_tokens_in_common(world.tree, world.start, world.rewards, world.chances)[1]
    return {
        "accuracy of the reward": accuracy(world.tree, world.rewards, world.chances).tolist(),
        "key tokens by chance": chance,
        "advantages at beta": {
            str(beta): world.agreements(advantage(world.tree, world.start, world.rewards, beta), "start's advantage")
            for beta in (0.1, settings.beta, 2.0)
        },
        "oracles": oracles_of(world),
        "policies": {str(size): policies_of(world, size) for size in settings.policy_sizes},
    }


def study(settings: Settings, done: Callable[[str], None] = lambda kind: None, processes: int = 1) -> dict[str, Any]:
    """Run the laboratory, one kind of reward after the other or in several processes; the results are the same.

    Args:
        done: called with each kind when it is finished.
    """
    processes = min(processes, len(settings.kinds))
    run = partial(study_kind, settings)
    kinds = {}
    with ExitStack() as stack:
        if processes > 1:
            pool = ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))
            results = stack.enter_context(pool).map(run, settings.kinds)
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # threads only cost time on tensors this small
            results = map(run, settings.kinds)
        for kind, result in zip(settings.kinds, results, strict=True):
            kinds[kind] = result
            done(kind)
    return {"settings": dataclasses.asdict(settings), "top": TOP, "kinds": kinds}
