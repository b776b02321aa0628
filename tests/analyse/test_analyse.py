"""Measures of a score table against values computed by hand, and the command on a run folder."""

import json
import math
import warnings

import numpy as np
import pytest

from sepo.analyse import analysis
from sepo.analyse import measures as a
from sepo.cli import main
from sepo.credit.selection import select_key_tokens
from sepo.data.tables import make_table, write_table
from sepo.errors import UserError
from sepo.evaluate.words import word_truth
from sepo.files import write_text
from sepo.recipe.reading import dump_recipe, parse_recipe
from sepo.report.statistics import rank_correlation
from tiny_models import tiny_model, tiny_tokenizer

CHOSEN = ["good day", "a nice one", "great"]
REJECTED = ["bad day 7", "so sad", "ok, a horrible thing"]


def scores(chosen=None, rejected=None, seed=0, provenance=None):
    """A score table over the texts above, one token per character; rewards are random if none are given."""
    tokenizer = tiny_tokenizer()
    rng = np.random.default_rng(seed)
    ids = {side: [tokenizer(text)["input_ids"] for text in texts] for side, texts in (("c", CHOSEN), ("r", REJECTED))}
    rewards = {
        name: given if given is not None else [rng.normal(size=len(row)).tolist() for row in ids[name]]
        for name, given in (("c", chosen), ("r", rejected))
    }
    return make_table(
        "scores",
        {
            "pair_id": [5, 6, 9],
            "prompt_ids": [[1], [1, 8], [1]],
            "chosen_ids": ids["c"],
            "rejected_ids": ids["r"],
            "chosen_rewards": rewards["c"],
            "rejected_rewards": rewards["r"],
        },
        provenance,
    )


def by_letters(value):
    """Rewards that are `value(word)` on the characters of each word and 0 on spaces and punctuation."""

    def rewards(text):
        words = text.split(" ")
        return [number for word in words for number in [*[value(word.strip(","))] * len(word), 0.0]][: len(text)]

    return [rewards(text) for text in CHOSEN], [rewards(text) for text in REJECTED]


def test_concentration_is_the_share_of_reward_in_the_largest_tokens():
    table = make_table(
        "scores",
        {
            "pair_id": [0],
            "prompt_ids": [[1]],
            "chosen_ids": [[1] * 10],
            "rejected_ids": [[1] * 10],
            "chosen_rewards": [[0.0, 4.0, 0.0, 4.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0]],
            "rejected_rewards": [[-4.0, 0.0, 0.0, -4.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]],
        },
    )
    found = a.concentration(table, points=11)
    np.testing.assert_allclose(found["magnitude"]["chosen"][:4], [0, 0.4, 0.8, 1.0])
    assert found["magnitude"]["share_for_80"] == pytest.approx(0.2)
    np.testing.assert_allclose(found["mass"]["rejected"][:3], [0, 0.5, 1.0])
    assert found["mass"]["share_for_80"] == pytest.approx(0.16)
    seen = a.overview(table)
    assert seen["chosen"]["effective_share"] == pytest.approx(0.2)  # two equal tokens of ten
    assert seen["rejected"]["sd"] == pytest.approx(np.std([-4, 0, 0, -4, 0, 0, 0, 0, 2, 0]))


def test_positions_are_binned_by_tenth_of_the_own_response():
    table = scores(*by_letters(lambda word: float(len(word))))
    selection = select_key_tokens(table, 0.5, 0.5)
    found = a.by_position(table, selection)
    for side, texts in (("chosen", CHOSEN), ("rejected", REJECTED)):
        tokens, sums, kept = np.zeros(10), np.zeros(10), np.zeros(10)
        rows = table.to_pylist()
        keys = selection.to_pylist()
        for row, key, text in zip(rows, keys, texts, strict=True):
            for place, reward in enumerate(row[f"{side}_rewards"]):
                bin_ = place * 10 // len(text)
                tokens[bin_] += 1
                sums[bin_] += reward
                kept[bin_] += place in key[f"{side}_positions"]
        assert found[side]["tokens"] == tokens.tolist()
        filled = tokens > 0
        np.testing.assert_allclose(np.array(found[side]["mean"])[filled], (sums / np.maximum(tokens, 1))[filled])
        np.testing.assert_allclose(np.array(found[side]["key_share"])[filled], (kept / np.maximum(tokens, 1))[filled])


def test_tokens_have_the_class_of_their_characters():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("ab 7,")["input_ids"] + [2])
    first = np.arange(len(ids)) == 0
    names = [a.CLASSES[index] for index in a.token_classes(tokenizer, ids, first)]
    assert names == ["word", "continuation", "space", "number", "punctuation", "special"]


def test_a_token_with_a_leading_space_starts_a_word(smollm2_dir):
    from sepo.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_dir)
    text = "Wonderfulness is unfathomable, 7 times!\n"
    ids = np.array(tokenizer(text)["input_ids"])
    names = [a.CLASSES[index] for index in a.token_classes(tokenizer, ids, np.arange(len(ids)) == 0)]
    pieces = [tokenizer.decode([token]) for token in ids]
    for piece, name, place in zip(pieces, names, range(len(ids)), strict=True):
        if piece.strip() and piece.strip()[0].isalpha():
            assert name == ("word" if piece.startswith(" ") or place == 0 else "continuation"), piece
    assert names[pieces.index(",")] == "punctuation"
    assert names[-1] == "space"
    assert "number" in names


def test_class_shares_add_up_and_follow_the_selection():
    table = scores()
    selection = select_key_tokens(table, 0.4, 0.4)
    found = a.by_class(table, selection, tiny_tokenizer())
    for side in ("chosen", "rejected"):
        for share in ("share", "key_share", "magnitude_share"):
            assert sum(row[share] or 0 for row in found[side].values()) == pytest.approx(1)
    letters = sum(character.isalpha() for text in CHOSEN for character in text)
    assert found["chosen"]["word"]["tokens"] + found["chosen"]["continuation"]["tokens"] == letters


def test_length_effects_tell_a_sum_that_grows_with_length_from_a_mean_that_does_not():
    lengths = [4, 8, 2, 9, 6], [3, 2, 5, 4, 1]
    table = make_table(
        "scores",
        {
            "pair_id": list(range(5)),
            "prompt_ids": [[i] for i in range(5)],
            "chosen_ids": [[1] * n for n in lengths[0]],
            "rejected_ids": [[1] * n for n in lengths[1]],
            "chosen_rewards": [[1.0] * n for n in lengths[0]],
            "rejected_rewards": [[1.0] * n for n in lengths[1]],
        },
    )
    found = a.length_effects(table)
    assert found["sum"]["accuracy"] == found["length_baseline"] == pytest.approx(0.8)
    assert found["mean"]["accuracy"] == pytest.approx(0.5)
    assert found["sum"]["length_correlation_chosen"] == pytest.approx(1.0)
    assert math.isnan(found["mean"]["length_correlation_chosen"])
    assert found["sum"]["accuracy_not_longer"] == 0.0


def test_agreement_counts_common_key_tokens_against_chance():
    first, same, other = scores(seed=1), scores(seed=1), scores(seed=2)
    opposite = [[-x for x in row] for row in first.column("chosen_rewards").to_pylist()]
    flipped = scores(opposite, [[-x for x in row] for row in first.column("rejected_rewards").to_pylist()])
    found = a.agreement({"other": other, "flipped": flipped, "same": same, "first": first}, 0.25)
    between = {(row["a"], row["b"]): row for row in found["between"]}
    assert between["same", "first"] == {
        "a": "same",
        "b": "first",
        "correlation": pytest.approx(1),
        "same_sign": 1,
        "overlap": 1,
    }
    assert between["flipped", "first"]["correlation"] == pytest.approx(-1)
    assert between["flipped", "first"]["same_sign"] == 0
    assert found["changed"]["same"] == 0
    assert found["changed"]["flipped"] == 1
    selected = [set(row["chosen_positions"]) for row in select_key_tokens(first, 0.25, 0.25).to_pylist()]
    again = [set(row["chosen_positions"]) for row in select_key_tokens(other, 0.25, 0.25).to_pylist()]
    both = [set(row["rejected_positions"]) for row in select_key_tokens(first, 0.25, 0.25).to_pylist()]
    both_again = [set(row["rejected_positions"]) for row in select_key_tokens(other, 0.25, 0.25).to_pylist()]
    common = sum(len(x & y) for x, y in zip(selected + both, again + both_again, strict=True))
    total = sum(map(len, selected + both))
    assert between["other", "first"]["overlap"] == pytest.approx(common / total)
    sizes = [len(text) for text in CHOSEN + REJECTED]
    expected = sum(len(s) ** 2 / n for s, n in zip(selected + both, sizes, strict=True)) / total
    assert found["chance"] == pytest.approx(expected)


def test_fidelity_ranks_the_truth_above_its_baselines():
    from sepo.evaluate.gold import lexicon_valence

    table = scores(*by_letters(lexicon_valence))
    logps = make_table(
        "logps",
        {
            "pair_id": [5, 6, 9],
            "chosen_logps": [[-float(i + 1) for i in range(len(text))] for text in CHOSEN],
            "rejected_logps": [[-1.0] * len(text) for text in REJECTED],
        },
    )
    found = a.truth({"oracle": table}, tiny_tokenizer(), word_truth(lexicon_valence), 0.3, logps, seed=0)
    assert list(found) == ["oracle", "random", "position", "surprisal"]
    assert found["oracle"]["auc"] == 1.0
    assert found["oracle"]["auc_unsigned"] == 1.0
    assert found["oracle"]["correlation"] == pytest.approx(1.0)
    assert found["oracle"]["lift_chosen"] > found["random"]["lift_chosen"]
    assert abs(found["random"]["correlation"]) < 0.5


def test_fidelity_is_undefined_on_a_side_without_words_of_the_right_sign():
    from sepo.evaluate.gold import plain_valence

    table = scores(*by_letters(plain_valence))  # "horrible", in a rejected response, is the only long word
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = a.truth({"oracle": table}, tiny_tokenizer(), word_truth(plain_valence), 0.1, None, seed=0)["oracle"]
    assert found["auc"] == found["auc_unsigned"] == 1.0
    assert found["precision_rejected"] == 2 / 4  # a key token a response, two of the long one
    assert found["lift_rejected"] == pytest.approx((2 / 4) / (8 / 35))
    assert math.isnan(found["precision_chosen"])
    assert math.isnan(found["lift_chosen"])


def test_baselines_put_the_same_tokens_first_on_both_sides():
    logps = make_table(
        "logps",
        {
            "pair_id": [5, 6, 9],
            "chosen_logps": [[-float(i == 2) for i in range(len(text))] for text in CHOSEN],
            "rejected_logps": [[-float(i == 3) for i in range(len(text))] for text in REJECTED],
        },
    )
    tables = a.baseline_tables(scores(), logps, seed=3)
    early = select_key_tokens(tables["position"], 0.01, 0.01).to_pylist()
    assert all(row["chosen_positions"] == row["rejected_positions"] == [0] for row in early)
    unlikely = select_key_tokens(tables["surprisal"], 0.01, 0.01).to_pylist()
    assert all(row["chosen_positions"] == [2] and row["rejected_positions"] == [3] for row in unlikely)
    assert set(a.baseline_tables(scores(), None, seed=3)) == {"random", "position"}


def test_rank_correlation_is_that_of_mean_ranks():
    assert rank_correlation(np.array([1, 1, 2, 5]), np.array([3, 3, 4, 9])) == pytest.approx(1)
    assert rank_correlation(np.array([1, 2, 3]), np.array([1, 1, 1])) != 0  # not defined: NaN


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The parts of a run folder that `sepo analyse` reads."""
    folder = tmp_path_factory.mktemp("analyse") / "run"
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_table(folder / "scores", scores(), rows_per_shard=2)
    write_table(
        folder / "logps" / "reference",
        make_table(
            "logps",
            {
                "pair_id": [5, 6, 9],
                "chosen_logps": [[-1.0] * len(text) for text in CHOSEN],
                "rejected_logps": [[-2.0] * len(text) for text in REJECTED],
            },
        ),
    )
    recipe = parse_recipe({"reference": {"model": str(folder / "model")}, "eval": {"gold": "vader"}})
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    return folder


def test_a_run_is_analysed_into_a_page_numbers_and_figures(run, capsys):
    assert main(["analyse", str(run)]) == 0
    page = capsys.readouterr().out
    for title in ("How few tokens", "Length", "Position", "Token classes", "Fidelity"):
        assert f"## {title}" in page or title in page
    assert "Agreement" not in page
    found = json.loads((run / "analysis" / "analysis.json").read_text())
    assert set(found["fidelity"]) == {"run", "random", "position", "surprisal"}
    for name in ("share", "position", "fidelity"):
        assert (run / "analysis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page.lower().replace("finance", "")


def test_another_gold_reward_brings_its_own_words(run, tmp_path, capsys):
    assert main(["analyse", str(run), "--gold", "plain", "--out", str(tmp_path / "plain")]) == 0
    page = capsys.readouterr().out
    row = next(line for line in page.splitlines() if line.startswith("run ") and "(–)" in line)
    assert "– (–)" in row  # no word is good
    assert "nan" not in page.lower().replace("finance", "")
    assert main(["analyse", str(run), "--out", str(tmp_path / "vader")]) == 0
    found = [json.loads((tmp_path / name / "analysis.json").read_text())["fidelity"] for name in ("plain", "vader")]
    assert found[0]["run"]["precision_chosen"] is None
    assert found[1]["run"]["precision_chosen"] is not None
    assert found[0]["run"]["auc"] != found[1]["run"]["auc"]


def test_several_tables_are_compared_with_the_last(run, tmp_path, capsys):
    write_table(tmp_path / "half", scores(seed=4))
    write_table(tmp_path / "full", scores(seed=5))
    out = tmp_path / "out"
    tables = ["--table", f"10%={tmp_path / 'half'}", "--table", f"100%={tmp_path / 'full'}"]
    assert main(["analyse", *tables, "--out", str(out), "--k", "0.5"]) == 0
    found = json.loads((out / "analysis.json").read_text())
    assert found["table"] == "100%"
    assert set(found["agreement"]["changed"]) == {"10%"}
    assert "classes" not in found  # no tokenizer was named
    assert (out / "agreement.png").is_file()
    assert "10%, 100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["analyse"], "needs a run folder"),
        (["analyse", "--table", "{tmp}/one"], "--out DIR"),
        (["analyse", "{tmp}"], "holds no scores/"),
        (["analyse", "--table", "{tmp}/none", "--out", "{tmp}/o"], "no scores table"),
        (["analyse", "--table", "{tmp}/one", "--out", "{tmp}/o", "--gold", "vader"], "needs --tokenizer"),
        (
            ["analyse", "--table", "{tmp}/one", "--table", "a={tmp}/two", "--out", "{tmp}/o"],
            "has other pairs than the first",
        ),
        (["analyse", "--table", "{tmp}/one", "--table", "one={tmp}/two", "--out", "{tmp}/o"], "used twice"),
        (["analyse", "--table", "{tmp}/empty", "--out", "{tmp}/o"], "holds no pair"),
        (["analyse", "--table", "{tmp}/one", "--out", "{tmp}/o", "--k", "0"], "k is 0"),
        (["analyse", "--table", "{tmp}/one", "--out", "{tmp}/o", "--reference-logps", "{tmp}/logps"], "of other pairs"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, command, message):
    write_table(tmp_path / "one", scores())
    write_table(tmp_path / "two", scores().slice(1))
    write_table(tmp_path / "empty", scores().slice(0, 0))
    write_table(
        tmp_path / "logps", make_table("logps", {"pair_id": [1], "chosen_logps": [[0.0]], "rejected_logps": [[0.0]]})
    )
    assert main([word.format(tmp=tmp_path) for word in command]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sepo: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_tables_of_other_pairs_are_not_compared():
    with pytest.raises(UserError, match="has other pairs than the first"):
        analysis.check_same_pairs(scores().slice(1), scores(), "b")


def test_special_tokens_without_a_role_are_no_words():
    """Gemma's end of turn is special and in no role, so `all_special_ids` lacks it."""
    from transformers import AddedToken

    from sepo.analyse.measures import CLASSES, token_classes
    from tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    token = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert token not in tokenizer.all_special_ids
    classes = token_classes(tokenizer, np.array([token]), np.array([False]))
    assert CLASSES[classes[0]] == "special"


def test_the_figure_of_fidelity_has_intervals_of_few_prompts(tmp_path, monkeypatch):
    """With 4 prompts ±1.96 standard errors cover far less than 95 %; an AUC of 1 has an interval too."""
    from matplotlib.axes import Axes

    from sepo.analyse import page
    from sepo.report.edges import Measured

    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, xerr, **options: drawn.append((x[0], xerr)))
    monkeypatch.setattr(page, "write_png", lambda figure, path: path)
    result = {
        "concentration": {"magnitude": {}, "mass": {}, "share": []},
        "position": {side: {"mean": [None] * 10} for side in ("chosen", "rejected")},
        "fidelity": {
            "run": {"auc": 0.7, "auc_se": 0.05, "prompts": 4},
            "all": {"auc": 1.0, "auc_se": 0.0, "prompts": 4},
        },
    }
    page.save_analysis_figures(result, tmp_path)
    for (value, reach), row in zip(drawn, result["fidelity"].values(), strict=True):
        low, high = Measured(row["auc"], row["auc_se"], 4, share=True).interval
        assert (value - reach[0][0], value + reach[1][0]) == pytest.approx((low, high))
        assert reach[0][0] > 1.96 * row["auc_se"]
