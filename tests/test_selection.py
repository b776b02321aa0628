"""Token rewards and key tokens against the rule written out token by token."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepo.errors import UserError
from sepo.rewards import response_sums, token_rewards
from sepo.selection import extreme_positions, keep_counts, select_key_tokens
from sepo.tables import flat, make_table, provenance_of, read_table, with_provenance, write_table


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


@settings(max_examples=200, deadline=None)
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
    positions, kept = extreme_positions(rewards, lengths, counts, highest=True)
    assert positions.tolist() == [0, 0, 3]
    assert kept.tolist() == [1, 2]
    eligible = np.array([False, False, False, True, False, True])
    positions, kept = extreme_positions(rewards, lengths, np.array([1, 3]), highest=True, eligible=eligible)
    assert positions.tolist() == [0, 1, 3]  # a response without an eligible token keeps its best one
    assert kept.tolist() == [1, 2]


def test_the_end_of_a_response_is_a_key_token_only_if_asked_for():
    table = scores_table([[0.0, 1.0, 9.0], [5.0]], [[3.0, 1.0, -9.0], [5.0]])  # ids count from 0
    table = with_provenance(table, "scores", {"end_ids": [2, 0]})
    for include_end, chosen, rejected in ((True, [1, 2], [1, 2]), (False, [0, 1], [0, 1])):
        rows = select_key_tokens(table, 0.7, 0.7, include_end).to_pylist()
        assert rows[0]["chosen_positions"] == chosen
        assert rows[0]["rejected_positions"] == rejected
        assert rows[1]["chosen_positions"] == [0]  # a response that is nothing but its end keeps it


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
    table = token_rewards(pairs, oracle, reference)
    assert table.column("chosen_rewards").to_pylist() == [[0.5, -1.0], [1.0]]
    assert table.column("rejected_rewards").to_pylist() == [[0.0], [-1.0, 0.5]]
    assert provenance_of(table)["oracle"] == "o"
    chosen, rejected = response_sums(table, "rewards")
    assert chosen.tolist() == [-0.5, 1.0]
    assert rejected.tolist() == [0.0, -0.5]
    with pytest.raises(UserError, match="not those of these pairs"):
        token_rewards(pairs, oracle.slice(1), reference)
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
    with pytest.raises(UserError, match="no column 'chosen_rewards'"):
        read_table(tmp_path / "pairs", "scores")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "part-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet"):
        read_table(tmp_path / "bad", "scores")
