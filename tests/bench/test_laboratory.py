"""The laboratory of token credit, against formulas that enumerate responses one by one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats

from sepo.bench.laboratory import measures, training, tree
from sepo.bench.laboratory.study import Settings, World, study
from sepo.cli import main
from sepo.report import statistics

SIZES = [(3, 1), (2, 5), (4, 3), (5, 2)]


def world(tokens, length, seed=0, kind="local", seeds=2):
    rng = np.random.default_rng(seed)
    language = tree.make_tree(tokens, length)
    start = tree.random_start(language, seeds, rng)
    return language, start, tree.rewards_of(language, kind, start, rng)


def by_hand(language, table):
    """The sum of one seed's table over each response, as a dictionary from texts."""
    index = {text: at for at, text in enumerate(language.texts)}
    return {text: sum(table[index[text[:at]], token] for at, token in enumerate(text)) for text in language.responses}


@pytest.mark.parametrize(("tokens", "length"), SIZES)
def test_the_responses_are_all_there_and_their_chances_sum_to_one(tokens, length):
    language, start, _ = world(tokens, length)
    words = tokens - 1
    assert (
        len(set(language.responses)) == len(language.responses) == sum(words**n for n in range(length)) + words**length
    )
    assert sum(math.exp(value) for value in by_hand(language, start[0]).values()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(tree.total(language, start)[1], list(by_hand(language, start[1]).values()), atol=1e-12)
    written = {text: math.exp(value) for text, value in by_hand(language, start[0]).items()}
    for prefix, row in zip(language.texts, tree.visits(language, start)[0], strict=True):
        for token, chance in enumerate(row):
            begun = (*prefix, token)
            assert chance == pytest.approx(sum(p for text, p in written.items() if text[: len(begun)] == begun))


@pytest.mark.parametrize("kind", tree.KINDS)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_advantages_sum_to_the_reward_less_the_value_of_the_start(kind, beta):
    """Theorem 1 of SePO, in numbers."""
    language, start, rewards = world(4, 4, kind=kind)
    sums = tree.total(language, tree.advantage(language, start, rewards, beta))
    for seed in range(2):
        rewards_by_hand = np.array(list(by_hand(language, rewards[seed]).values()))
        chances = np.array(list(by_hand(language, start[seed]).values()))
        start_value = beta * special.logsumexp(chances + rewards_by_hand / beta)
        np.testing.assert_allclose(sums[seed], rewards_by_hand - start_value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tokens", "length"), SIZES)
def test_the_advantage_is_the_log_ratio_of_the_best_policy_over_responses(tokens, length):
    beta = 0.3
    language, start, rewards = world(tokens, length, kind="state")
    advantages = tree.advantage(language, start, rewards, beta)
    chances, paid = by_hand(language, start[0]), by_hand(language, rewards[0])
    best = {text: math.exp(chances[text] + paid[text] / beta) for text in chances}

    def conditional(mass, prefix, token):
        def begun(by):
            return sum(value for text, value in mass.items() if text[: len(by)] == by)

        return begun((*prefix, token)) / begun(prefix)

    plain = {text: math.exp(value) for text, value in chances.items()}
    for at, prefix in enumerate(language.texts):
        for token in range(tokens):
            ratio = conditional(best, prefix, token) / conditional(plain, prefix, token)
            assert advantages[0, at, token] == pytest.approx(beta * math.log(ratio), abs=1e-10)


def test_no_policy_has_a_higher_regularised_reward():
    beta = 0.4
    language, start, rewards = world(4, 3, seeds=1)
    value = tree.values(language, start, rewards, beta)[0][0, 0]
    base = (np.exp(tree.total(language, start)) * tree.total(language, rewards)).sum()
    best = start + tree.advantage(language, start, rewards, beta) / beta

    def regularised(policy):
        gain, kl = tree.gain_and_kl(language, policy, start, rewards)
        return (gain - beta * kl)[0] + base

    assert regularised(best) == pytest.approx(value, abs=1e-10)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(20):
            policy = tree.log_softmax(best + scale * rng.normal(size=best.shape))
            assert regularised(policy) < value
            gain, kl = tree.gain_and_kl(language, policy, start, rewards)
            assert gain[0] <= tree.best_gain(language, start, rewards, kl[0])[0] + 1e-9


def test_without_regularisation_the_advantage_is_that_of_the_starts_own_responses():
    language, start, rewards = world(4, 3, kind="order")
    advantages = tree.advantage(language, start, rewards, np.inf)
    chances, paid = by_hand(language, start[1]), by_hand(language, rewards[1])

    def expected(prefix):
        inside = [text for text in chances if text[: len(prefix)] == prefix]
        mass = [math.exp(chances[text]) for text in inside]
        return np.average([paid[text] for text in inside], weights=mass)

    for at, prefix in enumerate(language.texts):
        for token in range(4):
            gap = expected((*prefix, token)) - expected(prefix)
            assert advantages[1, at, token] == pytest.approx(gap, abs=1e-10)
    soft = tree.advantage(language, start, rewards, 1e6)
    np.testing.assert_allclose(soft, advantages, atol=1e-5)


def test_moving_reward_along_a_response_changes_neither_labels_nor_advantages():
    """What preferences cannot see of r: potential-based shaping."""
    language, start, rewards = world(4, 4, kind="late")
    potential = np.random.default_rng(1).normal(size=(2, len(language.texts)))
    after = np.where(language.children >= 0, potential[:, language.children], 0.0)
    shaped = rewards + after - potential[..., None]
    moved = tree.total(language, shaped) - tree.total(language, rewards)
    np.testing.assert_allclose(moved, np.broadcast_to(-potential[:, :1], moved.shape), atol=1e-12)
    chances = [training.pair_chances(language, start, reward) for reward in (rewards, shaped)]
    np.testing.assert_allclose(*chances, atol=1e-12)
    advantages = [tree.advantage(language, start, reward, 0.5) for reward in (rewards, shaped)]
    np.testing.assert_allclose(*advantages, atol=1e-10)
    assert np.abs(shaped - rewards).max() > 0.5


@pytest.mark.parametrize("kind", ["local", "late", "parity"])
def test_dpo_on_all_pairs_has_the_advantage_as_its_only_minimum(kind):
    """DPO's expected loss, written out over responses and minimised from two places, gives A at every token."""
    beta = 0.5
    language, start, rewards = world(3, 2, kind=kind, seeds=1)
    paid = np.array(list(by_hand(language, rewards[0]).values()))
    chance = np.exp(list(by_hand(language, start[0]).values()))
    wins = np.outer(chance, chance) * special.expit(np.subtract.outer(paid, paid))

    def loss(logits):
        policy = special.log_softmax(logits.reshape(start[0].shape), axis=1)
        ratio = np.array(list(by_hand(language, policy - start[0]).values()))
        return -(wins * special.log_expit(beta * np.subtract.outer(ratio, ratio))).sum()

    advantages = tree.advantage(language, start, rewards, beta)[0]
    for seed in (None, 0):
        begin = start[0] if seed is None else np.random.default_rng(seed).normal(size=start[0].shape)
        found = optimize.minimize(loss, begin.ravel(), method="BFGS", options={"gtol": 1e-8, "maxiter": 2000})
        score = special.log_softmax(found.x.reshape(begin.shape), axis=1) - start[0]
        np.testing.assert_allclose(beta * score, advantages, atol=2e-3)


def test_the_first_step_of_dpo_is_visits_times_the_starts_advantage_of_winning():
    """Why an oracle that was hardly trained estimates another truth: the reward there is the chance to win."""
    beta = 0.5
    language, start, rewards = world(4, 3)
    chances = training.pair_chances(language, start, rewards)
    model = training.table_model(language, start, np.random.default_rng(0))
    sums = beta * (model.logps() - torch.from_numpy(start))
    sums = torch.nn.functional.pad(sums.flatten(1), (0, 1))[:, torch.from_numpy(language.paths)].sum(-1)
    score = sums.detach().numpy()
    gradients = training.pair_gradient(training.list_pairs(chances), score, score)
    torch.autograd.backward([sums, sums], [torch.from_numpy(gradient) for gradient in gradients])

    chance = np.exp(tree.total(language, start))
    reward = tree.total(language, rewards)
    winning = (special.expit(reward[:, :, None] - reward[:, None, :]) * chance[:, None, :]).sum(-1)
    as_reward = np.zeros_like(rewards)
    as_reward.reshape(2, -1)[:, language.last] = winning
    step = tree.visits(language, start) * tree.advantage(language, start, as_reward, np.inf)
    scale = 2 * beta / (1 - (chance**2).sum(-1))[:, None, None]
    np.testing.assert_allclose(-model.parameters[0].grad.numpy(), scale * step, atol=1e-12)


def test_the_gradient_of_the_pair_loss_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    plus, minus = (torch.from_numpy(rng.normal(size=(2, 5))).requires_grad_() for _ in range(2))
    shares = rng.multinomial(20, np.full(25, 0.04), size=2).reshape(2, 5, 5) / 20
    gaps = plus[:, :, None] - minus[:, None, :]
    losses = -(torch.from_numpy(shares) * torch.nn.functional.logsigmoid(gaps)).sum((1, 2))
    losses.sum().backward()
    pairs = training.list_pairs(shares)
    values = plus.detach().numpy(), minus.detach().numpy()
    np.testing.assert_allclose(training.pair_loss(pairs, *values), losses.detach().numpy(), atol=1e-12)
    for ours, theirs in zip(training.pair_gradient(pairs, *values), (plus, minus), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-12)


def test_pairs_are_drawn_and_labelled_by_bradley_terry():
    language, start, rewards = world(3, 2, seeds=1)
    chances = training.pair_chances(language, start, rewards)[0]
    paid = tree.total(language, rewards)[0]
    labels = chances / (chances + chances.T + np.eye(len(paid)))
    expected = special.expit(np.subtract.outer(paid, paid)) * (1 - np.eye(len(paid)))
    np.testing.assert_allclose(labels, expected, atol=1e-12)
    drawn = training.draw_pairs(chances[None], 200_000, np.random.default_rng(0))[0]
    assert np.abs(drawn - chances).max() < 5 * np.sqrt(chances.max() / 200_000)
    noise_free = training.pair_chances(language, start, rewards, noise_free=True)[0]
    assert (np.subtract.outer(paid, paid)[noise_free > 0] > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_measures_with_equal_weights_are_the_usual_ones_and_weights_are_repetitions(seed):
    rng = np.random.default_rng(seed)
    score, truth = np.round(rng.normal(size=(2, 40)), 1)
    measured = measures.agreement(score, truth, np.ones(40))
    assert measured["pearson"] == pytest.approx(np.corrcoef(score, truth)[0, 1])
    assert measured["spearman"] == pytest.approx(stats.spearmanr(score, truth).statistic)
    scale = (score @ truth) / (score @ score)
    assert measured["error"] == pytest.approx(((scale * score - truth) ** 2).sum() / (truth @ truth))
    ranks = stats.rankdata(truth)  # of the middle of ties, as `_auc` cuts them
    best = (ranks - 0.5) / 40 > 0.7 + 1e-9
    assert measured["auc"] == pytest.approx(statistics.auc(score[best], score[~best]))
    weights = rng.integers(1, 4, 40)
    repeated = measures.agreement(np.repeat(score, weights), np.repeat(truth, weights), np.ones(weights.sum()))
    assert measures.agreement(score, truth, weights) == pytest.approx(repeated)


def test_a_score_that_says_nothing_finds_nothing():
    truth = np.arange(10.0)
    measured = measures.agreement(np.zeros(10), truth, np.ones(10))
    assert measured == pytest.approx({"pearson": 0.0, "spearman": 0.0, "error": 1.0, "auc": 0.5})


def test_key_tokens_are_the_best_of_each_response_and_at_least_one():
    language, start, _ = world(3, 7)
    index = {text: at for at, text in enumerate(language.texts)}
    for side in (1, -1):
        chosen = measures.key_tokens(language, start, side)
        for row, text in zip(chosen[0], language.responses, strict=True):
            scores = [side * start[0, index[text[:at]], token] for at, token in enumerate(text)]
            best = sorted(range(len(text)), key=lambda at: -scores[at])[: max(1, int(0.3 * len(text)))]
            assert sorted(np.flatnonzero(row)) == sorted(best)


@pytest.mark.parametrize("model", training.MODELS)
@pytest.mark.parametrize("kind", ["local", "order"])
@pytest.mark.daily(2)
def test_an_oracle_of_more_pairs_is_nearer_to_the_advantage(kind, model):
    made = World(Settings(length=3, seeds=4, oracle_steps=160), kind)
    errors = []
    for number in (100, 3_000, 100_000):
        measured = made.agreements(made.oracle(model, number)[0], "advantage")
        errors.append(np.mean(measured["error"]))
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]
    assert errors[2] < 0.06


SMALL = Settings(length=3, seeds=2, sizes=(50, 200), policy_sizes=(50,), oracle_steps=10, policy_steps=10,
                 kinds=("late", "parity"))  # fmt: skip


def test_the_study_repeats_itself_and_the_exact_oracle_is_perfect():
    first, second = study(SMALL), study(SMALL)
    assert first == second
    exact = first["kinds"]["late"]["oracles"]["table"]["by pairs"]["infinite"]
    assert np.mean(exact["advantage"]["pearson"]) == pytest.approx(1)
    assert exact["key tokens"] == pytest.approx([1, 1])


def test_the_command_writes_a_page_a_figure_and_all_numbers(tmp_path, capsys):
    words = ["--kinds", "late", "--pairs", "20", "40", "--seeds", "2", "--length", "2", "--out", str(tmp_path / "lab")]
    assert main(["bench", "laboratory", *words]) == 0
    assert "What s estimates" in capsys.readouterr().out
    assert json.loads((tmp_path / "lab/laboratory.json").read_text())["settings"]["sizes"] == [20, 40]
    assert "late, exact" in (tmp_path / "lab/laboratory.md").read_text()
    assert (tmp_path / "lab/error.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words",
    [
        ["--kinds", "lat"],
        ["--pairs", "3"],
        ["--seeds", "1"],
        ["--seed", "-1"],
        ["--beta", "0"],
        ["--kl", "nan"],
        ["--length", "9"],
    ],
)
def test_bad_settings_end_in_one_line(words, tmp_path, capsys):
    assert main(["bench", "laboratory", "--out", str(tmp_path), *words]) == 2
    assert words[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
