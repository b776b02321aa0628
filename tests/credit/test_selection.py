"""Token rewards and key tokens against the rule written out token by token."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.credit.rewards import combine_scores, pair_rewards, response_sums, target_sums
from sepo.credit.selection import RULES, extreme_positions, keep_counts, select_key_tokens
from sepo.data.ragged import flat
from sepo.data.tables import make_table, provenance_of, read_table, with_provenance, write_table
from sepo.errors import UserError
from sepo.recipe.settings import SelectSettings
from sepo.stages.select import select


def scores_table(chosen, rejected):
    ids = lambda rows: [list(range(len(row))) for row in rows]  # noqa: E731
    return make_table(
        "scores",
        {
            "pair_id": list(range(len(chosen))),
            "prompt_ids": [[1]] * len(chosen),
            "chosen_ids": ids(chosen),
            "rejected_ids": ids(rejected),
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
        },
        {"tokenizer": "abc"},
    )


def by_hand(rewards, count, highest):
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i] if highest else rewards[i], i))
    return sorted(order[:count])


rewards_strategy = st.lists(
    st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 2.0, 1e-30, 3e38]), min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)


@examples(200)
@given(rewards_strategy, st.floats(0.01, 1.0))
def test_selection_is_the_rule_written_out_token_by_token(responses, rate):
    table = select_key_tokens(scores_table(responses, responses), rate, rate).to_pylist()
    for row, rewards in zip(table, responses, strict=True):
        rewards = np.asarray(rewards, np.float32).tolist()
        count = max(1, int(np.floor(rate * len(rewards) + 1e-9)))
        assert row["chosen_positions"] == by_hand(rewards, count, True)
        assert row["rejected_positions"] == by_hand(rewards, count, False)
        assert row["chosen_weights"] == [1.0] * count


def test_ties_go_to_the_earlier_token():
    row = select_key_tokens(scores_table([[0.0] * 5], [[0.0] * 5]), 0.4, 0.6).to_pylist()[0]
    assert row["chosen_positions"] == [0, 1]
    assert row["rejected_positions"] == [0, 1, 2]


def test_the_count_is_a_floor_that_forgives_rounding_and_is_never_zero():
    assert keep_counts(np.array([1, 2, 3, 10, 100]), 0.29).tolist() == [1, 1, 1, 2, 29]
    assert keep_counts(np.array([10, 7]), 1.0).tolist() == [10, 7]


def test_rates_differ_by_side_and_rate_one_keeps_everything():
    table = select_key_tokens(scores_table([[1.0, 3.0, 2.0, 0.0]], [[1.0, 3.0, 2.0, 0.0]]), 1.0, 0.25)
    row = table.to_pylist()[0]
    assert row["chosen_positions"] == [0, 1, 2, 3]
    assert row["rejected_positions"] == [3]
    assert provenance_of(table)["k_rejected"] == 0.25
    assert provenance_of(table)["tokenizer"] == "abc"


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_rates_outside_zero_to_one_are_refused_by_name(rate):
    with pytest.raises(UserError, match="k_rejected is"):
        select_key_tokens(scores_table([[1.0]], [[1.0]]), 0.3, rate)


def test_one_sort_ranks_each_response_on_its_own():
    rewards, lengths, counts = np.array([5.0, 1, 9, 0, 3, 4]), np.array([2, 4]), np.array([1, 2])
    positions, kept = extreme_positions(rewards, lengths, counts)
    assert positions.tolist() == [0, 0, 3]
    assert kept.tolist() == [1, 2]
    eligible = np.array([False, False, False, True, False, True])
    positions, kept = extreme_positions(rewards, lengths, np.array([1, 3]), eligible=eligible)
    assert positions.tolist() == [0, 1, 3]  # a response without an eligible token keeps its best one
    assert kept.tolist() == [1, 2]


def test_the_end_of_a_response_is_a_key_token_only_if_asked_for():
    table = scores_table([[0.0, 1.0, 9.0], [5.0]], [[3.0, 1.0, -9.0], [5.0]])  # ids count from 0
    table = with_provenance(table, "scores", {"end_ids": [2, 0]})
    for include_end, chosen, rejected in ((True, [1, 2], [1, 2]), (False, [0, 1], [0, 1])):
        rows = select_key_tokens(table, 0.7, 0.7, include_end).to_pylist()
        assert rows[0]["chosen_positions"] == chosen
        assert rows[0]["rejected_positions"] == rejected
        assert rows[1]["chosen_positions"] == [0]  # a response of an end token only keeps it


def test_rewards_are_oracle_minus_reference_for_every_token(tmp_path):
    pairs = make_table(
        "pairs",
        {"pair_id": [4, 9], "prompt_ids": [[1], [2, 3]], "chosen_ids": [[5, 6], [7]], "rejected_ids": [[8], [9, 9]]},
    )
    oracle, reference = (
        make_table(
            "logps",
            {"pair_id": [4, 9], "chosen_logps": chosen, "rejected_logps": rejected},
            {"model": model},
        )
        for model, chosen, rejected in (
            ("o", [[-1.0, -2.0], [-3.0]], [[-1.0], [-2.0, -0.5]]),
            ("r", [[-1.5, -1.0], [-4.0]], [[-1.0], [-1.0, -1.0]]),
        )
    )
    table = pair_rewards(pairs, oracle, reference)
    assert table.column("chosen_rewards").to_pylist() == [[0.5, -1.0], [1.0]]
    assert table.column("rejected_rewards").to_pylist() == [[0.0], [-1.0, 0.5]]
    assert provenance_of(table)["oracle"] == "o"
    chosen, rejected = response_sums(table, "rewards")
    assert chosen.tolist() == [-0.5, 1.0]
    assert rejected.tolist() == [0.0, -0.5]
    with pytest.raises(UserError, match="belong to other pairs"):
        pair_rewards(pairs, oracle.slice(1), reference)
    write_table(tmp_path / "t", table, rows_per_shard=1)
    assert read_table(tmp_path / "t", "scores").to_pylist() == table.to_pylist()


def test_a_sliced_table_gives_its_own_rows():
    table = scores_table([[1.0], [2.0, 3.0], [4.0]], [[0.0], [1.0], [2.0, 5.0]]).slice(1)
    values, lengths = flat(table.column("chosen_rewards"))
    assert values.tolist() == [2.0, 3.0, 4.0]
    assert lengths.tolist() == [2, 1]
    assert response_sums(table, "rewards")[1].tolist() == [1.0, 7.0]
    assert isinstance(select_key_tokens(table), pa.Table)


def test_tables_of_another_kind_or_version_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no scores table"):
        read_table(tmp_path / "missing", "scores")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no part"):
        read_table(tmp_path / "empty", "scores")
    write_table(
        tmp_path / "pairs",
        make_table("pairs", {name: [] for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")}),
    )
    with pytest.raises(UserError, match="no scores table: it is a pairs table"):
        read_table(tmp_path / "pairs", "scores")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "part-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet"):
        read_table(tmp_path / "bad", "scores")


# --- rules, credit, several oracles ---------------------------------------------------------------------------------


def kept_by_hand(rule, rewards, sign, k, threshold):
    """Positions to keep, one response at a time, from the rule's text."""
    values = [sign * float(reward) for reward in rewards]
    best_first = sorted(range(len(values)), key=lambda i: (-values[i], i))
    number = max(1, int(np.floor(k * len(values) + 1e-9)))
    mass = [max(value, 0.0) for value in values]
    if rule == "reversed":
        best_first = sorted(range(len(values)), key=lambda i: (values[i], i))
    elif rule == "first":
        best_first = list(range(len(values)))
    elif rule == "last":
        best_first = list(range(len(values)))[::-1]
    elif rule == "threshold":
        number = max(1, sum(value >= sign * threshold for value in values))
    elif rule == "mass":
        number = 1
        while sum(mass[i] for i in best_first[:number]) < k * sum(mass) * (1 - 1e-9):
            number += 1
    elif rule == "effective":
        squares = sum(value**2 for value in mass)
        number = int(np.ceil(sum(mass) ** 2 / squares - 1e-9)) if squares else 1
    return sorted(best_first[:number])


steps = st.integers(-8, 8).map(lambda n: n / 8)  # exact in float32, with ties
responses_strategy = st.lists(st.lists(steps, min_size=1, max_size=10), min_size=1, max_size=5)


@examples(150)
@given(
    responses_strategy,
    st.sampled_from(sorted(set(RULES) - {"random", "dataset", "shorter"})),
    st.floats(0.05, 1.0),
    st.sampled_from([-0.5, 0.0, 0.25]),
)
def test_every_rule_is_its_text_written_out_token_by_token(responses, rule, k, threshold):
    settings = {
        "rule_chosen": rule,
        "rule_rejected": rule,
        "threshold_chosen": threshold,
        "threshold_rejected": threshold,
    }
    for row, rewards in zip(
        select_key_tokens(scores_table(responses, responses), k, k, **settings).to_pylist(), responses, strict=True
    ):
        assert row["chosen_positions"] == kept_by_hand(rule, rewards, 1, k, threshold)
        assert row["rejected_positions"] == kept_by_hand(rule, rewards, -1, k, threshold)


def test_the_two_sides_can_have_different_rules():
    rewards = [[0.1, 0.9, 0.5, 0.4]]
    row = select_key_tokens(scores_table(rewards, rewards), 0.5, 0.25, rule_rejected="last").to_pylist()[0]
    assert row["chosen_positions"] == [1, 2]
    assert row["rejected_positions"] == [3]


def test_the_rule_of_the_shorter_response_cuts_both_to_its_length_whatever_the_rate():
    table = scores_table([[0.1, 0.9, 0.5, 0.4], [1.0]], [[0.3, 0.2], [2.0, 1.0]])
    rows = select_key_tokens(table, 0.1, 1.0, True, rule_chosen="shorter", rule_rejected="shorter").to_pylist()
    assert [(row["chosen_positions"], row["rejected_positions"]) for row in rows] == [([0, 1], [0, 1]), ([0], [0])]


def test_credit_reward_keeps_the_rewards_as_weights_on_both_sides():
    row = select_key_tokens(scores_table([[0.5, -2.0]], [[-1.5]]), 1.0, 1.0, credit="reward").to_pylist()[0]
    assert (row["chosen_weights"], row["rejected_weights"]) == ([0.5, -2.0], [-1.5])


def test_the_truth_weighs_what_counts_for_each_side():
    truth = [[1.0, 0.0, -1.0]]
    row = select_key_tokens(scores_table(truth, truth), 1.0, 1.0, include_end=True, credit="truth").to_pylist()[0]
    assert row["chosen_weights"] == pytest.approx([1, 0.05, 0.05])
    assert row["rejected_weights"] == pytest.approx([0.05, 0.05, 1])


def test_the_dataset_rule_keeps_a_share_of_all_tokens_and_at_least_one_of_each_response():
    chosen = [[9.0, 8.0, 7.0, 6.0], [1.0, 2.0], [0.0, 0.5, 0.1, 0.2]]
    table = select_key_tokens(scores_table(chosen, chosen), 0.3, 0.3, rule_chosen="dataset", rule_rejected="dataset")
    rows = table.to_pylist()
    assert [row["chosen_positions"] for row in rows] == [[0, 1, 2], [1], [1]]
    assert [row["rejected_positions"] for row in rows] == [[3], [0], [0, 2, 3]]


def test_the_dataset_rule_over_shards_is_that_over_the_whole_table(tmp_path):
    rng = np.random.default_rng(0)
    responses = [rng.normal(size=rng.integers(1, 9)).tolist() for _ in range(11)]
    table = scores_table(responses, responses[::-1])
    settings = {"rule_chosen": "dataset", "rule_rejected": "dataset", "k_chosen": 0.2, "k_rejected": 0.4}
    write_table(tmp_path / "scores", table, rows_per_shard=3)
    select(tmp_path / "scores", tmp_path / "selection", **settings)
    assert (
        read_table(tmp_path / "selection", "selection").to_pylist() == select_key_tokens(table, **settings).to_pylist()
    )


def test_a_random_selection_depends_on_seed_and_pair_alone():
    responses = [[0.0] * 40] * 30
    table = scores_table(responses, responses)
    settings = {"rule_chosen": "random", "rule_rejected": "random"}
    rows = select_key_tokens(table, 0.25, 0.25, **settings, seed=3).to_pylist()
    again = select_key_tokens(table.slice(7, 5), 0.25, 0.25, **settings, seed=3).to_pylist()
    assert again == rows[7:12]
    other = select_key_tokens(table, 0.25, 0.25, **settings, seed=4).to_pylist()
    assert [row["chosen_positions"] for row in other] != [row["chosen_positions"] for row in rows]
    assert all(row["chosen_positions"] != row["rejected_positions"] for row in rows)
    counts = np.bincount(np.concatenate([row["chosen_positions"] for row in rows]), minlength=40)
    assert len(rows[0]["chosen_positions"]) == 10
    assert counts.sum() == 300
    assert counts.max() < 20  # 7.5 expected each: no position is favoured
    assert counts.min() > 0


def test_soft_credit_is_the_clipped_exponential_with_a_sign_by_side():
    rewards = [[-3.0, 0.2, 1.0, 9.0]]
    table = scores_table(rewards, rewards)
    row = select_key_tokens(table, 1.0, 1.0, credit="soft", temperature=2.0, normalise=False).to_pylist()[0]
    np.testing.assert_allclose(row["chosen_weights"], np.exp([-0.5, 0.1, 0.5, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(row["rejected_weights"], np.exp([0.5, -0.1, -0.5, -1.5]), rtol=1e-6)
    row = select_key_tokens(table, 0.5, 0.5, credit="soft", temperature=2.0).to_pylist()[0]
    assert row["chosen_positions"] == [2, 3]
    np.testing.assert_allclose(row["chosen_weights"], 2 * np.exp([0.5, 1.5]) / np.exp([0.5, 1.5]).sum(), rtol=1e-6)
    flat_weights = select_key_tokens(table, 0.5, 0.5, credit="soft", temperature=1e9).to_pylist()[0]["chosen_weights"]
    np.testing.assert_allclose(flat_weights, [1.0, 1.0])


def test_adaptive_rules_leave_the_end_of_a_response_out():
    table = with_provenance(scores_table([[1.0, 1.0, 9.0]], [[0.0, 0.0, -9.0]]), "scores", {"end_ids": [2]})
    for rule in ("mass", "effective", "threshold", "dataset", "random", "last"):
        row = select_key_tokens(table, 1.0, 1.0, rule_chosen=rule, rule_rejected=rule).to_pylist()[0]
        assert 2 not in row["chosen_positions"], rule
        assert 2 not in row["rejected_positions"], rule


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"rule_chosen": "topp"}, r"rule_chosen is 'topp' \(did you mean 'top'\?\)"),
        ({"rule_rejected": "x"}, "rule_rejected is 'x': expected one of top, random"),
        ({"credit": "firm"}, "credit is 'firm'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"clip_low": 2.0}, "clip_low 2.0 is above clip_high 1.5"),
    ],
)
def test_impossible_rules_are_refused_by_name(setting, match):
    with pytest.raises(UserError, match=match):
        select_key_tokens(scores_table([[1.0]], [[1.0]]), **setting)


def test_settings_in_one_object_select_as_keywords_do_and_exclude_them():
    table = scores_table([[0.1, 0.5, 0.2, 0.4]], [[0.3, 0.1]])
    keywords = {"k_chosen": 0.5, "rule_rejected": "random", "credit": "soft"}
    made = select_key_tokens(table, settings=SelectSettings(**keywords), seed=2)
    assert made.equals(select_key_tokens(table, **keywords, seed=2), check_metadata=True)
    for doubled in ({"k_chosen": 0.5}, {"credit": "soft"}):
        with pytest.raises(UserError, match="settings and keywords"):
            select_key_tokens(table, settings=SelectSettings(), **doubled)
    with pytest.raises(UserError, match=r"unknown key 'rule'.*valid keys: k_chosen"):
        select_key_tokens(table, rule="top")


def test_target_sums_are_weighted_sums_over_the_kept_tokens():
    table = select_key_tokens(
        scores_table([[0.0, 3.0, 2.0], [1.0]], [[5.0, 4.0], [0.5, 0.0]]), 0.7, 0.5, credit="soft", normalise=False
    )
    logps = make_table(
        "logps",
        {
            "pair_id": [0, 1],
            "chosen_logps": [[-1.0, -2.0, -4.0], [-8.0]],
            "rejected_logps": [[-3.0, -5.0], [-6.0, -7.0]],
        },
    )
    chosen, rejected = target_sums(table, logps)
    np.testing.assert_allclose(chosen, [-2 * np.exp(1.5) - 4 * np.exp(1.5), -8 * np.exp(1.0)], rtol=1e-6)
    np.testing.assert_allclose(rejected, [-5 * np.exp(-1.5), -7.0], rtol=1e-6)
    pairs = table.select(["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    assert target_sums(pairs, logps)[0].tolist() == [-7.0, -8.0]


def test_several_oracles_are_joined_by_mean_or_pessimistic_minimum():
    tables = [
        with_provenance(scores_table([[1.0, -2.0], [0.5]], [[0.0], [4.0]]), "scores", {"oracle": "a", "end_ids": [7]}),
        with_provenance(scores_table([[0.0, 2.0], [1.5]], [[1.0], [-4.0]]), "scores", {"oracle": "b", "end_ids": [7]}),
    ]
    mean, low = combine_scores(tables), combine_scores(tables, "min")
    assert mean.column("chosen_rewards").to_pylist() == [[0.5, 0.0], [1.0]]
    assert low.column("chosen_rewards").to_pylist() == [[0.0, -2.0], [0.5]]
    assert low.column("rejected_rewards").to_pylist() == [[0.0], [-4.0]]
    assert provenance_of(low)["oracle"] == ["a", "b"]
    assert provenance_of(low)["end_ids"] == [7]
    assert len(select_key_tokens(low)) == 2
    with pytest.raises(UserError, match="do not hold the same pairs"):
        combine_scores([tables[0], tables[1].slice(1)])
    with pytest.raises(UserError, match="expected mean or min"):
        combine_scores(tables, "median")


@examples(100)
@given(
    st.lists(st.tuples(*[st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9)] * 2), min_size=1, max_size=6),
    st.floats(0.01, 3),
)
def test_pair_confidence_is_cw_po_s_weight_written_out(pairs, scale):
    scores = scores_table(*map(list, zip(*pairs, strict=True)))
    table = select_key_tokens(scores, confidence=scale)
    for row, (chosen, rejected) in zip(table.to_pylist(), pairs, strict=True):
        won = 1 / (1 + math.exp(-scale * (math.fsum(chosen) - math.fsum(rejected))))
        assert row["pair_weight"] == pytest.approx(max(0, 2 * (won - 0.5)), abs=1e-6)
    assert provenance_of(table)["confidence"] == scale


def test_pair_weights_survive_disk_and_are_there_only_if_asked_for(tmp_path):
    scores = scores_table([[1.0, 2.0], [0.0]], [[1.0], [1.0]])
    assert "pair_weight" not in select_key_tokens(scores).column_names
    write_table(tmp_path / "scores", scores)
    folder = select(tmp_path / "scores", tmp_path / "selection", confidence=0.5)
    weights = read_table(folder, "selection")["pair_weight"].to_pylist()
    assert weights == [pytest.approx(math.tanh(0.5)), 0]
    bad = read_table(folder, "selection").set_column(8, "pair_weight", pa.array([1.0, -0.5], pa.float32()))
    write_table(tmp_path / "bad", with_provenance(bad, "selection", {}))
    with pytest.raises(UserError, match=r"pair 1: its pair_weight is -0.5, expected 0 or more"):
        read_table(tmp_path / "bad", "selection")
    with pytest.raises(UserError, match="confidence is -1"):
        select_key_tokens(scores, confidence=-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"credit": "soft"}, {"rule_chosen": "effective"}, {"rule_rejected": "mass"}, {"confidence": 0.1},
     {"label_log_odds": 0.5}, {"rule_chosen": "dataset"}, {"rule_chosen": "shorter"}],
)  # fmt: skip
def test_a_table_without_pairs_is_refused_by_every_rule(tmp_path, settings):
    write_table(tmp_path / "scores", scores_table([[1.0]], [[1.0]]).slice(1))
    with pytest.raises(UserError, match="holds no pair"):
        select(tmp_path / "scores", tmp_path / "selection", **settings)


@pytest.mark.parametrize("rejected", [[[2.0, 1.0]], [[3.0, 0.0], [9.0]]])
def test_a_selection_in_which_no_pair_has_weight_is_refused(tmp_path, rejected):
    """The oracle ranks every pair the other way, or both responses alike: nothing would be trained."""
    chosen = [[1.0, 2.0], [0.0]][: len(rejected)]
    write_table(tmp_path / "scores", scores_table(chosen, rejected))
    with pytest.raises(UserError, match="every pair has weight 0"):
        select(tmp_path / "scores", tmp_path / "selection", confidence=0.5)
    assert not list((tmp_path / "selection").glob("*.parquet"))
