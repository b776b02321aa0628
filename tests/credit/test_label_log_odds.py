"""Label statistics and shared tokens against loops over tokens."""

import numpy as np
import pytest

from sepo.credit.label_log_odds import label_statistics, residuals
from sepo.credit.selection import select_key_tokens, shared_tokens
from sepo.data.tables import make_table, provenance_of, read_table, with_provenance, write_table
from sepo.errors import UserError
from sepo.stages.select import select


def table(chosen_ids, rejected_ids, chosen=None, rejected=None, ends=()):
    zeros = lambda rows: [[0.0] * len(row) for row in rows]  # noqa: E731
    scores = make_table(
        "scores",
        {
            "pair_id": list(range(len(chosen_ids))),
            "prompt_ids": [[1]] * len(chosen_ids),
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "chosen_rewards": chosen or zeros(chosen_ids),
            "rejected_rewards": rejected or zeros(rejected_ids),
        },
    )
    return with_provenance(scores, "scores", {"end_ids": list(ends)})


def drawn(seed, pairs=12, vocabulary=9):
    rng = np.random.default_rng(seed)
    ids = [[rng.integers(1, vocabulary, rng.integers(2, 9)).tolist() for _ in range(pairs)] for _ in range(2)]
    rewards = [[rng.normal(size=len(row)).tolist() for row in side] for side in ids]
    return table(*ids, *rewards)


def test_the_residual_is_that_of_a_table_of_ids_by_sides():
    """Against the textbook form: observed minus expected over the root of E (1 - row share)."""
    chosen, rejected = np.array([7.0, 1, 0, 4]), np.array([2.0, 6, 0, 4])
    n, w = chosen.sum() + rejected.sum(), chosen.sum()
    for found, a, b in zip(residuals(chosen, rejected), chosen, rejected, strict=True):
        expected = (a + b) * w / n
        assert found == pytest.approx((a - expected) / np.sqrt(expected * (1 - w / n)) if a + b else 0.0)
    np.testing.assert_allclose(residuals(rejected, chosen), -residuals(chosen, rejected), atol=1e-12)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_label_statistics_are_mixed_with_rewards_in_standard_deviations(share):
    scores = drawn(0)
    rows = scores.to_pylist()
    every = {side: [i for row in rows for i in row[f"{side}_ids"]] for side in ("chosen", "rejected")}
    p = len(every["chosen"]) / (len(every["chosen"]) + len(every["rejected"]))

    def z(token):
        y = every["chosen"].count(token) + every["rejected"].count(token)
        return (every["chosen"].count(token) - y * p) / np.sqrt(y * p * (1 - p))

    made = select_key_tokens(
        scores, 1, 1, True, label_log_odds=share, credit="soft", clip_low=-9, clip_high=9, normalise=False
    )
    for side, sign in (("chosen", 1), ("rejected", -1)):
        s = np.array([x for row in rows for x in row[f"{side}_rewards"]])
        zs = np.array([z(token) for token in every[side]])
        mixed = (1 - share) * (s - s.mean()) / s.std() + share * (zs - zs.mean()) / zs.std()
        weights = np.array([w for row in made.to_pylist() for w in row[f"{side}_weights"]])
        np.testing.assert_allclose(weights, np.exp(sign * mixed), rtol=1e-4)


def test_label_statistics_of_shards_equal_those_of_the_whole_table(tmp_path):
    scores = drawn(1)
    write_table(tmp_path / "scores", scores, rows_per_shard=5)
    for rule in ("top", "dataset", "mass"):
        settings = {"label_log_odds": 0.5, "skip_shared": True, "rule_chosen": rule, "rule_rejected": rule}
        select(tmp_path / "scores", tmp_path / "selection", 0.4, 0.4, **settings)
        found = read_table(tmp_path / "selection", "selection").to_pylist()
        assert found == select_key_tokens(scores, 0.4, 0.4, **settings).to_pylist(), rule


def test_label_statistics_without_variation_change_nothing_and_stay_finite():
    one = table([[3, 3]], [[3, 3]])
    statistics = label_statistics([one])
    assert statistics.z[3] == 0
    row = select_key_tokens(one, 0.5, 0.5, label_log_odds=0.5).to_pylist()[0]
    assert (row["chosen_positions"], row["rejected_positions"]) == ([0], [0])


def test_shared_tokens_are_those_whose_id_is_in_the_other_response_of_the_pair():
    scores = table([[5, 6, 5], [7]], [[5, 8], [6, 5]])
    assert shared_tokens(scores)["chosen"].tolist() == [True, False, True, False]
    assert shared_tokens(scores)["rejected"].tolist() == [True, False, False, False]


def test_shared_tokens_are_skipped_by_every_rule_unless_nothing_else_is_left():
    scores = table(
        [[5, 6, 9, 2], [4, 4]], [[5, 8, 7, 2], [4, 4, 4]],
        [[9.0, 1.0, 2.0, 5.0], [1.0, 3.0]], [[-9.0, -1.0, -2.0, -5.0], [0.0, -3.0, 0.0]], ends=[2],
    )  # fmt: skip
    for rule in ("top", "reversed", "random", "first", "last", "mass", "effective", "dataset", "threshold"):
        rows = select_key_tokens(scores, 1, 1, skip_shared=True, rule_chosen=rule, rule_rejected=rule).to_pylist()
        assert set(rows[0]["chosen_positions"]) <= {1, 2}, rule
        assert set(rows[0]["rejected_positions"]) <= {1, 2}, rule
        assert len(rows[1]["chosen_positions"]) == len(rows[1]["rejected_positions"]) == 1
    rows = select_key_tokens(scores, 1, 1, skip_shared=True, credit="soft").to_pylist()
    assert [row["chosen_positions"] for row in rows] == [[1, 2], [1]]  # the best token if all are shared


def test_a_table_names_the_label_log_odds_that_it_was_made_with():
    assert not {"label_log_odds", "skip_shared"} & set(provenance_of(select_key_tokens(drawn(2))))
    assert provenance_of(select_key_tokens(drawn(2), label_log_odds=0.5))["label_log_odds"] == 0.5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"label_log_odds": 1.5}, "label_log_odds is 1.5"),
        ({"label_log_odds": 0.5, "credit": "reward"}, "leave label_log_odds at 0"),
    ],
)
def test_impossible_label_log_odds_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        select_key_tokens(drawn(3), **settings)
