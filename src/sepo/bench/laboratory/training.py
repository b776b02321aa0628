"""Oracles and policies of the laboratory: pairs, models, and training by exact gradients over all pairs.

Pairs are a matrix, `[seeds, responses, responses]`: the share of pairs in which the first response won against the
second. Equal pairs count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from sepo.bench.laboratory.tree import Array, Tree, total


def pair_chances(tree: Tree, start: Array, rewards: Array, noise_free: bool = False) -> Array:
    """Probability of each labelled pair: two different responses of the start, labelled by Bradley-Terry on R.

    With `noise_free` the better response always wins, and ties are left out.
    """
    chance, reward = np.exp(total(tree, start)), total(tree, rewards)
    gap = reward[:, :, None] - reward[:, None, :]
    wins = (gap > 1e-12).astype(float) if noise_free else 1 / (1 + np.exp(-gap))
    pairs = chance[:, :, None] * chance[:, None, :] * wins * (1 - np.eye(chance.shape[1]))
    return pairs / pairs.sum((1, 2), keepdims=True)


class Pairs(NamedTuple):
    """Different pairs of all seeds in one list, each with its share of the seed's pairs.

    Attributes:
        winner, loser: `seed * responses + response`.
    """

    winner: Array
    loser: Array
    share: Array


def list_pairs(shares: Array) -> Pairs:
    """The pairs of a matrix `[seeds, winners, losers]`."""
    seed, winner, loser = np.nonzero(shares)
    first = seed * shares.shape[1]
    return Pairs(first + winner, first + loser, shares[seed, winner, loser])


def draw_pairs(chances: Array, number: int, rng: np.random.Generator) -> Array:
    """Shares of `number` random pairs, in the form of `chances`."""
    counts = rng.multinomial(number, chances.reshape(len(chances), -1))
    return counts.reshape(chances.shape) / number


def pair_loss(pairs: Pairs, plus: Array, minus: Array) -> Array:
    """−Σ log σ(plus of the winner − minus of the loser), one number a seed."""
    losses = pairs.share * np.logaddexp(0.0, minus.ravel()[pairs.loser] - plus.ravel()[pairs.winner])
    return np.bincount(pairs.winner // plus.shape[1], losses, len(plus))


def pair_gradient(pairs: Pairs, plus: Array, minus: Array) -> tuple[Array, Array]:
    """Gradient of `pair_loss` with respect to `plus` and `minus`."""
    wrong = pairs.share / (1 + np.exp(plus.ravel()[pairs.winner] - minus.ravel()[pairs.loser]))
    gradients = (np.bincount(place, wrong, plus.size).reshape(plus.shape) for place in (pairs.winner, pairs.loser))
    return -next(gradients), next(gradients)


# --- models ---------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Parameters, and the function from them to the log-probabilities of every token after every prefix."""

    parameters: list[torch.Tensor]
    logps: Callable[[], torch.Tensor]
    learning_rate: float


def table_model(tree: Tree, start: Array, rng: np.random.Generator) -> Model:
    """A logit for every token after every prefix: any policy can be represented, nothing is shared between prefixes."""
    change = torch.zeros(start.shape, dtype=torch.float64, requires_grad=True)
    base = torch.from_numpy(start)
    return Model([change], lambda: torch.log_softmax(base + change, -1), 0.05)


def recurrent_model(tree: Tree, start: Array, rng: np.random.Generator, width: int = 16) -> Model:
    """A recurrent network that reads the prefix and changes the start's logits: it generalises between prefixes.

    Its last layer begins at 0, so that it begins at the start.
    """
    seeds = len(start)

    def parameter(*shape: int, scale: float) -> torch.Tensor:
        return torch.from_numpy(scale * rng.normal(size=(seeds, *shape))).requires_grad_()

    first, words = parameter(1, width, scale=1.0), parameter(tree.tokens - 1, width, scale=1.0)
    inner, bias = parameter(width, width, scale=width**-0.5), parameter(1, width, scale=0.1)
    last = parameter(width, tree.tokens, scale=0.0)
    base = torch.from_numpy(start)

    def logps() -> torch.Tensor:
        states = [torch.tanh(first)]  # [seeds, prefixes of one length, width]
        for _ in tree.levels[1:]:
            read = (states[-1] @ inner + bias)[:, :, None, :] + words[:, None, :, :]
            states.append(torch.tanh(read.flatten(1, 2)))
        return torch.log_softmax(base + torch.cat(states, 1) @ last, -1)

    return Model([first, words, inner, bias, last], logps, 0.02)


MODELS = {"table": table_model, "recurrent": recurrent_model}

# --- training -------------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """plus and minus of a response: weighted sums of its log-probabilities, less those of the start.

    Attributes:
        chosen, rejected: weights `[seeds, responses, length]` of the tokens of a response on either side.
        reference: the start's log-probabilities, or None.
    """

    chosen: Array
    rejected: Array
    reference: Array | None = None


def dpo(tree: Tree, start: Array, beta: float) -> Objective:
    """DPO (2305.18290): β Σ log π/π_ref over all tokens."""
    weights = np.broadcast_to(beta * tree.real, (len(start), *tree.paths.shape))
    return Objective(weights, weights, start)


def contrast(chosen: Array, rejected: Array, gamma: float) -> Objective:
    """SePO (2408.13518) with token weights: γ times the weighted mean of log π. With all weights equal it is SimPO."""

    def mean(weights: Array) -> Array:
        return gamma * weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)

    return Objective(mean(chosen), mean(rejected))


def train(tree: Tree, model: Model, objective: Objective, pairs: Pairs, steps: int) -> Iterator[Array]:
    """Log-probabilities of the model, before training and after each step of Adam on all pairs."""
    optimizer = torch.optim.Adam(model.parameters, lr=model.learning_rate)
    paths = torch.from_numpy(tree.paths)
    chosen, rejected = torch.from_numpy(objective.chosen * 1.0), torch.from_numpy(objective.rejected * 1.0)
    reference = 0.0 if objective.reference is None else torch.from_numpy(objective.reference)
    for step in range(steps + 1):
        logps = model.logps()
        yield logps.detach().numpy()
        if step == steps:
            return
        ratios = torch.nn.functional.pad((logps - reference).flatten(1), (0, 1))[:, paths]
        plus, minus = (ratios * chosen).sum(-1), (ratios * rejected).sum(-1)
        gradients = pair_gradient(pairs, plus.detach().numpy(), minus.detach().numpy())
        optimizer.zero_grad()
        torch.autograd.backward([plus, minus], [torch.from_numpy(gradient) for gradient in gradients])
        optimizer.step()


def train_oracle(
    tree: Tree, start: Array, beta: float, model: Model, pairs: Pairs, held_out: Pairs, steps: int
) -> tuple[Array, Array]:
    """Train an oracle by DPO; keep what each seed had where the loss of its held-out pairs was lowest.

    Returns:
        the oracle's log-probabilities, and the step of each seed.
    """
    best, lowest, at = start.copy(), np.full(len(start), np.inf), np.zeros(len(start), int)
    for step, logps in enumerate(train(tree, model, dpo(tree, start, beta), pairs, steps)):
        if step % 5 == 0:
            reward = beta * total(tree, logps - start)
            loss = pair_loss(held_out, reward, reward)
            better = loss < lowest
            best[better], lowest[better], at[better] = logps[better], loss[better], step
        if step > 40 + 2 * at.max():  # no seed has improved for long
            break
    return best, at
