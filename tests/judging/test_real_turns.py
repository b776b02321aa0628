"""Judges are asked about the turns that were said, and questions are sent as they were given."""

from __future__ import annotations

import json
import sys

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForSequenceClassification

from chat_templates import CALL, assistant, tokenizer_named, tokenizer_with, user
from judge_server import completion, serving
from sepo.cli import main
from sepo.data.conversation import conversations_of, in_words
from sepo.data.encoding import tokenize_pairs
from sepo.data.splits import prompt_rows
from sepo.data.tables import write_table
from sepo.errors import UserError
from sepo.evaluate.measure import Evaluation
from sepo.judging.in_run import judge_responses
from sepo.judging.judge import read_matches
from sepo.judging.prompts import encode_answers, encode_prompts
from sepo.judging.scorers import as_messages
from sepo.judging.server_judge import contest_of
from sepo.judging.stages import run_judge
from sepo.recipe.settings import EvalSettings, JudgeSettings
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Answer in French."}
PROMPTS = {
    "one turn": [user("Is it so?")],
    "system turn": [SYSTEM, user("Good morning?")],
    "several turns": [user("My name is Ada."), assistant("Hello Ada."), user("Who am I?")],
    "system and several turns": [
        SYSTEM,
        user("Ask me."),
        assistant("Who?"),
        user("You."),
        assistant("I?"),
        user("Yes!"),
    ],
    "only a system turn": [SYSTEM],
}
TEMPLATES = ("phi4", "llama3_2", "qwen3", "qwen3_5_think", "gptoss", "glm4moe", "smollm3", "gemma3")
JUDGE = """
import json
def judge(prompts, responses):
    open("asked.json", "w").write(json.dumps(prompts))
    return [len(r) for r in responses]
"""


def pairs_of(prompts, tokenizer, thought=""):
    rows = [
        {"prompt": prompt, "chosen": [assistant(f"{thought}Yes {i}.")], "rejected": [assistant(f"No {i}.")]}
        for i, prompt in enumerate(prompts)
    ]
    return tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, progress=False)[0]


def pairs_or_none(prompts, tokenizer, thought):
    try:
        return pairs_of(prompts, tokenizer, thought)
    except UserError as error:
        if "no usable pair" not in str(error):
            raise
        return None


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "turn_judges", raising=False)
    (tmp_path / "turn_judges.py").write_text(JUDGE)
    (tmp_path / "words.txt").write_text("[{instruction}] m: {output_1} M: {output_2}")
    return tmp_path


@pytest.mark.parametrize("thought", ["", "<think>\nHm.\n</think>\n\n"], ids=["plain", "thinking"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.daily(10)
def test_a_judge_is_asked_exactly_the_turns(name, kind, thought, workplace):
    pairs = pairs_or_none([PROMPTS[kind]], tokenizer_named(name), thought)
    if pairs is None:  # the template has no place for a part of it: counted as a drop
        return
    (conversation,) = conversations_of(prompt_rows(pairs, 1))
    with serving(lambda body, before: completion("M")) as server:
        judge = JudgeSettings(server=server.url, model="j", prompt="words.txt", cache=str(workplace / "cache"))
        _, _, rows = judge_responses(judge, [conversation], ["before"], ["after"], [0])
        asked = {body["messages"][-1]["content"].partition(" m: ")[0] for body in server.asked}
    words = in_words(PROMPTS[kind])
    assert asked == {f"[{words}]"}
    assert rows[0]["instruction"] == words
    if kind == "one turn":
        assert words == "Is it so?"
    judge_responses(JudgeSettings(function="turn_judges:judge"), [conversation], ["before"], ["after"], [0])
    assert set(json.loads((workplace / "asked.json").read_text())) == {words}
    contest = contest_of(conversation, "before", "after")
    ((messages, answer, _),) = as_messages([(contest.questions, "after", contest.opening)])
    assert (messages, answer) == (PROMPTS[kind], "after")


def test_the_beginning_of_a_turn_belongs_to_both_answers(workplace):
    (conversation,) = conversations_of(pairs_of([[user("Is it so?"), assistant("Well, ")]], tokenizer_named("phi4")))
    contest = contest_of(conversation, "no", "yes")
    assert contest == contest._replace(
        questions=("Is it so?",), baseline=("Well, no",), model=("Well, yes",), opening=""
    )


@pytest.mark.parametrize("judge", ["server", "reward:reward", "function:turn_judges:judge"])
def test_a_run_judges_real_turns(judge, workplace):
    """The whole way: a table of pairs, both models' answers, and the judge, with the template that writes a date."""
    tokenizer = tokenizer_named("llama3_2")
    vocabulary = len(tokenizer)
    for name, seed in (("base", 0), ("policy", 1)):
        tiny_model("llama", seed=seed, vocab_size=vocabulary).save_pretrained(name)
        tokenizer.save_pretrained(name)
    config = CONFIGS["llama"]()
    config.vocab_size, config.num_labels = vocabulary, 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained("reward")
    tokenizer.save_pretrained("reward")
    prompts = [PROMPTS[kind] for kind in ("one turn", "system turn", "several turns", "system and several turns")]
    write_table("held_out", pairs_of(prompts, tokenizer))
    with serving(lambda body, before: completion("M")) as server:
        settings = EvalSettings(
            prompts=4,
            max_new_tokens=4,
            pairs=0,
            judge={"server": server.url, "model": "j", "prompt": "words.txt", "cache": "cache"}
            if judge == "server"
            else judge,
        )
        metrics = Evaluation(
            "policy",
            "base",
            workplace / "held_out",
            workplace / "eval",
            settings,
            device="cpu",
            judge=run_judge(settings.judge).judge,
        ).measure()
    assert metrics["judge/judged"] == 4
    words = [in_words(prompt) for prompt in prompts]
    rows = json.loads((workplace / "eval" / "annotations.json").read_text())
    assert sorted(row["instruction"] for row in rows) == sorted(words)
    assert sorted(pq.read_table("eval/generations.parquet")["question"].to_pylist()) == sorted(words)
    assert set(pq.read_table("eval/examples.parquet")["prompt"].to_pylist()) <= set(words)
    if judge == "server":
        asked = {body["messages"][-1]["content"].partition("] m: ")[0] for body in server.asked}
        assert asked == {f"[{text}" for text in words}


def test_a_reward_model_reads_the_given_turns():
    tokenizer = tokenizer_named("qwen3")
    prompt = PROMPTS["system and several turns"]
    contest = contest_of(conversations_of(pairs_of([prompt], tokenizer))[0], "a", "b")
    (encoded,) = encode_answers(as_messages([(contest.questions, "b", contest.opening)]), tokenizer)
    text = tokenizer.decode(encoded[0])
    assert all(message["content"] in text for message in prompt)


# --- questions --------------------------------------------------------------------------------------------------------


def asked_by_generate(tmp_path, rows, column="prompt", code=0):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {column: row}) + "\n" for row in rows))
    with serving(lambda body, before: completion("Bonjour.")) as server:
        arguments = ["--model", "m", "--server", server.url, "--prompts", str(file), "--out", str(tmp_path / "o")]
        assert main(["generate", *arguments, "--cache", str(tmp_path / "cache")]) == code
    return [body["messages"] for body in sorted(server.asked, key=lambda body: str(body["messages"]))]


def in_order(conversations):
    return sorted(conversations, key=str)


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_questions_are_sent_with_the_given_turns(column, tmp_path):
    given = [PROMPTS[kind] for kind in ("one turn", "system turn", "several turns", "system and several turns")]
    assert asked_by_generate(tmp_path, given, column) == in_order(given)
    rows = json.loads((tmp_path / "o" / "model_outputs.json").read_text())
    assert in_order(row["messages"] for row in rows) == in_order([*prompt, assistant("Bonjour.")] for prompt in given)
    matches, missing = read_matches(
        tmp_path / "o" / "model_outputs.json", tmp_path / "o" / "model_outputs.json", None, None
    )
    assert len(matches) == 4
    assert not missing.lines()
    judged = [as_messages([(m.contest.questions, m.contest.model[0], m.contest.opening)])[0][:2] for m in matches]
    assert in_order(messages for messages, _ in judged) == in_order(given)
    assert {answer for _, answer in judged} == {"Bonjour."}
    assert in_order(match.contest.questions[0] for match in matches) == in_order(map(in_words, given))


def test_a_system_turn_comes_before_every_turn_that_is_asked(tmp_path):
    asked = asked_by_generate(tmp_path, [[SYSTEM, user("One."), user("Two.")]])
    assert asked == in_order([[SYSTEM, user("One.")], [SYSTEM, user("One."), assistant("Bonjour."), user("Two.")]])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "Hi?", "system": "Answer in French."}, [SYSTEM, user("Hi?")]),
        ({"prompt": "Hi?", "system_prompt": "Answer in French."}, [SYSTEM, user("Hi?")]),
        ({"instruction": "Add.", "input": "1, 2"}, [user("Add.\n\n1, 2")]),
        ({"prompt": "And?", "history": [["A?", "B."]]}, [user("A?"), assistant("B."), user("And?")]),
        ({"conversations": [{"from": "system", "value": "Answer in French."}, {"from": "human", "value": "Hi?"}]},
         [SYSTEM, user("Hi?")]),
        ({"prompt": json.dumps([SYSTEM, user("Hi?")])}, [SYSTEM, user("Hi?")]),
    ],
)  # fmt: skip
def test_further_columns_and_spellings_of_a_prompt_are_sent(row, wanted, tmp_path):
    assert asked_by_generate(tmp_path, [row]) == [wanted]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[user("Hi?"), assistant("Hello.")]], "expected the user's turn last"),
        ([[SYSTEM]], "expected the user's turn last"),
        ([[{"role": "narrator", "content": "x"}]], "unknown role"),
        (["Hi?", "Hi?"], "twice"),
        ([[SYSTEM, user("Hi?")], [SYSTEM, user("Hi?")]], "twice"),
        ([{"prompt": "Hi?", "tools": [{"type": "function", "function": {"name": "f"}}]}], "tools"),
        ([[user("Hi?"), assistant("", tool_calls=CALL), {"role": "tool", "content": "4"}, user("So?")]], "tools"),
        ([[user("Hi?"), {"role": "user", "content": [{"type": "image", "image": "x"}]}]], "not text"),
        ([{"prompt": "Look.", "images": ["a.png"]}], "not text 'images'"),
        ([{"prompt": "Hi \ud83d"}], "invalid Unicode"),
        ([{"instruction": "Hi \ud83d"}], "invalid Unicode"),
        ([{"question_id": 1, "turns": ["Hi?", "So \ud83d"]}], "invalid Unicode"),
    ],
)
def test_questions_that_cannot_be_asked_end_in_one_line(rows, says, tmp_path, capsys):
    assert asked_by_generate(tmp_path, rows, code=2) == []
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


@pytest.mark.parametrize("end", ["", "{{ '<|assistant|>' }}"])
def test_a_template_that_ignores_the_generation_prompt_asks_as_the_pairs_of_a_run_do(end):
    """It never writes the opening of the assistant's turn, or always."""
    turns = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    tokenizer = tokenizer_with(turns + end)
    (ids,) = encode_prompts([[user("Hi?")]], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>Hi?<|end|><|assistant|>"
    assert ids == pairs_of([[user("Hi?")]], tokenizer)["prompt_ids"].to_pylist()[0]


def test_half_of_a_surrogate_pair_is_no_text_for_a_local_judge():
    tokenizer = tokenizer_named("qwen3")
    conversations = [([user("Hi?")], "half \ud83d", []), ([user("half \ud83d")], "x", []), ([user("Hi?")], "x", [])]
    first, second, third = encode_answers(conversations, tokenizer)
    assert (first, second) == ("invalid Unicode", "invalid Unicode")
    assert not isinstance(third, str)
    with pytest.raises(UserError, match="prompt 1 cannot be asked: invalid Unicode"):
        encode_prompts([[user("half \ud83d")]], tokenizer)


def answers(folder, name, rows):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


def test_answers_to_different_questions_of_one_name_are_refused(tmp_path):
    rows = [[{"uid": "1", "model": "m", "messages": [user(text), assistant("x")]}] for text in ("Hi?", "Bye?", "Hi?\n")]
    first, other, same = (answers(tmp_path, f"a{i}", row) for i, row in enumerate(rows))
    with pytest.raises(UserError, match="different questions under the name '1'"):
        read_matches(first, other, None, None)
    assert len(read_matches(first, same, None, None)[0]) == 1


def test_thinking_in_the_answers_of_a_file_is_counted(tmp_path):
    thinks = [{"instruction": q, "output": "<think>Well.</think>Yes."} for q in ("a?", "b?")]
    plain = [{"instruction": q, "output": "Write `<think>` first."} for q in ("a?", "b?")]
    _, missing = read_matches(answers(tmp_path, "x", thinks), answers(tmp_path, "y", plain), None, None)
    assert missing.lines() == [
        "2 answers hold thinking (<think>...), which the judge reads too: take it out of the files"
    ]


def test_a_template_that_leaves_out_the_system_turn_is_refused(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS["system turn"]}) + "\n")
    arguments = ["--model", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o")]
    assert main(["generate", *arguments, "--device", "cpu", "--max-new-tokens", "3"]) == 2
    assert "left out by the chat template" in capsys.readouterr().err
