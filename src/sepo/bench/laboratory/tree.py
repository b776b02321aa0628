"""A language small enough to enumerate, its rewards, and exact values.

A prefix is followed by one of a few tokens, one of which ends the response; after `length` tokens a response is cut. So
the responses are the leaves of a tree. A table `[..., prefixes, tokens]` holds one number for each token after each
prefix, which is all that a model, a reward or an advantage is here. Leading dimensions are seeds.

**What DPO can identify.** Let R be the sum of the token rewards r of a response. The policy that maximises
E R − β KL(π ‖ π_ref) is π*(y) ∝ π_ref(y) exp(R(y) / β). With the soft values

    V(prefix) = β log Σ_a π_ref(a | prefix) exp(Q(prefix, a) / β),  Q(prefix, a) = r(prefix, a) + V(prefix + a),

it satisfies β log π*/π_ref = Q − V = A at every token, and Σ A = R − V(start) over a response (SePO's Theorem 1;
Rafailov et al. 2024, "From r to Q*", 2404.12358). DPO's expected loss, with every response in reach and a model
that can represent π*, has π* as its only minimum. The loss fixes β log π/π_ref of a response up to one constant,
and normalisation fixes the constant. The token values follow, because a distribution of responses has only one set
of conditional probabilities. Nothing is left free.

Preferences cannot identify r. Moving reward along the response by a potential φ, r + φ(prefix + a) − φ(prefix) with
φ = 0 at the end (Ng et al. 1999), changes every R by −φ(start), and therefore no label. All these r share one A, the
member of the class with Σ_a π_ref exp(A / β) = 1 after every prefix. A log-ratio can only be that one.

For β → ∞, A becomes the advantage of π_ref itself: V(prefix) is then the expected reward to come. Another truth holds
at the beginning of a training: the first gradient of DPO moves a logit by the chance of its token x the advantage of
π_ref for the reward "chance to win against a random response", to first order in R the same as R.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Tree:
    """The prefixes and responses of the language.

    Attributes:
        texts: the tokens of each prefix, shortest first; token `tokens - 1` is the end token and never inside a prefix.
        children: `[prefixes, tokens]`, the prefix after a token; -1 where the response is over.
        levels: prefixes of equal length, as slices, shortest first.
        paths: `[responses, length]`, where the tokens of a response lie in a flat table; padded with its size.
    """

    tokens: int
    length: int
    texts: list[tuple[int, ...]]
    children: Array
    levels: list[slice]
    paths: Array

    @property
    def real(self) -> Array:
        """`[responses, length]`: True where there is a token."""
        return self.paths < self.children.size

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """The tokens of each response."""
        return [self.texts[path[0] // self.tokens] + (path[0] % self.tokens,) for path in self._last]

    @property
    def last(self) -> Array:
        """`[responses]`: where the last token of each response lies in a flat table."""
        return self._last[:, 0]

    @property
    def _last(self) -> Array:
        return np.take_along_axis(self.paths, self.real.sum(1, keepdims=True) - 1, axis=1)


def make_tree(tokens: int = 4, length: int = 5) -> Tree:
    """All responses of at most `length` tokens out of `tokens`, the last of which ends a response."""
    texts: list[tuple[int, ...]] = [()]
    counts = [0, 1]
    for _ in range(length - 1):
        texts += [(*text, token) for text in texts[counts[-2] :] for token in range(tokens - 1)]
        counts.append(len(texts))
    index = {text: at for at, text in enumerate(texts)}
    children = np.array([[index.get((*text, token), -1) for token in range(tokens)] for text in texts])
    leaves = [(*text, token) for at, text in enumerate(texts) for token in range(tokens) if children[at, token] < 0]
    paths = np.full((len(leaves), length), children.size)
    for row, leaf in zip(paths, leaves, strict=True):
        row[: len(leaf)] = [index[leaf[:at]] * tokens + token for at, token in enumerate(leaf)]
    return Tree(tokens, length, texts, children, [slice(*ends) for ends in pairwise(counts)], paths)


# --- tables ---------------------------------------------------------------------------------------------------------


def along(tree: Tree, table: Array) -> Array:
    """The values of a table at the tokens of each response: `[..., responses, length]`, 0 where there is no token."""
    flat = table.reshape(*table.shape[:-2], -1)
    return np.concatenate([flat, np.zeros_like(flat[..., :1])], -1)[..., tree.paths]


def total(tree: Tree, table: Array) -> Array:
    """The sum of a table over the tokens of each response: `[..., responses]`."""
    return along(tree, table).sum(-1)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities of logits over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def visits(tree: Tree, logps: Array) -> Array:
    """The probability that a response of this model has this token after this prefix: `[..., prefixes, tokens]`."""
    reach = np.zeros(logps.shape[:-1])
    reach[..., 0] = 1.0
    for level in tree.levels[:-1]:
        going = tree.children[level] >= 0
        reach[..., tree.children[level][going]] = (reach[..., level, None] * np.exp(logps[..., level, :]))[..., going]
    return reach[..., None] * np.exp(logps)


# --- start and rewards ----------------------------------------------------------------------------------------------


def random_start(
    tree: Tree, seeds: int, rng: np.random.Generator, sharpness: float = 1.0, ending: float = 0.12
) -> Array:
    """Log-probabilities of random models, a next-token distribution for every prefix.

    Args:
        sharpness: standard deviation of the logits; 0 is the highest entropy.
        ending: probability of the end token where all logits are equal.
    """
    logits = sharpness * rng.normal(size=(seeds, *tree.children.shape))
    logits[..., -1] += np.log(ending / (1 - ending) * (tree.tokens - 1))
    return log_softmax(logits)


KINDS = {
    "local": "a value for each token, wherever it occurs",
    "state": "a value for each token after each token",
    "late": "paid at the last token, for the first one",
    "order": "paid at the last token, if the first token of two kinds is in the right order",
    "parity": "paid at the last token, if one token occurs an odd number of times",
    "length": "paid at the last token, for every token of the response",
}


def rewards_of(tree: Tree, kind: str, start: Array, rng: np.random.Generator, spread: float = 1.0) -> Array:
    """Token rewards `[seeds, prefixes, tokens]` of one kind, with a standard deviation of `spread` over responses.

    Random values are drawn anew for each seed. The standard deviation is that of the start's responses.
    """
    seeds, end = len(start), tree.tokens - 1
    rewards = np.zeros_like(start)
    if kind in ("local", "state"):
        before = np.array([text[-1] if text and kind == "state" else end for text in tree.texts])
        rewards[..., :-1] = rng.normal(size=(seeds, tree.tokens, end))[:, before]
    else:
        values = rng.normal(size=(seeds, end)) if kind == "late" else np.ones((seeds, 1))
        paid = np.stack([values @ _property(kind, response, end) for response in tree.responses], -1)
        rewards.reshape(seeds, -1)[:, tree.last] = paid
    chance, sums = np.exp(total(tree, start)), total(tree, rewards)
    mean = (chance * sums).sum(-1, keepdims=True)
    return spread * rewards / np.sqrt((chance * (sums - mean) ** 2).sum(-1))[:, None, None]


def _property(kind: str, response: tuple[int, ...], end: int) -> Array:
    """What a reward of a whole response depends on, as a vector that is multiplied with the seed's values."""
    words = [token for token in response if token != end]
    if kind == "late":
        return np.array([float(words[:1] == [token]) for token in range(end)])
    if kind == "order":
        firsts = [words.index(token) if token in words else len(words) for token in (0, 1)]
        return np.array([float(firsts[0] < firsts[1] < len(words))])
    return np.array([float(words.count(0) % 2 if kind == "parity" else len(words))])


# --- exact values ---------------------------------------------------------------------------------------------------


def values(tree: Tree, start: Array, rewards: Array, beta: float) -> tuple[Array, Array]:
    """V `[..., prefixes]` and Q `[..., prefixes, tokens]`, regularised by `beta` KL from the start.

    `beta = inf` gives those of the start itself.
    """
    value = np.zeros(start.shape[:-1])
    q = np.array(rewards, np.float64)
    for level in reversed(tree.levels):
        after = tree.children[level]
        q[..., level, :] += np.where(after >= 0, value[..., after], 0.0)
        here = start[..., level, :]
        if np.isinf(beta):
            value[..., level] = (np.exp(here) * q[..., level, :]).sum(-1)
        else:
            exponents = here + q[..., level, :] / beta
            highest = exponents.max(-1, keepdims=True)
            value[..., level] = beta * (np.log(np.exp(exponents - highest).sum(-1)) + highest[..., 0])
    return value, q


def advantage(tree: Tree, start: Array, rewards: Array, beta: float) -> Array:
    """A = Q − V at every token."""
    value, q = values(tree, start, rewards, beta)
    return q - value[..., None]


def value_change(tree: Tree, start: Array, rewards: Array, beta: float) -> Array:
    """V after a token minus V before it; V is 0 after the last token."""
    value, _ = values(tree, start, rewards, beta)
    return np.where(tree.children >= 0, value[..., tree.children], 0.0) - value[..., None]


def gain_and_kl(tree: Tree, policy: Array, start: Array, rewards: Array) -> tuple[Array, Array]:
    """Expected reward of a policy above the start's, and its KL from the start, in nats a response."""
    log_policy, log_start, reward = total(tree, policy), total(tree, start), total(tree, rewards)
    chance = np.exp(log_policy)
    return ((chance - np.exp(log_start)) * reward).sum(-1), (chance * (log_policy - log_start)).sum(-1)


def best_gain(tree: Tree, start: Array, rewards: Array, kl: float) -> Array:
    """The highest gain that any policy has at this KL, `[seeds]`: π_ref exp(R / β) at the β that ends there."""
    reward, log_start = total(tree, rewards), total(tree, start)
    low, high = np.full(len(start), -7.0), np.full(len(start), 7.0)  # log β
    for _ in range(60):
        middle = (low + high) / 2
        log_policy = log_softmax(log_start + reward / np.exp(middle)[:, None])
        reached = (np.exp(log_policy) * (log_policy - log_start)).sum(-1)
        low, high = np.where(reached > kl, middle, low), np.where(reached > kl, high, middle)
    return ((np.exp(log_policy) - np.exp(log_start)) * reward).sum(-1)
