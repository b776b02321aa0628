"""Every objective agrees with its published formula, written out token by token, and with TRL if TRL has it."""

import math
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_objectives import TEXTS, assert_same_gradients, gradients_of, our_step

from pairs import awkward_pairs, pairs_table
from sepo.data.tables import PAIR_WEIGHT, make_table
from sepo.errors import UserError
from sepo.forward.packing import CHOSEN, REJECTED, Pair, pack
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps
from sepo.forward.token_kl import token_logps_and_kl
from sepo.recipe.objectives import OBJECTIVES, Objective, names_with_label_smoothing
from sepo.recipe.reading import parse_recipe
from sepo.recipe.settings import PolicySettings
from sepo.training import objectives
from sepo.training.objectives import (
    LOSSES,
    LossSettings,
    PairSums,
    below_mean_probability,
    pair_losses,
    selective_marks,
)
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

SETTINGS = {"beta": 0.3, "gamma": 1.7, "margin": 0.4}


# --- the formulas, token by token -----------------------------------------------------------------------------------


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def responses(model, reference, pair):
    """For each side: rows of (logp, reference logp, forward KL, reverse KL), one per token; and the token weights."""
    for side in (CHOSEN, REJECTED):
        ids, positions, weights = pair.side(side)
        tokens = torch.tensor([[*pair.prompt_ids, *ids]])
        first = len(pair.prompt_ids)
        policy = model(input_ids=tokens, use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            frozen = reference(input_ids=tokens, use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
        rows = []
        for t, token in enumerate(ids):
            forward = sum(frozen[t].exp() * (frozen[t] - policy[t]))
            reverse = sum(policy[t].exp() * (policy[t] - frozen[t]))
            rows.append((policy[t, token], frozen[t, token], forward, reverse))
        keep = range(len(ids)) if positions is None else positions
        weight_of = dict(zip(keep, weights or [1.0] * len(ids), strict=False))
        yield rows, [weight_of.get(t, 0.0) for t in range(len(ids))]


def published_loss(objective, model, reference, pair, alpha=None, smoothing=0.0):
    (chosen, chosen_weights), (rejected, rejected_weights) = responses(model, reference, pair)
    alpha = OBJECTIVES[objective].alpha if alpha is None else alpha
    formulas = Formulas(chosen, rejected, chosen_weights, rejected_weights, alpha, smoothing, **SETTINGS)
    return getattr(formulas, objective)()


def total(rows):
    return sum(row[0] for row in rows)


def mean(rows):
    return total(rows) / len(rows)


def log_ratio(rows):
    return sum(row[0] - row[1] for row in rows)


@dataclass
class Formulas:
    """The published losses of one pair; rows are those of `responses`."""

    chosen: list
    rejected: list
    chosen_weights: list[float]
    rejected_weights: list[float]
    alpha: float | None
    smoothing: float
    beta: float
    gamma: float
    margin: float

    @property
    def weighted(self):
        sides = (self.chosen_weights, self.chosen), (self.rejected_weights, self.rejected)
        return [list(zip(weights, rows, strict=True)) for weights, rows in sides]

    def smooth(self, x):
        return -(1 - self.smoothing) * log_sigmoid(x) - self.smoothing * log_sigmoid(-x)

    def sepo(self):
        chosen, rejected = (sum(w * row[0] for w, row in side) for side in self.weighted)
        difference = self.gamma * chosen / sum(self.chosen_weights) - self.gamma * rejected / sum(self.rejected_weights)
        return self.smooth(difference - self.margin)

    def simpo(self):
        return self.smooth(self.gamma * mean(self.chosen) - self.gamma * mean(self.rejected) - self.margin)

    def confpo(self):
        means = []
        for rows in (self.chosen, self.rejected):
            threshold = sum(row[0].exp().item() for row in rows) / len(rows)
            below = [row for row in rows if row[0].exp().item() < threshold - 1e-12]
            if not below:
                return 0 * total(rows)
            means.append(mean(below))
        return self.smooth(self.gamma * means[0] - self.gamma * means[1] - self.margin)

    def dpo(self):
        return self.smooth(self.beta * (log_ratio(self.chosen) - log_ratio(self.rejected)))

    def ipo(self):
        chosen, rejected = (log_ratio(rows) / len(rows) for rows in (self.chosen, self.rejected))
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def cpo(self):
        contrast = self.smooth(self.beta * (total(self.chosen) - total(self.rejected)))
        return contrast - self.alpha * mean(self.chosen)

    def orpo(self):
        p, q = mean(self.chosen).exp(), mean(self.rejected).exp()
        return -p.log() - self.alpha * log_sigmoid(((p / (1 - p)) / (q / (1 - q))).log())

    def rrhf(self):
        chosen, rejected = mean(self.chosen), mean(self.rejected)
        return max(0 * chosen, rejected - chosen) - self.alpha * chosen

    def tdpo1(self):
        kl_w, kl_l = (sum(row[2] for row in rows) for rows in (self.chosen, self.rejected))
        return -log_sigmoid(self.beta * (log_ratio(self.chosen) - log_ratio(self.rejected) - (kl_l - kl_w)))

    def tdpo2(self):
        kl_w, kl_l = (sum(row[2] for row in rows) for rows in (self.chosen, self.rejected))
        u = self.beta * (log_ratio(self.chosen) - log_ratio(self.rejected))
        return -log_sigmoid(u - self.alpha * self.beta * (kl_l - kl_w.detach()))

    def tis_dpo(self):
        u = [sum(w * (row[0] - row[1]) for w, row in side) for side in self.weighted]
        eta = [sum(w * row[3] for w, row in side) for side in self.weighted]
        return -log_sigmoid(self.beta * (u[0] - u[1]) - self.alpha * self.beta * (eta[0] - eta[1]))

    def tgdpo(self):
        chosen, rejected = (
            sum(self.beta * (1 + sign * self.alpha * self.beta * s) * (row[0] - row[1]) for s, row in side)
            for sign, side in zip((1, -1), self.weighted, strict=True)
        )
        return -log_sigmoid(chosen - rejected)

    def wspo(self):
        errors = [self.beta * (row[0] - row[1]) - s for s, row in self.weighted[0]]
        return sum(error**2 for error in errors) / len(errors)

    def selective_dpo(self):
        sums = []
        for rows, sign in ((self.chosen, 1), (self.rejected, -1)):
            gaps = [sign * (row[1] - row[0]).item() for row in rows]
            threshold = sorted(gaps, reverse=True)[max(1, int(0.4 * len(gaps) + 1e-9)) - 1]
            sums.append(log_ratio([row for row, gap in zip(rows, gaps, strict=True) if gap >= threshold]))
        return self.smooth(self.beta * (sums[0] - sums[1]))

    def tbpo(self):
        terms = []
        for chosen, rejected in zip(self.chosen, self.rejected, strict=False):
            z = self.beta * ((rejected[0] - rejected[1] + rejected[2]) - (chosen[0] - chosen[1] + chosen[2]))
            for share, value in ((1 - self.smoothing, z), (self.smoothing, -z)):
                ratio = value.exp()
                rest = (1 - ratio**-self.alpha) / self.alpha if self.alpha else ratio.log()
                terms.append(share * (ratio ** (1 + self.alpha) / (1 + self.alpha) + rest) / 4)
        return sum(terms) / min(len(self.chosen), len(self.rejected))

    def opd(self):
        losses = []
        for side in self.weighted:
            ratio = (sum(row[0] - row[1] for _, row in side) / len(side)).exp().item()
            gains = []
            for s, (policy, start, *_) in side:
                advantage = self.alpha * s - (policy - start).item()
                importance = ratio * policy.exp() / policy.exp().item()
                clipped = importance.clamp(0.8, 1.2)
                gains.append(min(importance * advantage, clipped * advantage))
            losses.append(-sum(gains) / len(gains))
        return sum(losses) / 2


def with_rewards(pairs):
    """The same pairs with a reward of every token as its weight, as in a selection with credit "reward"."""
    rng = np.random.default_rng(3)
    responses = {}

    def rewards(pair, side):
        ids = pair.side(side)[0]
        return responses.setdefault((pair.pair_id, side), tuple(rng.normal(0, 2, len(ids)).tolist()))

    return [
        replace(
            pair, chosen_positions=None, rejected_positions=None,
            chosen_weights=rewards(pair, CHOSEN), rejected_weights=rewards(pair, REJECTED),
        )
        for pair in pairs
    ]  # fmt: skip


def weighted_table(pairs):
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("pair_id", "prompt_ids")}
    for side, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        sides = [pair.side(side) for pair in pairs]
        columns[f"{name}_ids"] = [ids for ids, _, _ in sides]
        columns[f"{name}_positions"] = [range(len(ids)) if at is None else at for ids, at, _ in sides]
        columns[f"{name}_weights"] = [
            [1.0] * len(columns[f"{name}_positions"][i]) if w is None else w for i, (_, _, w) in enumerate(sides)
        ]
        columns[f"{name}_positions"] = [list(at) for at in columns[f"{name}_positions"]]
    if any(pair.weight != 1 for pair in pairs):
        columns[PAIR_WEIGHT] = [pair.weight for pair in pairs]
    return make_table("selection", columns)


CASES = [(name, None, 0.0) for name in OBJECTIVES] + [
    ("tis_dpo", 1.0, 0.0),
    ("cpo", 0.0, 0.2),
    ("orpo", 0.7, 0.0),
    ("tgdpo", 0.0, 0.0),
    ("tgdpo", 1.5, 0.0),
    ("tbpo", 1.0, 0.0),
    ("opd", 0.0, 0.0),
    ("opd", 0.4, 0.0),
    ("tbpo", 0.3, 0.2),
    *((name, None, 0.3) for name in ("sepo", "simpo", "confpo", "dpo", "selective_dpo", "tbpo")),
]


@pytest.mark.parametrize(("objective", "alpha", "smoothing"), CASES)
@pytest.mark.daily(6)
def test_a_training_step_is_the_published_formula_written_out(objective, alpha, smoothing):
    """Loss and gradient, with one-token and equal responses, shared prompts, few targets and uneven weights."""
    pairs = with_rewards(awkward_pairs()) if OBJECTIVES[objective].reads_token_rewards else awkward_pairs()
    check_a_step(pairs, objective, alpha, smoothing)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.daily(3)
def test_a_pair_weight_scales_the_loss_of_its_pair_and_no_other(objective):
    pairs = with_rewards(awkward_pairs()) if OBJECTIVES[objective].reads_token_rewards else awkward_pairs()
    weights = np.random.default_rng(2).uniform(0, 1, len(pairs)).round(3)
    weights[1] = 0
    check_a_step([replace(pair, weight=float(w)) for pair, w in zip(pairs, weights, strict=True)], objective)


def check_a_step(pairs, objective, alpha=None, smoothing=0.0):
    reference = tiny_model("llama", torch.float64, seed=1)
    model = tiny_model("llama", torch.float64)
    losses = [pair.weight * published_loss(objective, model, reference, pair, alpha, smoothing) for pair in pairs]
    expected = sum(losses) / len(pairs)
    expected.backward()
    expected_gradients = gradients_of(model)

    model = tiny_model("llama", torch.float64)
    config = PreferenceConfig(
        "unused", objective=objective, alpha=alpha, label_smoothing=smoothing, use_cpu=True, report_to="none",
        per_device_train_batch_size=len(pairs), tokens_per_row=64, **SETTINGS,
    )  # fmt: skip
    table = weighted_table(pairs)
    trainer = PreferenceTrainer(
        model, config, train_dataset=table, reference_logps=dataset_logps(reference, pairs_table(pairs))
    )
    if trainer.kl_reference is not None:
        prepare_model(reference)
        trainer.kl_reference = reference
    inputs = next(iter(trainer.get_train_dataloader()))
    assert len(inputs["batches"]) > 1
    trainer.create_optimizer()
    model.zero_grad()
    loss = trainer.training_step(model, inputs, torch.tensor(float(len(pairs))))
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    assert_same_gradients(gradients_of(model), expected_gradients)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.0] * 6, "every pair_weight is 0"), ([0.5, -1.0, *[1.0] * 4], "pair_weight of pair .* is -1.0"),
     ([float("nan"), *[1.0] * 5], "pair_weight of pair .* is nan")],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["sepo", "dpo"])
def test_pair_weights_that_cannot_be_are_refused_before_the_training(objective, weights, message):
    pairs = awkward_pairs()
    table = weighted_table([replace(pair, weight=w) for pair, w in zip(pairs, weights, strict=True)])
    config = PreferenceConfig("unused", objective=objective, use_cpu=True, report_to="none")
    with pytest.raises(UserError, match=message):
        PreferenceTrainer(tiny_model("llama"), config, train_dataset=table)


def test_the_recipe_offers_the_objectives_that_have_a_formula():
    assert OBJECTIVES.keys() == LOSSES.keys()
    schema = PolicySettings.model_json_schema()["properties"]["objective"]
    assert schema["enum"] == list(OBJECTIVES)
    with pytest.raises(UserError, match=r"policy\.objective is 'dpoo': input should be 'sepo', 'dpo'"):
        parse_recipe({"policy": {"objective": "dpoo"}}, "here")


def test_the_defaults_of_the_formulas_are_those_of_the_table():
    functions = {**{name: getattr(objectives, name, None) for name in OBJECTIVES}, "tgdpo": objectives.guided_weights,
                 "opd": objectives.opd_beta}  # fmt: skip
    functions["selective_dpo"] = selective_marks
    for name, objective in OBJECTIVES.items():
        defaults = {key: item.default for key, item in signature(functions[name]).parameters.items()}
        assert (defaults.get("alpha"), defaults.get("rate")) == (objective.alpha, objective.rate), name


def markdown_table() -> str:
    """The table of docs/objectives.md."""
    lines = ["| `objective` | paper | tokens | reference | settings |", "|---|---|---|---|---|"]
    for name, objective in OBJECTIVES.items():
        paper = f"{objective.title}, [{objective.paper}](https://arxiv.org/abs/{objective.paper})"
        settings = ", ".join(_setting_text(objective, setting) for setting in objective.settings)
        lines.append(f"| `{name}` | {paper} | {objective.tokens} | {_reference_text(objective)} | {settings} |")
    smoothed = names_with_label_smoothing()
    return "\n".join([*lines, "", f"`label_smoothing` is defined for {smoothed}. The others refuse it."])


def _setting_text(objective: Objective, setting: str) -> str:
    default = {"alpha": objective.alpha, "rate": objective.rate}.get(setting)
    value = "" if default is None else f" = {default:g}"
    meaning = objective.settings[setting]
    return f"`{setting}`{value}" + (f" ({meaning})" if meaning else "")


def _reference_text(objective: Objective) -> str:
    if not objective.reads_reference:
        return "no"
    if objective.kl is None:
        return "stored"
    return "stored, and beside the policy" + (" if `alpha` is above 0" if objective.kl_needs_alpha else "")


def test_the_documentation_has_the_table_of_the_objectives():
    """To renew it, print `markdown_table()`."""
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert f"\n\n{markdown_table()}\n\n" in text


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if not row.label_smoothing])
def test_label_smoothing_is_refused_where_it_is_not_defined(objective):
    with pytest.raises(UserError, match=f"label_smoothing is not defined for {objective}"):
        PreferenceConfig("unused", objective=objective, label_smoothing=0.1, use_cpu=True, report_to="none")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_stay_finite_far_from_balance(objective):
    far = [torch.tensor([-1e4, -1e-9, -3.0, 0.0], requires_grad=True) for _ in range(2)]
    other = torch.tensor([0.0, -1e4, -3.0, -1e-9])
    counts, kls = (torch.ones(4), torch.ones(4)), (other.abs(), other.abs())
    sums = PairSums((far[0], far[1] + other), counts, (other, -other), kls, (far[0] - other) ** 2)
    sums.matched = objectives.tbpo(torch.stack([far[0], far[1]], 1).flatten(), torch.arange(8), 4, 0.1, 1.0)
    both = torch.stack([far[0], far[1]], 1).flatten()
    sums.distilled = objectives.opd(both, other.repeat(2), sums.of_reference(), torch.arange(8))
    losses, chosen, rejected = pair_losses(objective, sums, LossSettings(alpha=1.0))
    assert losses.shape == chosen.shape == rejected.shape == (4,)
    assert losses.isfinite().all()
    losses.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in far if tensor.grad is not None)
    assert far[0].grad is not None


# --- pieces ---------------------------------------------------------------------------------------------------------


def test_confpo_marks_tokens_below_the_mean_probability_of_their_own_response():
    logps = torch.log(torch.tensor([0.9, 0.1, 0.5, 0.2, 0.3, 0.3, 0.3, 0.7]))
    segments = torch.tensor([0, 0, 0, 1, 2, 2, 2, 4])
    marks = below_mean_probability(logps, segments, 5)
    # A single token, or equal ones, are not below their mean.
    assert marks.tolist() == [False, True, False, False, False, False, False, False]


def test_selective_dpo_marks_where_the_policy_lags_the_reference_and_keeps_equals():
    reference = torch.zeros(9)
    logps = torch.tensor([-3.0, 1.0, -1.0, -2.0, 5.0, 4.0, -1.0, 0.0, 0.0])
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    marks = selective_marks(logps, reference, segments, 4, rate=0.5)
    # Two of four tokens with the lowest log-ratio, one of three with the highest; equal ones are all kept.
    assert marks.tolist() == [True, False, False, True, True, False, False, True, True]


def test_selective_dpo_of_every_token_is_dpo():
    pairs = awkward_pairs()
    reference = dataset_logps(tiny_model("llama", seed=1), pairs_table(pairs))
    plain = our_step(tiny_model("llama"), [without_targets(pair) for pair in pairs], reference, objective="dpo")
    every = our_step(tiny_model("llama"), pairs, reference, objective="selective_dpo", rate=1.0)
    assert every[0] == pytest.approx(plain[0], abs=1e-6)
    assert_same_gradients(every[1], plain[1])


def without_targets(pair):
    return Pair(pair.pair_id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.reads_token_rewards])
def test_an_objective_on_rewards_refuses_a_table_without_the_reward_of_every_token(objective):
    config = PreferenceConfig("unused", objective=objective, use_cpu=True, report_to="none")
    for table in (pairs_table(awkward_pairs()), weighted_table(awkward_pairs())):
        with pytest.raises(UserError, match=f"{objective} reads the reward of every response token: select with"):
            PreferenceTrainer(tiny_model("llama"), config, train_dataset=table)


def test_rate_is_refused_for_objectives_that_do_not_read_it():
    with pytest.raises(UserError, match="rate is a setting of selective_dpo, not of dpo"):
        parse_recipe({"policy": {"objective": "dpo", "rate": 0.3}}, "here")


def test_confpo_gives_no_loss_to_a_pair_without_a_marked_token():
    sums = torch.tensor([-3.0, 0.0]), torch.tensor([-4.0, -2.0])
    losses = objectives.confpo(sums, (torch.tensor([2.0, 0.0]), torch.tensor([2.0, 1.0])))
    assert losses[0] > 0
    assert losses[1] == 0


def test_tis_dpo_with_a_mask_is_dpo_on_those_tokens():
    values = [torch.tensor(x) for x in ([-3.0, -1.0], [-4.0, -2.0], [-3.5, -1.0], [-3.0, -2.5])]
    sides = values[:2], values[2:]
    torch.testing.assert_close(objectives.tis_dpo(*sides, beta=0.2), objectives.dpo(*sides, beta=0.2))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.daily(3)
def test_token_kl_agrees_with_the_plain_formula_in_chunks(architecture, direction, monkeypatch):
    monkeypatch.setattr("sepo.forward.token_kl._CHUNK_BYTES", 101 * 16 * 3)  # three targets at a time
    model, reference = (tiny_model(architecture, torch.float64, seed=seed) for seed in (0, 1))
    pairs = awkward_pairs()
    expected_logps, expected_kl = [], []
    for pair in pairs:
        for rows, weights in responses(model, reference, pair):
            kept = [row for row, weight in zip(rows, weights, strict=True) if weight]
            expected_logps += [row[0] for row in kept]
            expected_kl += [row[2 if direction == "forward" else 3] for row in kept]
    (torch.stack(expected_kl).sum() + torch.stack(expected_logps).sum()).backward()
    expected_gradients = gradients_of(model)
    model.zero_grad()
    layouts = {prepare_model(model), prepare_model(reference)}
    assert layouts == {"packed"}
    logps, kl = token_logps_and_kl(model, reference, pack(pairs), direction)
    torch.testing.assert_close(logps, torch.stack(expected_logps), atol=5e-6, rtol=0)
    torch.testing.assert_close(kl, torch.stack(expected_kl), atol=5e-6, rtol=0)
    (kl.sum() + logps.sum()).backward()
    assert_same_gradients(gradients_of(model), expected_gradients)


def test_the_reference_of_a_kl_objective_is_the_model_as_it_was_given():
    model = tiny_model("llama")
    config = PreferenceConfig(
        "unused", objective="tdpo2", use_cpu=True, report_to="none", max_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=6, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = PreferenceTrainer(model, config, train_dataset=pairs_table(awkward_pairs()))
    trainer.train()
    before, after = tiny_model("llama").state_dict(), model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.kl_reference.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # no KL, no log-ratio yet


# --- TRL ------------------------------------------------------------------------------------------------------------


def text_dataset():
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS])


def test_ipo_step_agrees_with_trl(tmp_path):
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(tmp_path), loss_type="ipo", beta=0.3, max_length=None, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model = tiny_model("llama")
    theirs = DPOTrainer(
        model,
        tiny_model("llama", seed=1),
        args=config,
        train_dataset=text_dataset(),
        processing_class=tiny_tokenizer(),
    )
    rows = list(theirs.train_dataset)
    model.train()
    expected = theirs.compute_loss(model, theirs._prepare_inputs(theirs.data_collator(rows)))
    expected.backward()
    expected_gradients = gradients_of(model)
    pairs = [
        Pair(i, *(tuple(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))) for i, row in enumerate(rows)
    ]
    reference = dataset_logps(tiny_model("llama", seed=1), pairs_table(pairs))
    loss, gradients = our_step(tiny_model("llama"), pairs, reference, objective="ipo", beta=0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.8, "beta": 2.5, "label_smoothing": 0.1},
            {"objective": "simpo", "gamma": 2.5, "margin": 0.8, "label_smoothing": 0.1},
        ),
        (
            {"loss_type": "sigmoid", "cpo_alpha": 0.5, "beta": 0.2},
            {"objective": "cpo", "alpha": 0.5, "beta": 0.2},
        ),
    ],
)
def test_simpo_with_margin_and_cpo_steps_agree_with_trl(tmp_path, theirs, ours):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    # TRL averages CPO's likelihood term over the tokens of a batch, we average over each response: equal for one pair.
    number = 1 if ours["objective"] == "cpo" else 4
    config = CPOConfig(
        str(tmp_path), max_length=256, per_device_train_batch_size=number, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, **theirs,
    )  # fmt: skip
    model = tiny_model("llama")
    trainer = CPOTrainer(model, args=config, train_dataset=text_dataset(), processing_class=tiny_tokenizer())
    rows = list(trainer.train_dataset)[-number:]
    expected, _ = trainer.get_batch_loss_metrics(model, trainer.data_collator(rows))
    expected.backward()
    expected_gradients = gradients_of(model)
    pairs = []
    for index, row in enumerate(rows):
        first = len(row["prompt_input_ids"])
        parts = (row["prompt_input_ids"], row["chosen_input_ids"][first:], row["rejected_input_ids"][first:])
        pairs.append(Pair(index, *map(tuple, parts)))
    config = PreferenceConfig(
        "unused", use_cpu=True, report_to="none", per_device_train_batch_size=number, **ours
    )  # fmt: skip
    model = tiny_model("llama")
    ours_trainer = PreferenceTrainer(model, config, train_dataset=pairs_table(pairs))
    ours_trainer.create_optimizer()
    inputs = next(iter(ours_trainer.get_train_dataloader()))
    loss = ours_trainer.training_step(model, inputs, torch.tensor(float(number)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model), expected_gradients)


def test_orpo_odds_ratio_agrees_with_trl_values_and_gradients():
    from trl.experimental.orpo import ORPOTrainer

    means = [torch.tensor(values, requires_grad=True) for values in ([-0.3, -2.0, -0.01], [-0.5, -0.7, -4.0])]
    counts = torch.tensor([3.0, 1.0, 7.0])
    self = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    ratios = ORPOTrainer.odds_ratio_loss(self, *means)[0]
    (-means[0] - ratios).sum().backward()
    expected = [tensor.grad.clone() for tensor in means]
    ours = [(tensor.detach() * counts).requires_grad_() for tensor in means]
    losses = objectives.orpo(ours, (counts, counts), alpha=0.4)
    torch.testing.assert_close(losses, (-means[0] - ratios).detach())
    losses.sum().backward()
    for tensor, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(tensor.grad * counts, gradient)
