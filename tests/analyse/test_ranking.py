"""Rankings of a few tokens against values computed by hand, invariances of the measures, and the command."""

import json
import math

import numpy as np
import pytest

from sepo.analyse import ranking as r
from sepo.cli import main
from sepo.credit.selection import select_key_tokens
from sepo.data.tables import SCHEMAS, make_table, write_table
from sepo.errors import UserError
from sepo.evaluate.words import word_truth
from sepo.files import write_text
from sepo.recipe.reading import dump_recipe, parse_recipe
from tiny_models import tiny_tokenizer

TOKENS = {"chosen": "ab cd", "rejected": "ab ef"}  # one token a character


def valence(word):
    return {"ab": 2.0, "cd": -1.0, "ef": -4.0}.get(word, 0.0)


def oracle(chosen, rejected, texts=TOKENS, seed=None):
    """An oracle over one pair, rewards as given."""
    tokenizer = tiny_tokenizer()
    table = make_table(
        "scores",
        {
            "pair_id": [3],
            "prompt_ids": [[1]],
            "chosen_ids": [tokenizer(texts["chosen"])["input_ids"]],
            "rejected_ids": [tokenizer(texts["rejected"])["input_ids"]],
            "chosen_rewards": [chosen],
            "rejected_rewards": [rejected],
        },
    )
    return r.ScoredOracle(table, tokenizer)


def selection(one, **settings):
    return select_key_tokens(one.scores, **{"k_chosen": 0.4, "k_rejected": 0.4, **settings})


def test_the_measures_equal_those_computed_by_hand():
    texts = {"chosen": "ab cd xy", "rejected": "ab ef xy"}
    one = oracle([5.0, 0, 0, 4, 0, 0, 3, 0], [-2.0, 0, 0, -5, -4, 0, -3, 0], texts)
    # Three of eight are kept: chosen a, c, x (one right, one wrong, one other); rejected e, f, x (two right).
    found = r.measure_selection(selection(one), r.oracle_truth(one, word_truth(valence)))
    assert found["lift_chosen"] == pytest.approx((1 / 3) / (2 / 8))
    assert found["lift_rejected"] == pytest.approx((2 / 3) / (2 / 8))
    assert found["lift"] == pytest.approx(3 / (6 * 2 / 8))
    assert found["mass"] == pytest.approx((2 + 8) / (4 + 8))
    assert found["weight_right"] == pytest.approx(3 / 6)
    assert found["weight_wrong"] == pytest.approx(1 / 6)
    assert found["effective"] == pytest.approx(3 / 8)
    # u of chosen: a 1, b 0 against x 1, y 0; c 1, d 0 below them. Rejected (u = -w): e, f -1, a, b 0; x -1, y 0.
    good_chosen = (0.5 + 1 + 0 + 0.5) / 4
    bad_chosen = (0.5 + 0 + 1 + 0.5) / 4
    good_rejected = (1 + 0.5 + 1 + 0.5) / 4
    bad_rejected = (0.5 + 1 + 0.5 + 1) / 4
    assert found["auc"] == pytest.approx((good_chosen + bad_chosen + good_rejected + bad_rejected) / 4)


def test_soft_weights_count():
    one = oracle([0.0] * 5, [0.0] * 5)
    columns = {name: selection(one, k_chosen=1, k_rejected=1).column(name) for name in SCHEMAS["selection"].names}
    columns["chosen_weights"], columns["rejected_weights"] = [[4.0, 0, 0, 1, 0]], [[0.0, 0, 0, 2, 3]]
    found = r.measure_selection(make_table("selection", columns), r.oracle_truth(one, word_truth(valence)))
    assert found["weight_right"] == pytest.approx((4 + 5) / 10)
    assert found["weight_wrong"] == pytest.approx(1 / 10)
    assert found["effective"] == pytest.approx((25 / 17 + 25 / 13) / 2 / 5)
    assert found["mass"] == 1.0  # all are kept
    assert found["lift"] == pytest.approx(1.0)


def random_oracle(seed, pairs=60, words=("ab", "cd", "ef", "xy", "pq", "uv")):
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    own = {"chosen": words[0], "rejected": words[2]}  # so that each response has a right token
    texts = {side: [" ".join([own[side], *rng.choice(words, 11)]) for _ in range(pairs)] for side in own}
    ids = {side: [tokenizer(text)["input_ids"] for text in texts[side]] for side in texts}
    table = make_table(
        "scores",
        {
            "pair_id": list(range(pairs)),
            "prompt_ids": [[1]] * pairs,
            **{f"{side}_ids": ids[side] for side in texts},
            **{f"{side}_rewards": [rng.normal(size=len(row)).tolist() for row in ids[side]] for side in texts},
        },
    )
    return r.ScoredOracle(table, tokenizer)


def test_random_tokens_are_no_better_than_chance_and_the_truth_itself_is_perfect():
    one = random_oracle(0)
    truth = r.oracle_truth(one, word_truth(valence))
    drawn = r.measure_selection(selection(one, rule_chosen="random", rule_rejected="random"), truth)
    assert drawn["auc"] == pytest.approx(0.5, abs=0.03)
    assert drawn["lift"] == pytest.approx(1.0, abs=0.1)
    columns = {name: one.scores.column(name) for name in one.scores.column_names}
    for side in ("chosen", "rejected"):
        lengths = [len(row) for row in one.scores.column(f"{side}_ids").to_pylist()]
        rows = np.split(np.nan_to_num(truth[side]), np.cumsum(lengths)[:-1])
        columns[f"{side}_rewards"] = [row.tolist() for row in rows]
    exact = r.ScoredOracle(make_table("scores", columns), one.tokenizer)
    best = r.measure_selection(
        selection(exact, rule_chosen="mass", rule_rejected="mass", k_chosen=1, k_rejected=1), truth
    )
    assert best["mass"] == 1.0
    assert best["weight_right"] == 1.0
    assert best["weight_wrong"] == 0.0
    worst = r.measure_selection(selection(exact, rule_chosen="reversed", rule_rejected="reversed"), truth)
    assert worst["auc"] < 0.5 < best["auc"]


def test_the_measures_depend_on_neither_the_scale_of_weights_nor_the_order_of_pairs():
    one = random_oracle(1)
    plain = selection(one, credit="soft", k_chosen=1, k_rejected=1)
    truth = r.oracle_truth(one, word_truth(valence))
    columns = {name: plain.column(name) for name in SCHEMAS["selection"].names}
    for side in ("chosen", "rejected"):
        columns[f"{side}_weights"] = [[3 * w for w in row] for row in plain.column(f"{side}_weights").to_pylist()]
    scaled = r.measure_selection(make_table("selection", columns), truth)
    order = np.random.default_rng(2).permutation(len(one.scores))
    moved = r.ScoredOracle(one.scores.take(order), one.tokenizer)
    again = r.measure_selection(plain.take(order), r.oracle_truth(moved, word_truth(valence)))
    for name, value in r.measure_selection(plain, truth).items():
        assert scaled[name] == pytest.approx(value), name
        assert again[name] == pytest.approx(value), name


def test_a_reward_with_one_pole_judges_the_side_that_has_right_tokens():
    one = random_oracle(3)
    found = r.measure_selection(
        selection(one), r.oracle_truth(one, word_truth(lambda word: -1.0 if word == "ef" else 0.0))
    )
    assert math.isnan(found["lift_chosen"])
    assert found["lift"] == pytest.approx(found["lift_rejected"], rel=0.3)
    assert found["weight_wrong"] > 0  # bad words in chosen responses
    assert 0 <= found["mass"] <= 1


def test_rules_are_compared_with_the_first_oracle_by_oracle():
    oracles = {str(seed): random_oracle(seed, 20) for seed in range(4)}
    rules = r.rules_of({name: r.default_rules(0.4)[name] for name in ("top 0.4", "random")})
    found = r.rank_rules(oracles, rules, word_truth(valence))
    assert found["oracles"] == ["0", "1", "2", "3"]
    assert found["baseline"] == "top 0.4"
    auc = {name: row["auc"] for name, row in found["rules"].items()}
    gaps = np.subtract(auc["random"]["values"], auc["top 0.4"]["values"])
    assert auc["random"]["difference"]["mean"] == pytest.approx(gaps.mean())
    reach = 3.182446 * gaps.std(ddof=1) / 2  # Student's t of three degrees of freedom
    assert auc["random"]["difference"]["high"] == pytest.approx(gaps.mean() + reach)
    assert auc["top 0.4"]["difference"]["mean"] == auc["top 0.4"]["difference"]["high"] == 0


def test_what_cannot_be_ranked_is_refused():
    one = oracle([1.0, -2, 0, 0, 0], [0.0] * 5)
    rules = r.rules_of({"weights": {"k_chosen": 1, "k_rejected": 1, "credit": "reward"}})
    with pytest.raises(UserError, match="a chosen token has -2"):
        r.rank_rules({"a": one}, rules, word_truth(valence))
    with pytest.raises(UserError, match="no word in 'a' carries the gold reward"):
        r.rank_rules({"a": one}, r.rules_of(r.default_rules(0.3)), word_truth(lambda word: 0.0))
    with pytest.raises(UserError, match="nothing to rank"):
        r.rank_rules({}, {}, word_truth(valence))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders of other pairs, as far as `sepo analyse --rules` reads them."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("rank") / f"seed-{seed}"
        tiny_tokenizer().save_pretrained(folder / "model")
        write_table(folder / "scores", random_oracle(seed, 10 + seed, ["good", "bad", "sad", "table", "walk"]).scores)
        recipe = parse_recipe({"reference": {"model": str(folder / "model")}, "eval": {"gold": "vader"}})
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        folders.append(folder)
    return folders


def test_rules_are_ranked_on_runs_into_a_page_numbers_and_a_figure(runs, tmp_path, capsys):
    assert main(["analyse", *map(str, runs), "--out", str(tmp_path), "--rules"]) == 0
    page = capsys.readouterr().out
    assert "\nRules on 2 oracles" in f"\n{page}"
    assert "Against top 0.3" in page
    assert "nan" not in page
    found = json.loads((tmp_path / "ranking.json").read_text())
    assert set(found["rules"]) == set(r.default_rules(0.3)) == set(found["settings"])
    assert found["oracles"] == ["seed-0", "seed-1"]
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_rules_of_a_file_are_ranked_on_one_run_in_its_own_folder(runs, tmp_path, capsys):
    rules = tmp_path / "rules.yaml"
    rules.write_text("mine: {k_chosen: 0.5, k_rejected: 0.5}\nall: {k_chosen: 1, k_rejected: 1}\n")
    assert main(["analyse", str(runs[0]), "--rules", str(rules)]) == 0
    assert "\nRules on one oracle" in f"\n{capsys.readouterr().out}"
    found = json.loads((runs[0] / "analysis" / "ranking.json").read_text())
    assert found["baseline"] == "mine"
    assert found["rules"]["mine"]["auc"]["low"] is None  # one oracle has no interval


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["{run}", "{run}", "--out", "{tmp}/o"], "several run folders with --rules"),
        (["{run}", "{run}", "--rules"], "--out DIR"),
        (["{run}", "{run}", "--out", "{tmp}/o", "--rules"], "is named twice"),
        (["{run}", "--rules", "{tmp}"], "expected a YAML file"),
        (["{run}", "--rules", "{tmp}/odd.yaml"], "rule 'a' is 3, expected settings"),
        (["{run}", "--rules", "{tmp}/typo.yaml"], "k_chosn"),
        (["--table", "{run}/scores", "--out", "{tmp}/o", "--rules"], "--gold"),
        (["--table", "{run}/scores", "--out", "{tmp}/o", "--gold", "vader", "--rules"], "needs --tokenizer"),
    ],
)
def test_bad_input_ends_in_one_line(runs, tmp_path, capsys, command, message):
    (tmp_path / "odd.yaml").write_text("a: 3\n")
    (tmp_path / "typo.yaml").write_text("a: {k_chosn: 0.3}\n")
    assert main(["analyse", *(word.format(tmp=tmp_path, run=runs[0]) for word in command)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sepo: ")]
    assert len(lines) == 1
    assert message in lines[0]
