"""Messages in every notation and from every kind of source; further content of a row is used or counted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.data.messages import DropRow, parse_messages, read_cell
from sepo.data.rows import normalise_row
from sepo.errors import UserError
from tiny_models import tiny_tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# Quotes, line breaks, brackets, a "}\n {" as numpy writes between two messages, and other scripts.
HARD = "He said \"it's {'role'}\n {a: [1]}\\n\" in Ærø, 東京 🙂."
CHOSEN = [user("Name a colour"), assistant(f"Blue. {HARD}")]
REJECTED = [user("Name a colour"), assistant("No.")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def ids_of(dataset, tokenizer, **options) -> list[list[int]]:
    table, report = tokenize_pairs(dataset, tokenizer, progress=False, **options)
    assert report.dropped == {}
    return [table.column(f"{name}_ids")[0].as_py() for name in ("prompt", "chosen", "rejected")]


@pytest.fixture(scope="module")
def wanted(tokenizer) -> list[list[int]]:
    return ids_of(datasets.Dataset.from_list([{"chosen": CHOSEN, "rejected": REJECTED}]), tokenizer)


SPELLINGS = {
    "list": lambda messages: messages,
    "json": json.dumps,
    "json, not ascii": lambda messages: json.dumps(messages, ensure_ascii=False, indent=1),
    "json twice": lambda messages: json.dumps(json.dumps(messages)),
    "python": repr,
    "numpy": lambda messages: str(np.array(messages, dtype=object)),
    "numpy repr": lambda messages: repr(np.array(messages, dtype=object)),
    "sharegpt": lambda messages: [
        {"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in messages
    ],
    "human and gpt as roles": lambda messages: [
        {**one, "role": {"user": "human", "assistant": "gpt"}[one["role"]]} for one in messages
    ],
    "wrapped": lambda messages: {"messages": messages},
    "wrapped json": lambda messages: json.dumps({"messages": messages}),
    "struct of lists": lambda messages: {key: [one[key] for one in messages] for key in ("role", "content")},
    "parts": lambda messages: [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages],
    "parts cut in two": lambda messages: [
        {**one, "content": [{"type": "text", "text": part} for part in (one["content"][:3], one["content"][3:])]}
        for one in messages
    ],
    "other fields": lambda messages: [{**one, "name": "", "weight": None, "tool_calls": []} for one in messages],
    "keys in another order": lambda messages: [dict(reversed(list(one.items()))) for one in messages],
}
TEXT_SPELLINGS = [name for name, spell in SPELLINGS.items() if isinstance(spell(CHOSEN), str)]


def _jsonl(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _csv(rows: list[dict], **options) -> bytes:
    return pd.DataFrame(rows).to_csv(index=False, **options).encode()


def _parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _arrow(rows: list[dict], new=pa.ipc.new_file) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


FILES = {
    "p.jsonl": _jsonl,
    "p.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "wrapped.json": lambda rows: json.dumps({"data": rows}, indent=1).encode(),
    "p.csv": _csv,
    "semicolon.csv": lambda rows: _csv(rows, sep=";"),
    "tab.csv": lambda rows: _csv(rows, sep="\t"),
    "p.tsv": lambda rows: _csv(rows, sep="\t"),
    "utf16.csv": lambda rows: _csv(rows).decode().encode("utf-16"),
    "utf16.jsonl": lambda rows: _jsonl(rows).decode().encode("utf-16"),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + _csv(rows),
    "p.jsonl.gz": lambda rows: gzip.compress(_jsonl(rows)),
    "no_suffix.jsonl": lambda rows: gzip.compress(_jsonl(rows)),
    "p.csv.bz2": lambda rows: bz2.compress(_csv(rows)),
    "p.jsonl.xz": lambda rows: lzma.compress(_jsonl(rows)),
    "p.jsonl.zst": lambda rows: pa.compress(_jsonl(rows), codec="zstd", asbytes=True),
    "p.parquet": _parquet,
    "p.arrow": _arrow,
    "stream.arrow": lambda rows: _arrow(rows, pa.ipc.new_stream),
}
IN_MEMORY = {
    "dataset": datasets.Dataset.from_list,
    "data frame": pd.DataFrame,
    "table": pa.Table.from_pylist,
    "list": list,
}


@pytest.mark.parametrize("source", [*FILES, *IN_MEMORY])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.daily(120)
def test_one_conversation_gives_the_same_ids_however_it_is_spelled_and_stored(
    tokenizer, wanted, tmp_path, spelling, source
):
    spell = SPELLINGS[spelling]
    rows = [{"chosen": spell(CHOSEN), "rejected": spell(REJECTED)}]
    if source in IN_MEMORY:
        assert ids_of(load_preferences(IN_MEMORY[source](rows)), tokenizer) == wanted
        return
    (tmp_path / source).write_bytes(FILES[source](rows))
    assert ids_of(load_preferences(tmp_path / source), tokenizer) == wanted


@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
def test_a_cell_is_read_as_messages_wherever_in_the_column_it_stands(tokenizer, wanted, tmp_path, spelling):
    plain = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
    rows = [plain] * 150 + [{"chosen": SPELLINGS[spelling](CHOSEN), "rejected": SPELLINGS[spelling](REJECTED)}]
    (tmp_path / "p.csv").write_bytes(_csv(rows))
    table, _ = tokenize_pairs(load_preferences(tmp_path / "p.csv"), tokenizer, progress=False)
    assert [table.column(f"{name}_ids")[150].as_py() for name in ("prompt", "chosen", "rejected")] == wanted


def test_datasets_own_csv_is_read(tokenizer, wanted, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "Name a colour", "chosen": CHOSEN, "rejected": REJECTED}])
    rows.to_csv(tmp_path / "p.csv", index=False)
    assert ids_of(load_preferences(tmp_path / "p.csv"), tokenizer) == wanted
    assert ids_of(load_preferences(tmp_path / "p.csv"), tokenizer, as_chat=True) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'cut off",
        '[{"role": "user", "content": "a"} {"role": "assistant", "content": b"}]',
        "[{'role': 'user', 'content': open('x')}]",
        "{'messages': [{'role': 'user', 'content': nan}]}",
    ],
)
def test_what_looks_like_messages_and_cannot_be_read_is_dropped_or_plainly_text(text):
    if not text.rstrip().endswith(("]", "}")):
        assert parse_messages(text) is None  # only begins like messages
        return
    with pytest.raises(DropRow) as caught:
        parse_messages(text)
    assert caught.value.reason == "messages as text"


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{}",
        "[]",
        '{"answer": 4}',
        '"quoted"',
        "[citation needed]",
        '[{"name": "weather", "arguments": {}}]',
        '{"role": "admin", "content": "an answer about access rights"}',
        "Use [{'role': 'user', 'content': 'Hi'}] as the prompt.",
        "[{'role': 'user', 'content': 'Hi'}] is a list.",
    ],
)
def test_other_text_stays_text(text):
    assert read_cell(text) == text


# --- roles, parts, and fields beside text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "expected"),
    [("human", "user"), ("Human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("model", "assistant"),
     ("bot", "assistant"), ("developer", "system"), ("observation", "tool"), ("ipython", "tool"), (" User ", "user")],
)  # fmt: skip
def test_speakers_by_their_many_names(role, expected):
    assert read_cell([{"role": role, "content": "x"}]) == [{"role": expected, "content": "x"}]


def test_an_unknown_role_is_named_in_the_report(tokenizer):
    rows = [{"prompt": [{"role": "narrator", "content": "x"}], "chosen": "a", "rejected": "b"}]
    fine = {"prompt": [user("x")], "chosen": "a", "rejected": "b"}
    _, report = tokenize_pairs(datasets.Dataset.from_list([*rows, fine]), tokenizer, progress=False)
    assert report.details == {"unknown role": {"'narrator'": 1}}
    assert "unknown role ['narrator'] 1 (first: row 0)" in report.summary()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": "What is it?", "images": ["cat.png"]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    ],
)
def test_what_is_not_text_drops_the_row(message):
    with pytest.raises(DropRow) as caught:
        normalise_row({"prompt": [message], "chosen": "a", "rejected": "b"})
    assert caught.value.reason == "not text"


def test_fields_that_are_not_read_are_named(tokenizer):
    rows = [{"prompt": [{**user("x"), "weight": 0.5, "name": "Ann"}], "chosen": "a", "rejected": "b"}]
    _, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False)
    assert set(report.notes) == {"a message's 'name' is not read", "a message's 'weight' is not read"}


def test_responses_that_differ_in_their_calls_alone_are_a_pair():
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    pair = normalise_row(
        {
            "prompt": [user("x")],
            "chosen": [{**assistant("Well."), "tool_calls": call}],
            "rejected": [assistant("Well.")],
        }
    )
    assert pair.extras == ({"tool_calls": call}, {})


# --- columns beside the prompt --------------------------------------------------------------------------------------


def texts_of(source, tokenizer, *, columns=None, **options) -> tuple[list[str], list[str]]:
    table, report = tokenize_pairs(
        load_preferences(source, columns=columns or {}), tokenizer, progress=False, **options
    )
    row = table.to_pylist()[0]
    return [tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")], report.remarks()


ALPACA = {"instruction": "Translate to French.", "input": "good morning", "chosen": "bonjour", "rejected": "hola"}
ORCA = {"system": "You answer in French.", "question": "Colour of the sky?", "chosen": "Bleu.", "rejected": "Blue."}


def test_a_column_that_changes_what_is_right_is_named_until_it_is_mapped(tokenizer):
    _, remarks = texts_of([ORCA], tokenizer, columns={"prompt": "question"}, as_chat=True)
    assert remarks == [
        "1 row: the column 'system' holds something and is not read; map it with columns: {system: system}"
    ]
    texts, remarks = texts_of([ORCA], tokenizer, columns={"prompt": "question", "system": "system"}, as_chat=True)
    assert texts[0] == "<s><|user|>You answer in French.</s><|user|>Colour of the sky?</s><|assistant|>"
    assert remarks == []


def test_an_input_column_follows_the_prompt(tokenizer):
    _, remarks = texts_of([ALPACA], tokenizer, columns={"prompt": "instruction"}, as_chat=True)
    assert "the column 'input' holds something and is not read" in remarks[0]
    texts, _ = texts_of([ALPACA], tokenizer, columns={"prompt": "instruction", "input": "input"}, as_chat=True)
    assert texts[0] == "<s><|user|>Translate to French.<unk><unk>good morning</s><|assistant|>"
    plain, _ = texts_of([ALPACA], tokenizer, columns={"prompt": "instruction", "input": "input"})
    assert plain[0].endswith("Translate to French.<unk><unk>good morning")


def test_an_empty_column_gets_no_note(tokenizer):
    _, remarks = texts_of([{**ALPACA, "input": " "}], tokenizer, columns={"prompt": "instruction"}, as_chat=True)
    assert remarks == []


def test_a_history_goes_before_the_prompt(tokenizer):
    row = {"prompt": "And now?", "history": [["Hi", "Hello"], ["So?", "Fine."]], "chosen": "Good.", "rejected": "Bad."}
    texts, _ = texts_of([row], tokenizer, columns={"history": "history"}, as_chat=True)
    assert texts[0].startswith("<s><|user|>Hi</s><|assistant|>Hello</s><|user|>So?")


@pytest.mark.parametrize("name", ["images", "audio", "winner", "better_response_id", "preference_strength"])
def test_columns_of_well_known_names_are_never_silently_left_out(tokenizer, name):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", name: ["x"]}
    _, remarks = texts_of([row], tokenizer, as_chat=True)
    assert len(remarks) == 1
    assert f"the column '{name}' holds something and is not read" in remarks[0]


@pytest.mark.parametrize(
    "columns",
    [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")],
)
def test_ties_are_dropped_and_contradictions_counted(tokenizer, columns):
    scores = [(3.0, 1.0), (2.0, 2.0), (1.0, 2.0), (None, 2.0)]
    rows = [
        {"prompt": f"Q{index}", "chosen": "a", "rejected": "b", **dict(zip(columns, pair, strict=True))}
        for index, pair in enumerate(scores)
    ]
    table, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False, as_chat=True)
    assert table.column("pair_id").to_pylist() == [0, 2, 3]
    assert report.dropped == {"tie": 1}
    assert [remark for remark in report.remarks() if "is lower than" in remark]


# --- scores, repeated prompts, markup, ids -------------------------------------------------------------------------


def test_a_prompt_that_the_responses_repeat_is_taken_off(tokenizer):
    prompt = "What is the capital of France?"
    row = {"prompt": prompt, "chosen": prompt + " Paris.", "rejected": prompt + " Rome."}
    pair = normalise_row(row)
    assert pair[:3] == (prompt, " Paris.", " Rome.")
    assert pair.notes
    kept = normalise_row({"prompt": "I", "chosen": "I think so.", "rejected": "I do not know."})
    assert kept.chosen == "I think so."  # too short to be a repetition


def test_turns_that_the_responses_repeat_are_not_written_twice():
    system, question = {"role": "system", "content": "Be brief."}, user("Hi")
    row = {
        "prompt": [system, question],
        "chosen": [question, assistant("Hello")],
        "rejected": [question, assistant("Go")],
    }
    assert normalise_row(row).prompt == [system, question]


def test_a_prompt_column_that_says_something_else_is_counted(tokenizer):
    row = {"prompt": "Another question", "chosen": CHOSEN, "rejected": REJECTED}
    assert normalise_row(row).notes == (
        "the prompt column differs from the conversations; the conversations were used",
    )


def test_plain_prompts_beside_a_chat_template_get_a_line(tokenizer):
    _, remarks = texts_of([{"prompt": "Q", "chosen": "a", "rejected": "b"}], tokenizer)
    assert "as_chat would wrap it as a user turn" in remarks[0]


RENDERED = {"prompt": "<s><|user|>Hi</s><|assistant|>", "chosen": "Hello!</s>", "rejected": "Go</s>"}
FOREIGN = {"prompt": "[INST] Hi [/INST]", "chosen": "Hello!", "rejected": "Go<|eot_id|>"}
PLAIN = {"prompt": "Is </s> a tag?", "chosen": "Yes, </s> is one.", "rejected": "No."}


@pytest.mark.parametrize("row", [RENDERED, FOREIGN])
def test_markup_that_was_rendered_before_is_counted_and_refused_where_it_is_the_rule(tokenizer, row):
    others = [{"prompt": f"Question {index}?", "chosen": "Yes.", "rejected": "No."} for index in range(4)]
    _, report = tokenize_pairs(datasets.Dataset.from_list([row, *others]), tokenizer, progress=False)
    assert [count for note, count in report.notes.items() if "markup" in note] == [1]
    with pytest.raises(UserError, match="3 of 4 rows hold a chat template's markup"):
        tokenize_pairs(datasets.Dataset.from_list([row, row, row, others[0]]), tokenizer, progress=False)


def test_a_tag_that_is_talked_about_is_no_rendered_markup(tokenizer):
    _, report = tokenize_pairs(datasets.Dataset.from_list([PLAIN] * 4), tokenizer, progress=False)
    assert not [note for note in report.notes if "markup" in note]


def test_joined_datasets_are_numbered_anew(tokenizer, tmp_path):
    rows = [{"prompt": f"Q{index}", "chosen": "yes", "rejected": "no"} for index in range(3)]
    both = datasets.concatenate_datasets([load_preferences(rows), load_preferences(rows)])
    table, report = tokenize_pairs(both, tokenizer, progress=False)
    assert table.column("pair_id").to_pylist() == [0, 1, 2, 3, 4, 5]
    assert any("numbered again" in note for note in report.notes)


def test_all_pairs_of_a_prompt_are_cut_alike(tokenizer):
    prompt = "word " * 60
    rows = [{"prompt": prompt, "chosen": "yes " * (2 + 5 * index), "rejected": "no"} for index in range(6)]
    table, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, max_length=60, progress=False)
    assert len({tuple(ids) for ids in table.column("prompt_ids").to_pylist()}) == 1
    assert report.truncated_prompts == 6


# --- misleading files ------------------------------------------------------------------------

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv", "p.arrow", "p.jsonl.gz"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(_POINTER)
    with pytest.raises(UserError, match=r"pointer of Git LFS.*git lfs pull"):
        load_preferences(tmp_path / name)


def test_one_dataset_in_two_formats_is_not_read_twice(tmp_path):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}]
    (tmp_path / "train.jsonl").write_bytes(_jsonl(rows))
    (tmp_path / "train.csv").write_bytes(_csv(rows))
    with pytest.raises(UserError, match="one name in two formats"):
        load_preferences(tmp_path)


def test_a_description_beside_the_data_is_no_row(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(_jsonl([{"prompt": "Q", "chosen": "a", "rejected": "b"}]))
    for name in ("metadata.json", "dataset_infos.json", "config.json"):
        (tmp_path / name).write_text('{"chosen": "x"}')
    assert len(load_preferences(tmp_path)) == 1


def test_a_relative_path_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"looked for in '{tmp_path}'"):
        load_preferences("data/prefs.jsonl")


def test_a_dataset_of_several_splits_is_refused_by_name():
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])})
    with pytest.raises(UserError, match="one split of the dataset"):
        load_preferences(both)


TOOL = {"type": "function", "function": {"name": "look", "description": "Look it up."}}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_the_system_message_and_the_tools_beside_wrapped_messages_belong_to_the_prompt(name, as_text):
    """OpenAI's preference format wraps the prompt with its tools, ShareGPT's exports with a system message."""
    wrapped = {"system": "Be brief.", name: [user("q")], "tools": [TOOL], "id": "17", "parallel_tool_calls": True}
    prompt = json.dumps(wrapped) if as_text else wrapped
    pair = normalise_row({"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]})
    assert pair.messages == [{"role": "system", "content": "Be brief."}, user("q")]
    assert pair.tools == (TOOL,)


@pytest.mark.parametrize("wrap", [lambda answer: answer, lambda answer: [answer], lambda answer: json.dumps([answer])])
@pytest.mark.parametrize("name", ["messages", "conversations", "question"])
def test_a_column_that_holds_the_question_of_answers_in_messages_is_named(name, wrap):
    question = "Is it red?" if name == "question" else [user("Is it red?")]
    rows = [{name: question, "chosen": wrap(assistant("Yes.")), "rejected": wrap(assistant("No."))}]
    with pytest.raises(UserError, match=f"'{name}' seems to hold the question"):
        load_preferences(rows)
    assert normalise_row(load_preferences(rows, columns={"prompt": name})[0]).messages == [user("Is it red?")]


@pytest.mark.parametrize("column", ["trajectory", "source", "x"])
@pytest.mark.parametrize("spell", [lambda turns: turns, json.dumps, lambda turns: turns[0]])
def test_a_conversation_under_any_name_beside_answers_that_share_hardly_a_word_is_their_question(column, spell):
    """UltraInteract: the shared "Step 1:" would be the prompt."""
    rows = [
        {column: spell([{"from": "user", "value": f"Solve {i}"}]), "chosen": "Step 1: Add.", "rejected": "Step 1: No."}
        for i in range(3)
    ]
    with pytest.raises(UserError, match=f"'{column}' seems to hold the question"):
        load_preferences(rows)
    kept = [{**row, column: [0.5, float(i)]} for i, row in enumerate(rows)]  # scores, which are no question
    assert normalise_row(load_preferences(kept)[0]).prompt == "Step 1:"
