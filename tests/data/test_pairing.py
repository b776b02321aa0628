"""Pairs from labels, scores and ranks: public datasets in the schemas of their cards."""

from __future__ import annotations

import json

import datasets
import pytest

from sepo.data.encoding import tokenize_pairs
from sepo.data.formats import table_of
from sepo.data.loading import load_preferences
from sepo.data.pairing import PRESETS
from sepo.data.rows import DropRow, normalise_row
from sepo.errors import UserError
from sepo.recipe.settings import PairsFrom
from tiny_models import tiny_tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def parts(content: str) -> list[dict]:
    return [{"type": "text", "text": content, "image": None, "mimeType": None}]


def ranked(*scored: tuple[str, float | None]) -> dict:
    return {"instruction": "Q", "completions": [completion(*one) for one in scored]}


def completion(response: str, score: float | None) -> dict:
    return {"response": response, "fine-grained_score": score, "overall_score": 10.0, "model": "m", "critique": "c"}


def arena(winner: str, *, in_parts: bool = False) -> dict:
    wrap = parts if in_parts else str
    sides = {
        f"conversation_{side}": [
            {"role": "user", "content": wrap("Q")}, {"role": "assistant", "content": wrap(text)},
        ]
        for side, text in (("a", "good"), ("b", "bad"))
    }  # fmt: skip
    return {"model_a": "x", "model_b": "y", "winner": winner, "turn": 1, **sides}


def arena_55k(first: int, second: int, tie: int) -> dict:
    return {
        "model_a": "x", "model_b": "y", "prompt": json.dumps(["Q"]), "response_a": json.dumps(["good"]),
        "response_b": json.dumps(["bad"]), "winner_model_a": first, "winner_model_b": second, "winner_tie": tie,
    }  # fmt: skip


# For every preset: rows, and the result of each: (prompt, chosen, rejected), or the reason of the drop.
GOOD = ("Q", "good", "bad")
TURNED = ("Q", "bad", "good")
CASES: dict[str, tuple[list[dict], list]] = {
    "ultrafeedback": (
        [
            ranked(("so so", 3.0), ("bad", 1.0), ("good", 4.5)), ranked(("so so", 3.0), ("bad", 3.0)),
            ranked(("so so", 3.0), ), ranked(("good", 3.0), ("x", None), ("bad", 2.0)),
        ],
        [GOOD, "tie", "one response", GOOD],
    ),
    "pku-saferlhf": (
        [
            {"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 0},
            {"prompt": "Q", "response_0": "good", "response_1": "bad", "better_response_id": 0, "safer_response_id": 0},
            {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": None, "safer_response_id": 0},
            {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 7, "safer_response_id": 0},
        ],
        [GOOD, GOOD, "missing value", "unknown label"],
    ),
    "pku-saferlhf-safer": (
        [{"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 0, "safer_response_id": 1}],
        [GOOD],
    ),
    "helpsteer2": (
        [
            {"prompt": "Q", "response": "bad", "helpfulness": 1, "verbosity": 2},
            {"prompt": "Q", "response": "good", "helpfulness": 3, "verbosity": 2},
            {"prompt": "R", "response": "a", "helpfulness": 3, "verbosity": 2},
            {"prompt": "R", "response": "b", "helpfulness": 3, "verbosity": 2},
            {"prompt": "S", "response": "b", "helpfulness": 3, "verbosity": 2},
        ],
        [GOOD, "tie", "one response"],
    ),
    "helpsteer2-preference": (
        [
            {"prompt": "Q", "response_1": "good", "response_2": "bad", "preference_strength": -2},
            {"prompt": "Q", "response_1": "bad", "response_2": "good", "preference_strength": 1},
            {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        ],
        [GOOD, GOOD, "tie"],
    ),
    "helpsteer3": (
        [
            {"context": [user("Q")], "response1": "good", "response2": "bad", "overall_preference": -3},
            {"context": [user("Q")], "response1": "bad", "response2": "good", "overall_preference": 1},
            {"context": [user("Q")], "response1": "a", "response2": "b", "overall_preference": 0},
        ],
        [([user("Q")], "good", "bad")] * 2 + ["tie"],
    ),
    "nectar": (
        [
            {"prompt": "\n\nHuman: Q\n\nAssistant: ", "good_natured": True, "turns": 1, "answers": [
                {"answer": "so so", "rank": 2.0, "model": "x"}, {"answer": "bad", "rank": 7.0, "model": "y"},
                {"answer": "good", "rank": 1.0, "model": "z"}]},
        ],
        [([user("Q")], "good", "bad")],
    ),
    "shp": (
        [
            {"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 10, "score_B": 2},
            {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 1, "score_B": 2},
        ],
        [GOOD, GOOD],
    ),
    "arena-55k": (
        [
            arena_55k(1, 0, 0), arena_55k(0, 1, 0), arena_55k(0, 0, 1),
            {**arena_55k(1, 0, 0), "response_b": json.dumps([None])},
            {**arena_55k(1, 0, 0), "prompt": json.dumps(["P", "Q"]), "response_a": json.dumps(["same", "good"]),
             "response_b": json.dumps(["same", "bad"])},
            {**arena_55k(1, 0, 0), "prompt": json.dumps(["P", "Q"]), "response_a": json.dumps(["one", "good"]),
             "response_b": json.dumps(["other", "bad"])},
        ],
        [([user("Q")], "good", "bad"), ([user("Q")], "bad", "good"), "tie", "missing value",
         ([user("P"), assistant("same"), user("Q")], "good", "bad"), ([user("P")], "one\n\ngood", "other\n\nbad")],
    ),
    "arena": (
        [arena("model_a"), arena("model_b"), arena("tie"), arena("tie (bothbad)"), arena("both_bad"),
         arena("model_a", in_parts=False), arena("nobody")],
        [([user("Q")], "good", "bad"), ([user("Q")], "bad", "good"), "tie", "tie", "tie",
         ([user("Q")], "good", "bad"), "unknown label"],
    ),
    "orca-dpo-pairs": (
        [{"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
         {"system": "Be kind.", "question": "Q", "chosen": "good", "rejected": "bad"}],
        [GOOD, ("Be kind.\n\nQ", "good", "bad")],
    ),
    "distilabel-orca": (
        [
            {"system": "S", "input": "Q", "chosen": "good", "rejected": "bad", "status": "unchanged", "rating": [9, 5]},
            {"system": "S", "input": "Q", "chosen": "good", "rejected": "bad", "status": "swapped", "rating": [5, 9]},
            {"system": "S", "input": "Q", "chosen": "a", "rejected": "b", "status": "tie", "rating": [9, 9]},
        ],
        [("S\n\nQ", "good", "bad")] * 2 + ["tie"],
    ),
    "distilabel": (
        [
            {"instruction": "Q", "generations": ["so so", "good", "bad"], "ratings": [3, 5, 1]},
            {"instruction": "Q", "generations": ["a", "b"], "ratings": [3, 3]},
            {"instruction": "Q", "generations": ["a", "b"], "ratings": [3]},
        ],
        [GOOD, "tie", "wrong type"],
    ),
    "unpaired": (
        [
            {"prompt": "Q", "completion": "bad", "label": False}, {"prompt": "R", "completion": "a", "label": True},
            {"prompt": "Q", "completion": "good", "label": True}, {"prompt": "S", "completion": "a", "label": True},
            {"prompt": "S", "completion": "b", "label": True},
        ],
        [GOOD, "one response", "tie"],
    ),
}  # fmt: skip


def outcome(row: dict):
    try:
        return tuple(normalise_row(row)[:3])
    except DropRow as drop:
        return drop.reason


def test_every_preset_is_tried():
    assert CASES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stored", ["memory", "jsonl", "parquet"])
def test_a_public_dataset_becomes_pairs(tmp_path, name, stored):
    rows, expected = CASES[name]
    source = rows
    if stored == "jsonl":
        source = tmp_path / "p.jsonl"
        source.write_text("\n".join(json.dumps(row) for row in rows))
    elif stored == "parquet":
        source = tmp_path / "p.parquet"
        datasets.Dataset.from_list(rows).to_parquet(source)
    loaded = load_preferences(source, pairs_from=name)
    assert [outcome(row) for row in loaded] == expected
    assert loaded["pair_id"][:] == list(range(len(expected)))


def test_the_arena_of_today_has_content_in_parts():
    loaded = load_preferences([arena("model_a", in_parts=True), arena("model_b", in_parts=True)], pairs_from="arena")
    assert [outcome(row) for row in loaded] == [([user("Q")], "good", "bad"), ([user("Q")], "bad", "good")]


def test_datasets_with_chosen_and_rejected_need_no_preset():
    ultrafeedback_binarized = {
        "prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")],
        "messages": [user("Q"), assistant("good")], "score_chosen": 8.0, "score_rejected": 2.0,
    }  # fmt: skip
    skywork = {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")], "source": "x"}
    tulu_3 = {**ultrafeedback_binarized, "id": "x", "chosen_rating": 4.0, "rejected_rating": 2.0, "chosen_model": "y"}
    hh = {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}
    for row in (ultrafeedback_binarized, skywork, tulu_3, hh):
        assert outcome(load_preferences([row])[0]) == ([user("Q")], "good", "bad")


def test_helpsteer_prompts_with_turns_are_conversations():
    prompt = "First\n<extra_id_1>Assistant\nAnswer\n<extra_id_1>User\nSecond"
    assert outcome({"prompt": prompt, "chosen": "good", "rejected": "bad"}) == (
        [user("First"), assistant("Answer"), user("Second")], "good", "bad",
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.known_by])
def test_a_dataset_that_has_labels_is_told_its_preset(name):
    rows, _ = CASES[name]
    if {"chosen", "rejected"} <= rows[0].keys():
        return
    with pytest.raises(UserError, match=f"set pairs_from: {name}"):
        load_preferences(rows[:1])


def test_rows_without_a_pair_are_counted():
    rows, _ = CASES["arena"]
    table, report = tokenize_pairs(load_preferences(rows, pairs_from="arena"), tiny_tokenizer(), progress=False)
    assert len(table) == 3
    assert report.dropped == {"tie": 3, "unknown label": 1}
    assert report.details == {"unknown label": {"'nobody'": 1}}


def test_all_pairs_of_a_ranking():
    how = PairsFrom(responses="answers", text="answer", score="rank", lower_is_better=True, pick="all")
    row = {"prompt": "Q", "answers": [{"answer": name, "rank": rank} for name, rank in (("a", 1), ("b", 2), ("c", 2))]}
    loaded = load_preferences([row], pairs_from=how)
    assert [outcome(one) for one in loaded] == [("Q", "a", "b"), ("Q", "a", "c")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"responses": ["a", "b", "c"], "label": "l"}, "two columns"),
        ({"responses": ["a", "b"]}, "either label or score"),
        ({"responses": ["a", "b"], "label": "l", "score": "s"}, "either label or score"),
        ({"responses": "a"}, "need score"),
        ({"responses": ["a", "b"], "group_by": "p", "label": "l"}, "group_by takes one column"),
    ],
)
def test_an_impossible_description_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        PairsFrom(**settings)


def test_wrong_names_are_refused_in_one_line():
    with pytest.raises(UserError, match="unknown pairs_from 'nectarr' \\(did you mean 'nectar'"):
        load_preferences([{"prompt": "Q"}], pairs_from="nectarr")
    with pytest.raises(UserError, match="names the column 'answers'"):
        load_preferences([{"prompt": "Q", "answer": []}], pairs_from="nectar")
    with pytest.raises(UserError, match="but pairs_from makes them"):
        load_preferences(CASES["nectar"][0], pairs_from="nectar", columns={"chosen": "answers"})


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_response_without_a_score_is_left_out_as_pandas_writes_it_too(missing):
    rows = [ranked(("best", 5.0), ("unscored", missing), ("worst", 1.0)), ranked(("only", 5.0), ("unscored", missing))]
    pairs = load_preferences(rows, pairs_from="ultrafeedback")
    assert [(row["chosen"], row["rejected"], row["drop_reason"]) for row in pairs] == [
        ("best", "worst", None), (None, None, "one response"),
    ]  # fmt: skip


def test_a_column_of_several_types_is_read_as_its_values():
    """Arrow has no type for them, so the whole column is kept as JSON."""
    notes = ({"truth": {"Type": ["1"]}}, {"truth": {"Type": "None"}})
    answers = [{**completion("ab"[i], 4.5 - i), "annotations": note} for i, note in enumerate(notes)]
    (pair,) = load_preferences([{"instruction": "Q", "completions": answers}], pairs_from="ultrafeedback")
    assert (pair["chosen"], pair["rejected"]) == ("a", "b")
    rows = [{"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": label} for label in (1, "tie")]
    found = [(row["chosen"], row["drop_reason"]) for row in load_preferences(rows, pairs_from="pku-saferlhf")]
    assert found == [("b", None), (None, "tie")]
    row = {"chosen": "Y", "rejected": "N", "prompt": [user("Q")], "chat_template_kwargs": None, "prompt_system": None}
    rows = [{**row, "chat_template_kwargs": {"budget": value}, "prompt_system": text}
            for value, text in ((5, "Be brief."), ("auto", ["x"]))]  # fmt: skip
    first, second = datasets.Dataset(table_of(rows))
    pair = normalise_row(first)
    assert pair.options == {"budget": 5}
    assert pair.messages == [{"role": "system", "content": "Be brief."}, user("Q")]
    with pytest.raises(DropRow):
        normalise_row(second)


@pytest.mark.parametrize(("scores", "kept", "notes"), [(("5", "5.0"), 0, 0), (("2", 5), 1, 1), (("n/a", 5), 1, 0)])
def test_scores_that_are_texts_count_as_numbers(scores, kept, notes):
    row = {"prompt": "Q", "chosen": "Y", "rejected": "N", "score_chosen": scores[0], "score_rejected": scores[1]}
    if not kept:
        with pytest.raises(DropRow, match="tie"):
            normalise_row(row)
    else:
        assert len(normalise_row(row).notes) == notes
