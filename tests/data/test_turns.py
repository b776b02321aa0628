"""Responses of several assistant turns: only the assistant's tokens are scored and trained."""

from __future__ import annotations

import html
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import CALL, TOOL, assistant, templates, tokenizer_named, user
from pairs import pairs_of_turns, pairs_table
from properties import examples
from sepo.cli import main
from sepo.credit.selection import select_key_tokens
from sepo.data import encoding
from sepo.data.encoding import tokenize_pairs, truncate_pair
from sepo.data.ragged import SIDES, as_read, flat, ragged
from sepo.data.rows import normalise_row
from sepo.data.tables import CONTEXT_COLUMNS, make_table, provenance_of, read_table, swap_sides, write_table
from sepo.errors import UserError
from sepo.forward.logps import token_logps
from sepo.forward.packing import Pair, pack, pad, read_length
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps, table_pairs
from sepo.hub.push import with_texts
from sepo.report.notebook import display
from sepo.report.payload import unpack
from sepo.training.columns import table_of
from sepo.training.trainer import PreferenceConfig
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import KINDS, odd_texts, tiny_tokenizer_of

THOUGHT = "<think>\nWell.\n</think>\n\n"
ASKED = [user("What is the sky?")]
TOOL_TURN = {"role": "tool", "content": "Rain, 7 degrees.", "name": "weather"}
CALL_AGAIN = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bergen"}}}]
# prompt, chosen and rejected response, tools
CASES = {
    "dialogue": (ASKED, [assistant("It is blue."), user("Truly?"), assistant("Yes, wonderful.")],
                 [assistant("Terrible."), user("Truly?"), assistant("No."), user("Sure?"), assistant("Quite sure.")]),
    "one and two turns": (ASKED, [assistant("It is blue.")], [assistant("Bad."), user("Why?"), assistant("No idea.")]),
    "the last turn thinks": (ASKED, [assistant("Blue."), user("Truly?"), assistant(THOUGHT + "Yes.")],
                             [assistant("Bad."), user("Truly?"), assistant(THOUGHT + "No.")]),
    "an agent": ([user("Weather?")], [assistant("", tool_calls=CALL), TOOL_TURN, assistant("It rains.")],
                 [assistant("", tool_calls=CALL_AGAIN), TOOL_TURN, assistant("I do not know.")]),
    "a turn of the system between": (ASKED, [assistant("Blue."), {"role": "system", "content": "Be brief."},
                                             user("Truly?"), assistant("Yes.")], [assistant("Bad.")]),
}  # fmt: skip


def row_of(case: str) -> dict:
    prompt, chosen, rejected = CASES[case]
    tools = {"tools": json.dumps([TOOL])} if case == "an agent" else {}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}


def tokenized(rows: list[dict], tokenizer, **options) -> pa.Table:
    return tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False, **options)[0]


def segments(table: pa.Table, side: str, tokenizer) -> list[tuple[bool, str]]:
    """The text of a response: (whether it is the assistant's, text), alternating."""
    ids, _, own = as_read(table, side)
    cuts = np.flatnonzero(np.diff(own)) + 1
    return [(bool(part[0]), tokenizer.decode(ids[at])) for part, at in
            zip(np.split(own, cuts), np.split(np.arange(len(ids)), cuts), strict=True)]  # fmt: skip


def said(message: dict) -> list[str]:
    """What must stand in the text of a turn."""
    return [
        message["content"].split("</think>")[-1].strip(),
        *re.findall("Oslo|Bergen", str(message.get("tool_calls"))),
    ]


def check_turns(table: pa.Table, side: str, turns: list[dict], tokenizer) -> None:
    """Each turn stands in the part that its role says, and nowhere else."""
    found = segments(table, side, tokenizer)
    if not found[0][0]:  # text that the template writes before the first turn on this side only
        assert not re.search(r"\w", re.sub(r"</?think>", "", found.pop(0)[1]))
    numbers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert [own for own, _ in found] == [i % 2 == 0 for i in range(2 * len(numbers) - 1)]
    for i, (own, text) in enumerate(found):
        inside = [turns[numbers[i // 2]]] if own else turns[numbers[i // 2] + 1 : numbers[i // 2 + 1]]
        outside = [turn for turn in turns if turn not in inside and turn["role"] != "system"]
        assert all(word in text or json.dumps(word)[1:-1] in text for turn in inside for word in said(turn)), text
        assert not any(len(word) > 6 and word in text for turn in outside for word in said(turn)), text


def test_each_turn_stands_in_the_part_that_its_role_says_under_every_template():
    kept = dict.fromkeys(CASES, 0)
    for name in templates():
        tokenizer = tokenizer_named(name)
        rows = [{"tools": None, **row_of(case)} for case in CASES]
        table = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False)[0]
        for i, number in enumerate(table["pair_id"].to_pylist()):  # a template that cannot write a row drops it
            case = list(CASES)[number]
            kept[case] += 1
            for side in SIDES:
                check_turns(table.slice(i, 1), side, rows[number][side], tokenizer)
    assert kept["dialogue"] == kept["one and two turns"] == kept["the last turn thinks"] == len(templates())
    assert kept["an agent"] >= 20
    assert kept["a turn of the system between"] >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_any_kind_keep_their_turns_apart_and_lose_nothing(kind):
    tokenizer = tiny_tokenizer_of(kind)
    texts = odd_texts(60, seed=3)
    rows = [
        {"prompt": [user(a)], "chosen": [assistant(b), user(c), assistant(d)], "rejected": [assistant(e)]}
        for a, b, c, d, e in zip(*(texts[i::5] for i in range(5)), strict=True)
    ]
    table = tokenized(rows, tokenizer)
    assert len(table) >= 8
    for row, (pair_id, columns) in enumerate(zip(table["pair_id"].to_pylist(), table.to_pylist(), strict=True)):
        alone = table.slice(row, 1)
        (mine, first), (_, between), (_, second) = segments(alone, "chosen", tokenizer)
        assert mine
        first_turn = rows[pair_id]["chosen"][0]["content"]
        wanted = tokenized([{"prompt": rows[pair_id]["prompt"], "chosen": first_turn, "rejected": "no"}], tokenizer)
        assert first == tokenizer.decode(wanted["chosen_ids"][0].as_py())  # the turn as a response of its own
        assert columns["prompt_ids"] == wanted["prompt_ids"][0].as_py()
        assert between.lstrip().startswith("<|user|>")
        assert second.endswith("<|end|>")
        assert columns["chosen_ids"].count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2


def test_two_dialogues_that_a_user_parts_need_a_prompt_of_their_own():
    parted = {side: [*ASKED, assistant("Blue."), user(f"{side}?"), assistant(side)] for side in SIDES}
    with pytest.raises(Exception, match="no shared prompt"):
        normalise_row(parted)
    given_prompt = normalise_row({"prompt": ASKED, **{side: turns[1:] for side, turns in parted.items()}})
    assert given_prompt.prompt == ASKED
    assert [len(turns) for turns in given_prompt.turns] == [3, 3]


def test_equal_turns_before_the_difference_belong_to_the_prompt_and_an_equal_call_does_not():
    begun = [assistant("Blue."), user("Truly?")]
    pair = normalise_row({"prompt": ASKED, "chosen": [*begun, assistant("Yes."), user("So?"), assistant("Yes!")],
                          "rejected": [*begun, assistant("No.")]})  # fmt: skip
    assert pair.prompt == [*ASKED, *begun]
    assert [len(turns) for turns in pair.turns] == [3, 1]
    call = assistant("", tool_calls=CALL)
    pair = normalise_row({"prompt": ASKED, "chosen": [call, TOOL_TURN, assistant("Rain.")],
                          "rejected": [call, {**TOOL_TURN, "content": "Sun."}, assistant("Sun.")]})  # fmt: skip
    assert pair.prompt == ASKED
    assert [len(turns) for turns in pair.turns] == [3, 3]


def test_a_dataset_of_single_turns_has_the_columns_that_it_had():
    single = {"prompt": ASKED, "chosen": [assistant("Blue.")], "rejected": [assistant("Bad.")]}
    table = tokenized([single], tokenizer_named("qwen3"))
    assert not set(CONTEXT_COLUMNS) & set(table.column_names)
    both = tokenized([single, row_of("dialogue")], tokenizer_named("qwen3"))
    assert set(CONTEXT_COLUMNS) <= set(both.column_names)
    assert both["chosen_context_ids"][0].as_py() == []


# --- what models read -----------------------------------------------------------------------------------------------


def plain_double(model, pair: Pair, side: str) -> list[float]:
    """Log-probability of each response token in float64, from the whole sequence written down token by token."""
    ids, context, at = (list(getattr(pair, f"{side}_{name}")) for name in ("ids", "context_ids", "context_at"))
    sequence, places = list(pair.prompt_ids), []
    for i, token in enumerate(ids):
        sequence += [extra for extra, place in zip(context, at, strict=True) if place == i]
        places.append(len(sequence))
        sequence.append(token)
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
    return [logps[place - 1, sequence[place]].item() for place in places]


@pytest.mark.parametrize("layout", ["packed", "padded", "unbatched"])
def test_log_probabilities_are_those_of_the_whole_sequence_in_float64(layout):
    model, pairs = tiny_model("llama").double(), pairs_of_turns()
    lay_out = {"packed": pack, "padded": pad, "unbatched": lambda pairs: pad(pairs, unbatched=True)}[layout]
    wanted = []
    for pair in pairs:
        for side in SIDES:
            every, positions = plain_double(model, pair, side), getattr(pair, f"{side}_positions")
            wanted += every if positions is None else [every[i] for i in positions]
    if layout == "packed":
        assert prepare_model(model) == "packed"
    batch = lay_out(pairs)
    got = token_logps(model, batch)
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)
    ids = [np.asarray(getattr(p, f"{s}_ids"))[list(getattr(p, f"{s}_positions") or range(len(getattr(p, f"{s}_ids"))))]
           for p in pairs for s in SIDES]  # fmt: skip
    assert batch.target_ids.tolist() == np.concatenate(ids).tolist()
    if layout == "packed":
        assert pack(pairs[:1]).num_tokens == read_length(pairs[0])


def test_a_stored_pass_has_a_number_for_each_token_of_the_assistant():
    model, pairs = tiny_model("llama"), pairs_of_turns()
    table = pairs_table(pairs)
    logps = dataset_logps(model, table)
    for side in SIDES:
        for row, pair in zip(logps[f"{side}_logps"].to_pylist(), pairs, strict=True):
            np.testing.assert_allclose(row, plain_double(model, pair, side), atol=2e-5)
    assert table_pairs(table).longest == 21 + 17 + 5


@given(st.data())
@examples(60)
def test_truncation_cuts_what_is_read(data):
    ids, context = (
        list(range(100, 100 + data.draw(st.integers(1, 8)))),
        data.draw(st.lists(st.integers(1, 99), max_size=6)),
    )
    at = sorted(data.draw(st.integers(0, len(ids) - 1)) for _ in context)
    most = data.draw(st.integers(3, 20))
    row = {"chosen_ids": ids, "chosen_context_ids": context, "chosen_context_at": at}
    read = encoding._as_read(row, "chosen")
    assert [token for token, _ in read] == np.insert(ids, at, context).astype(int).tolist()
    cut = truncate_pair([1, 2], read, [5], max_length=most, longest_response=0)[1]
    found = encoding._from_read("chosen", cut)
    kept = [token for token, own in cut if own]
    assert found["chosen_ids"] == kept
    if kept:
        rebuilt = np.insert(found["chosen_ids"], found["chosen_context_at"], found["chosen_context_ids"]).tolist()
        assert rebuilt == [token for token, _ in cut][: len(rebuilt)]
        assert not any(own for _, own in cut[len(rebuilt) :])


def test_long_responses_are_cut_and_counted():
    tokenizer = tokenizer_named("qwen3")
    rows = [row_of("dialogue")]
    whole, _ = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False)
    prompt = len(whole["prompt_ids"][0])
    most = prompt + len(as_read(whole, "rejected")[0]) - 3
    cut, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, max_length=most, progress=False)
    assert report.truncated_responses == 1
    assert as_read(cut, "rejected")[0].tolist() == as_read(whole, "rejected")[0][:-3].tolist()
    assert as_read(cut, "chosen")[0].tolist() == as_read(whole, "chosen")[0].tolist()


# --- what reads the tables ------------------------------------------------------------------------------------------


def scored(case: str = "dialogue", name: str = "qwen3") -> tuple[pa.Table, object]:
    """A score table of a case, with random rewards."""
    tokenizer = tokenizer_named(name)
    table = tokenized([row_of(case)], tokenizer)
    columns = {name: table[name] for name in table.column_names}
    rng = np.random.default_rng(0)
    for side in SIDES:
        ids, lengths = flat(table[f"{side}_ids"])
        columns[f"{side}_rewards"] = ragged(rng.normal(size=len(ids)).astype(np.float32), lengths)
    return make_table("scores", columns, provenance_of(table)), tokenizer


def test_no_end_of_a_turn_is_a_key_token():
    scores, tokenizer = scored()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for include_end in (False, True):
        selection = select_key_tokens(scores, 1.0, 1.0, include_end)
        for side in SIDES:
            ids = np.array(selection[f"{side}_ids"][0].as_py())
            chosen = ids[selection[f"{side}_positions"][0].as_py()]
            assert (ids == end).sum() == {"chosen": 2, "rejected": 3}[side]
            assert (chosen == end).sum() == ((ids == end).sum() if include_end else 0)
            assert len(chosen) == len(ids) - (0 if include_end else (ids == end).sum())


def test_a_table_keeps_the_context_on_disk_and_with_swapped_sides(tmp_path):
    scores, _ = scored()
    write_table(tmp_path / "scores", scores)
    assert read_table(tmp_path / "scores", "scores").equals(scores)
    swapped = swap_sides(scores)
    assert as_read(swapped, "chosen")[0].tolist() == as_read(scores, "rejected")[0].tolist()


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("chosen_context_at", lambda row: [99] * len(row), "context token has the place 99"),
        ("chosen_context_at", lambda row: row[:-1], "places for"),
        ("rejected_context_at", lambda row: row[::-1], "expected ascending places"),
        ("chosen_context_ids", lambda row: [-1] * len(row), "context id is -1"),
        ("rejected_context_ids", None, "has only"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(column, change, message, tmp_path):
    scores, _ = scored()
    index = scores.column_names.index(column)
    if change is None:
        table = scores.remove_column(index)
    else:
        table = scores.set_column(index, column, pa.array([change(scores[column][0].as_py())], pa.list_(pa.int32())))
    write_table(tmp_path / "scores", table)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "scores", "scores")


def test_a_pushed_table_is_read_back_with_the_same_turns():
    scores, tokenizer = scored()
    shared = with_texts(scores, None, tokenizer)
    assert shared["chosen"][0].as_py() == tokenizer.decode(as_read(scores, "chosen")[0])
    for side in SIDES:
        own = as_read(scores, side)[2]
        assert shared[f"{side}_mask"][0].as_py() == own.astype(int).tolist()
        np.testing.assert_array_equal(
            np.array(shared[f"{side}_rewards"][0].as_py())[own], scores[f"{side}_rewards"][0].as_py()
        )
    data = datasets.Dataset(shared).remove_columns(["chosen_weights", "rejected_weights", "pair_weight"])
    settings = PreferenceConfig(output_dir="unused")
    back = table_of("train_dataset", data, settings, lambda: tokenizer)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", *CONTEXT_COLUMNS):
        assert back[name].to_pylist() == scores[name].to_pylist(), name
    with pytest.raises(UserError, match="chosen_mask and rejected_mask"):
        table_of(
            "train_dataset", data.remove_columns("chosen_mask"), PreferenceConfig(output_dir="x"), lambda: tokenizer
        )
    weighted = datasets.Dataset(shared).map(
        lambda row: {f"{side}_weights": [0.5 * mask for mask in row[f"{side}_mask"]] for side in SIDES}
    )
    selection = table_of(
        "train_dataset", weighted.remove_columns("pair_weight"), PreferenceConfig(output_dir="x"), lambda: tokenizer
    )
    assert selection["chosen_positions"][0].as_py() == list(range(len(scores["chosen_ids"][0])))


def test_the_heat_map_shows_the_context_and_leaves_out_every_end():
    scores, tokenizer = scored()
    view = display(scores, tokenizer=tokenizer).html
    header, arrays = unpack(re.search(r'id="data">([^<]*)</script>', html.unescape(view))[1])
    assert arrays["rejected_ended"].tolist() == [3]
    ids = scores["rejected_ids"][0].as_py()
    assert [ids[i] for i in arrays["rejected_ends"]] == [tokenizer.convert_tokens_to_ids("<|im_end|>")] * 3
    pieces = [header["pieces"]["shown"][i] for i in arrays["chosen_context_pieces"]]
    assert "Truly?" in "".join(pieces)
    assert arrays["chosen_context_at"].tolist() == scores["chosen_context_at"][0].as_py()


def test_a_run_scores_trains_and_measures_several_turns(tmp_path, capsys):
    """A whole run, and one of a policy with another tokenizer, to which the rewards of each turn are carried over."""
    model, other = (
        tiny_model("llama", max_position_embeddings=512, **size)
        for size in ({}, {"vocab_size": len(tiny_tokenizer_of("gpt2"))})
    )
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_tokenizer_of("gpt2").save_pretrained(tmp_path / "other")
    rows = [
        {"prompt": [user(f"Is it {i}?")], "chosen": [assistant(f"Yes, {i}!"), user(f"So {i}?"), assistant("Thanks!")],
         "rejected": [assistant(f"no {i} here"), user("Why?"), assistant("and so on")][: 1 + 2 * (i % 2)]}
        for i in range(24)
    ]  # fmt: skip
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: turns
output_dir: {tmp_path / "run"}
data: {{source: {tmp_path / "prefs.jsonl"}, held_out: 8}}
reference: {{model: {tmp_path / "model"}}}
device: cpu
oracle:
  training: {{learning_rate: 0.002, batch_size: 8, num_train_epochs: 1}}
policy:
  objective: dpo
  training: {{learning_rate: 0.001, batch_size: 8, num_train_epochs: 1}}
eval: {{prompts: 2, max_new_tokens: 4}}
"""
    )
    assert main(["run", str(tmp_path / "recipe.yaml"), "--until", "select", f"policy.model={tmp_path / 'other'}"]) == 0
    carried = read_table(tmp_path / "run" / "transfer" / "scores", "scores")
    assert provenance_of(carried)["several_turns"]
    assert max(len(row) for row in carried["chosen_context_at"].to_pylist()) > 0
    assert "several_turns" in provenance_of(read_table(tmp_path / "run" / "selection", "selection"))
    assert main(["run", str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'second'}"]) == 0
    pairs = read_table(tmp_path / "second" / "pairs" / "train", "pairs")
    scores = read_table(tmp_path / "second" / "scores", "scores")
    assert scores["chosen_context_ids"].to_pylist() == pairs["chosen_context_ids"].to_pylist()
    assert [len(row) for row in scores["chosen_rewards"].to_pylist()] == flat(pairs["chosen_ids"])[1].tolist()
    logps = read_table(tmp_path / "second" / "logps" / "reference", "logps")
    pair = table_pairs(pairs)[0]
    for side in SIDES:
        wanted = plain_double(model, pair, side)
        np.testing.assert_allclose(logps[f"{side}_logps"][0].as_py(), wanted, atol=2e-5)
    assert main(["report", str(tmp_path / "second")]) == 0
