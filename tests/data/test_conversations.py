"""A pair carries its conversation and a key of its prompt, whatever a chat template makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import TOOL, assistant, tokenizer_named, user
from properties import examples
from sepo.cli import main
from sepo.data.conversation import CONVERSATION, PROMPT_KEY, conversations_of, in_words, prompt_key
from sepo.data.encoding import tokenize_pairs
from sepo.data.splits import PairRows, prompt_numbers, prompt_rows, shared_prompts, split_pairs
from sepo.data.tables import make_table, read_table, write_table
from sepo.errors import UserError
from sepo.recipe.settings import DataSettings
from sepo.stages.data import prepare_data
from tiny_models import tiny_model, tiny_tokenizer

THOUGHT = "<think>\nWell.\n</think>\n\n"
SYSTEM = {"role": "system", "content": "Be brief."}
TEMPLATES = ("phi4", "llama3_2", "qwen3", "qwen3_5_think", "gptoss", "glm4moe", "deepseek_r1_distill", "smollm3")
CONVERSATIONS = {
    "one turn": [user("Is it\n so? ")],
    "system turn": [SYSTEM, user("Is it so?")],
    "several turns": [user("Is it so?"), assistant("It is."), user("Why?")],
    "system and several turns": [SYSTEM, user("Is it so?"), assistant("It is."), user("Why?")],
    "words that look like a template": [user("system Cutting Knowledge Date: December 2023 user x")],
}


def table_of(rows: list[dict], tokenizer=None, **options) -> pa.Table:
    return tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer or tiny_tokenizer(), progress=False, **options)[0]


def table_or_none(rows: list[dict], tokenizer) -> pa.Table | None:
    try:
        return table_of(rows, tokenizer)
    except UserError as error:
        if "no usable pair" not in str(error):
            raise
        return None


def row_of(prompt: list[dict], number: int = 0, thought: str = "") -> dict:
    sides = (f"Yes, {number}.", f"No, {number}.")
    return {
        "prompt": prompt,
        **{name: [assistant(thought + text)] for name, text in zip(("chosen", "rejected"), sides, strict=True)},
    }


@pytest.mark.parametrize("thinks", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_keeps_its_conversation_under_every_template(name, kind, thinks):
    messages = CONVERSATIONS[kind]
    table = table_or_none([row_of(messages, thought=THOUGHT if thinks else "")], tokenizer_named(name))
    if table is None:  # the template has no place for a part of it: counted as a drop
        return
    (conversation,) = conversations_of(table)
    assert conversation.messages == messages
    assert table[PROMPT_KEY].to_pylist() == [prompt_key(messages)]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "qwen3_5_think", "glm4moe", "smollm3"])
def test_answers_with_and_without_a_thought_have_one_prompt(name):
    rows = [row_of([user(f"Question {i}?")], j, THOUGHT if j % 2 else "") for i in range(8) for j in range(4)]
    table = table_of(rows, tokenizer_named(name))
    assert len(set(prompt_numbers(table).tolist())) == 8
    for seed in range(4):
        train, held_out = split_pairs(table, held_out=8, seed=seed)
        assert shared_prompts(*((PairRows.of(part), np.arange(len(part))) for part in (train, held_out))) == 0
        texts = [{json.dumps(c.messages) for c in conversations_of(part)} for part in (train, held_out)]
        assert not texts[0] & texts[1]


def spellings(number: int) -> list[list[dict]]:
    """Prompts that ask the same."""
    text = f"Is number {number} prime?"
    return [
        [user(text)],
        [user(text.upper())],
        [user(f"  Is   number\n{number} prime? ")],
        [SYSTEM, user(text)],
        [{"role": "system", "content": "Think first."}, user(text)],
        [user(text), assistant("Let me see."), user("And?")],
        [SYSTEM, user(text.lower()), assistant("Hm."), user("So?"), assistant("Hm."), user("Go on.")],
        [user(text.replace("Is", "\N{FULLWIDTH LATIN CAPITAL LETTER I}s"))],
    ]


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(tmp_path, rows, own=None, **settings):
    more = {} if own is None else {"held_out_source": written(tmp_path / "held.jsonl", own)}
    found = prepare_data(
        DataSettings(source=written(tmp_path / "rows.jsonl", rows), **more, **settings),
        tiny_tokenizer(),
        tmp_path / "out",
    )
    return found, *(read_table(tmp_path / "out" / part, "pairs") for part in ("train", "held_out"))


def test_one_question_in_many_spellings_is_on_one_side_of_the_split(tmp_path, capsys):
    rows = [row_of(prompt, i) for number in range(10) for i, prompt in enumerate(spellings(number))]
    random.Random(0).shuffle(rows)
    found, train, held_out = prepared(tmp_path, rows, held_out=16)
    assert len(held_out) == 16
    assert found["shared_prompts"] == 0
    asked = [{in_words(c.messages[-1:]).casefold() for c in conversations_of(part)} for part in (train, held_out)]
    assert not {text for text in asked[0] if "prime" in text} & {text for text in asked[1] if "prime" in text}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "repeat the first user turn" in line]
    assert "70 prompts" in line
    assert len(set(prompt_numbers(held_out).tolist())) == 2
    assert len(prompt_rows(held_out, 100)) == 2


@pytest.mark.parametrize("columns", ["messages", "plain", "column"])
@pytest.mark.parametrize("max_length", [2048, 24])
def test_prompts_shared_with_a_held_out_source_are_counted(columns, max_length, tmp_path, capsys):
    """Also after truncation, which leaves another end of the prompt beside longer responses."""

    def row(i: int, text: str, longer: str = "") -> dict:
        text = f"{text} " + "word " * 12 + f"{i}?"
        if columns == "messages":
            return row_of([user(text)], i) | {"rejected": [assistant(f"No {longer}")]}
        return {"prompt": text, "chosen": "yes", "rejected": f"no {longer}"} | (
            {"system": longer or "x"} if columns == "column" else {}
        )

    settings = {"columns": {"system": "system"}} if columns == "column" else {}
    train, held = [row(i, "Ask") for i in range(20)], [row(i, "ASK ", "so " * 9) for i in range(20)]
    found, *_ = prepared(tmp_path, train, held, max_length=max_length, **settings)
    assert found["shared_prompts"] == 20
    assert "20 prompts are both trained on and held out" in capsys.readouterr().err


_TEXTS = st.sampled_from(["A", "a", " a ", "b", "B\n", "c", "d"])
_PROMPTS = st.lists(
    st.tuples(st.booleans(), _TEXTS, st.booleans()).map(
        lambda parts: [SYSTEM] * parts[0] + [user(parts[1])] + [assistant("So."), user("b")] * parts[2]
    ),
    min_size=4,
    max_size=14,
)


@examples(60)
@given(_PROMPTS, st.integers(0, 5), st.integers(20, 60))
def test_no_held_out_prompt_is_trained_on(prompts, seed, max_length):
    table = table_of([row_of(prompt, i) for i, prompt in enumerate(prompts)], max_length=max_length)
    if len(set(prompt_numbers(table).tolist())) < 2:
        return
    train, held_out = split_pairs(table, held_out=1, seed=seed)
    for column in (PROMPT_KEY, "prompt_ids"):
        assert not {str(v) for v in train[column].to_pylist()} & {str(v) for v in held_out[column].to_pylist()}
    shuffled = table.take(pa.array(random.Random(seed).sample(range(len(table)), len(table))))
    again = split_pairs(shuffled, held_out=1, seed=seed)[1]
    assert sorted(again["pair_id"].to_pylist()) == sorted(held_out["pair_id"].to_pylist())


def test_tools_and_a_system_column_belong_to_the_conversation():
    rows = [row_of([user("Weather?")]) | {"tools": [TOOL]}]
    (conversation,) = conversations_of(table_of(rows, tokenizer_named("qwen3")))
    assert conversation.tools[0]["function"]["name"] == "weather"
    table = table_of([{"prompt": "Q?", "prompt_system": "S.", "chosen": "yes", "rejected": "no"}])
    (conversation,) = conversations_of(table)
    assert [message["content"] for message in conversation.messages] == ["S.", "Q?"]
    assert table[PROMPT_KEY].to_pylist() == [prompt_key([user("q?")])]


def test_tables_of_earlier_releases_are_read(tmp_path, capsys):
    """Reports and selections need no conversation; only a judge does."""
    pairs = table_of([row_of([user(f"Question {i}?")], i) for i in range(6)])
    old = {name: pairs[name] for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")}
    rewards = {
        f"{side}_rewards": [[0.1 * (1 + i) for i in range(len(ids))] for ids in pairs[f"{side}_ids"].to_pylist()]
        for side in ("chosen", "rejected")
    }
    write_table(tmp_path / "scores", make_table("scores", {**old, **rewards}))
    assert main(["select", "--table", str(tmp_path / "scores"), "--out", str(tmp_path / "selection")]) == 0
    assert CONVERSATION not in read_table(tmp_path / "selection", "selection").column_names
    assert main(["report", "--table", str(tmp_path / "scores"), "--out", str(tmp_path / "r.html")]) == 0
    write_table(tmp_path / "pairs", make_table("pairs", old))
    assert split_pairs(read_table(tmp_path / "pairs", "pairs"), held_out=2)[1].num_rows == 2
    with pytest.raises(UserError, match="no column 'conversation'"):
        conversations_of(read_table(tmp_path / "pairs", "pairs"))


@pytest.mark.parametrize(
    "column",
    ["question", "instruction", "query", "input", "Question", "context", "problem", "user", "task", "text", "title"],
)
@pytest.mark.daily(3)
def test_a_column_that_holds_the_question_is_named(column, tmp_path, capsys):
    rows = [
        {column: "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."},
        {column: "Name a fruit.", "chosen": "Apple.", "rejected": "Car."},
    ]
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    tiny_model("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "run.yaml").write_text(
        f"reference: {{model: {tmp_path / 'm'}}}\n"
        f"data: {{source: {written(tmp_path / 'q.jsonl', rows)}, held_out: 0}}\n"
        f"device: cpu\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert main(["run", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"'{column}' seems to hold the question" in error
    assert not (tmp_path / "run" / "oracle").exists()
    assert main(["run", str(tmp_path / "run.yaml"), "--dry-run", f"data.columns={{prompt: {column}}}"]) == 0


@pytest.mark.parametrize("side", ["Question: {} Answer: {}", "\n\nHuman: {}\n\nAssistant: {}"])
def test_responses_that_hold_their_question_need_no_prompt_column(side, tmp_path):
    rows = [
        {"question": f"What is {i}?", **{name: side.format(f"What is {i}?", answer) for name, answer in sides}}
        for i in range(3)
        for sides in [(("chosen", "This."), ("rejected", "That."))]
    ]
    _, train, _ = prepared(tmp_path, rows, held_out=0)
    assert len(train) == 3


def test_a_label_beside_responses_is_no_prompt(tmp_path):
    rows = [{"context": "chat", "chosen": f"Say {i} now. Yes!", "rejected": f"Say {i} now. No."} for i in range(30)]
    _, train, _ = prepared(tmp_path, rows, held_out=0)
    assert len(train) == 30


@pytest.mark.parametrize("more", ["The better answer is kind.", "annotator 17", "It is, I think, better."])
def test_a_text_beside_responses_that_begin_with_their_prompt_is_no_prompt(more, tmp_path):
    rows = [
        {
            "why": f"{more} {i}",
            "chosen": f"Tell me about {i}, please. Yes!",
            "rejected": f"Tell me about {i}, please. No.",
        }
        for i in range(6)
    ]
    _, train, _ = prepared(tmp_path, rows, held_out=0)
    assert len(train) == 6


@pytest.mark.parametrize(
    "text",
    ["Is it RED?", " Is\u00a0it\n red?", "\ufeffIs it red?", "Is it\u200b red?", "Is it re\u00add?", "Ｉs it red?"],
)
def test_one_question_has_one_key_however_it_is_typed(text):
    assert prompt_key([user(text)]) == prompt_key([user("Is it red?")])
