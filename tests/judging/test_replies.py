"""What a server sends, as docs/judging.md lists it: how a reply is understood, what is kept, what is asked again."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge_server import completion, serving
from properties import examples
from sepo.cli import main
from sepo.data.thinking import without_thinking
from sepo.errors import UserError
from sepo.judging.endpoint import Endpoint
from sepo.judging.judge_prompts import JudgePrompt, read_grade, read_preference
from sepo.judging.replies import CUT, REFUSED, UNANSWERED, completion_of, read_reply
from tiny_models import tiny_model, tiny_tokenizer

KEPT, AGAIN, ENDS = "kept", "asked again", "ends the command"
LETTERS = JudgePrompt("t", (("user", "{output_1} {output_2}"),), "letters")


def said(content, reason="stop", **message) -> dict:
    """A completion with a reason for its end and further fields of its message."""
    body = completion(content)
    body["choices"][0]["finish_reason"] = reason
    body["choices"][0]["message"].update(message)
    return body


def stream(*parts: str, end: str = "data: [DONE]\n\n", **delta) -> bytes:
    """A body of server-sent events."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": part, **delta}}]} for part in parts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]} if end else {"choices": []})
    return ("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode()


def short(body: dict) -> tuple:
    data = json.dumps(body).encode()
    return 200, {"Content-Length": str(len(data) + 500)}, data[:-5]


def encoded(text: str, charset: str) -> tuple:
    """A completion in another encoding than UTF-8, which its headers name."""
    body = json.dumps(said(text), ensure_ascii=False).encode(charset)
    return 200, {"Content-Type": f"application/json; charset={charset}"}, body


def error(status: int, message: str, **fields) -> tuple:
    return status, {}, json.dumps({"error": {"message": message, **fields}}).encode()


TOO_LONG = "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens."
# Titles of the rows in docs/judging.md: what happens to such a reply, and examples with the answer that is read from
# them, or the beginning of the failure.
ROWS: dict[str, tuple[str, list[tuple]]] = {
    "a text": (
        KEPT,
        [
            (said("[[A]]"), "[[A]]"),
            (b"\xef\xbb\xbf" + json.dumps(said("[[A]]")).encode(), "[[A]]"),
            (b": PROCESSING\n\n: PROCESSING\n\n" + json.dumps(said("[[A]]")).encode(), "[[A]]"),
            (b'{"choices":[{"message":{"content":"two\nlines"}}]}', "two\nlines"),
            (encoded("caf\u00e9 [[A]]", "iso-8859-1"), "caf\u00e9 [[A]]"),
            (encoded("caf\u00e9 [[A]]", "utf-16"), "caf\u00e9 [[A]]"),
            ((200, {"X-Served-By": "caf\u00e9"}, json.dumps(said("[[A]]")).encode()), "[[A]]"),
            ({"choices": [{**said("[[B]]")["choices"][0], "index": 1}, *said("[[A]]")["choices"]]}, "[[A]]"),
        ],
    ),
    "a list of parts": (
        KEPT,
        [
            (said([{"type": "text", "text": "My "}, {"type": "text", "text": "[[A]]"}]), "My [[A]]"),
            (said([{"type": "thinking", "thinking": [{"text": "[[B]]"}]}, {"type": "text", "text": "[[A]]"}]), "[[A]]"),
            (said([{"type": "output_text", "text": "[[A]]"}]), "[[A]]"),
            (said({"type": "text", "text": "[[A]]"}), "[[A]]"),
            (said([{"type": None, "text": "[[A]]"}]), "[[A]]"),
            (said([{"type": "text", "text": {"value": "[[A]]", "annotations": []}}]), "[[A]]"),
            (said([{"type": "reasoning", "text": "[[B]]"}, {"text": "[[A]]"}]), "[[A]]"),
            (stream([{"type": "text", "text": "[[A]]"}]), "[[A]]"),
        ],
    ),
    "thinking in a field of its own": (
        KEPT,
        [
            (said("[[A]]", reasoning_content="[[B]]"), "[[A]]"),
            (said("[[A]]", reasoning="[[B]] or [[A]]"), "[[A]]"),
            (said("[[A]]", thinking="[[B]]"), "[[A]]"),
        ],
    ),
    "thinking in the text": (
        KEPT,
        [
            (said("<think>[[B]]?</think>\n\n[[A]]"), "[[A]]"),
            (said("Is it [[B]]?\n</think>\n\n[[A]]"), "[[A]]"),
            (said("<thinking>[[B]]</thinking>[[A]]"), "[[A]]"),
            (said("[THINK][[B]][/THINK][[A]]"), "[[A]]"),
            (said("◁think▷[[B]]◁/think▷[[A]]"), "[[A]]"),
            (said("<|channel|>analysis<|message|>[[B]]<|end|><|channel|>final<|message|>[[A]]"), "[[A]]"),
            (said([{"type": "text", "text": "<think>[[B]]</think>[[A]]"}]), "[[A]]"),
            (said("<think>The tag </think> is in it, [[B]]?</think>[[A]]"), "[[A]]"),
            (said("<Think>[[B]]</Think>[[A]]"), "[[A]]"),
            (said("<mm:think>[[B]]</mm:think>[[A]]"), "[[A]]"),
            (said("<|begin_of_thought|>[[B]]<|end_of_thought|>[[A]]"), "[[A]]"),
            (said("<|channel>thought\n[[B]]<channel|>[[A]]"), "[[A]]"),
            (said("analysisWe need [[B]].assistantfinal[[A]]"), "[[A]]"),
            (said("analysis [[B]]?\n\nassistantfinal [[A]]"), "[[A]]"),
            (said("<|channel|>analysis<|message|>B<|end|><|channel|>final <|constrain|>json<|message|>[[A]]"), "[[A]]"),
            (said("<|START_THINKING|>[[B]]<|END_THINKING|><|START_RESPONSE|>[[A]]<|END_RESPONSE|>"), "[[A]]"),
            (said("<|think_start|>[[B]]<|think_end|>[[A]]"), "[[A]]"),
            (said("<start_of_thinking>[[B]]<end_of_thinking>[[A]]"), "[[A]]"),
            (said("<|thinking|>[[B]]<|/thinking|>[[A]]"), "[[A]]"),
            (said("<|inner_prefix|>[[B]]<|inner_suffix|>[[A]]"), "[[A]]"),
            (said("<internal_monologue>[[B]]</internal_monologue>[[A]]"), "[[A]]"),
            (said("\ufeff<think>[[B]]</think>[[A]]"), "\ufeff[[A]]"),
            (said("My steps: [[B]]\n[BEGIN FINAL RESPONSE]\n[[A]]\n[END FINAL RESPONSE]"), "[[A]]"),
        ],
    ),
    "thinking without an end": (
        KEPT,
        [
            (said("<think>If A were right I would say [[A]]"), "the thinking has no end"),
            (said("<think>If A were right I would say [[A]]", "length"), CUT),
            (said("Well.\n<think>[[A]]"), "the thinking has no end"),
            (said("<|channel|>analysis<|message|>[[A]]"), "the thinking has no end"),
            (said("analysisWe need to say [[A]]"), "the thinking has no end"),
            (said("<|think_start|>[[A]]"), "the thinking has no end"),
        ],
    ),
    "no text": (
        KEPT,
        [
            (said(""), "empty reply"),
            (said(None), "empty reply"),
            (said(" \n"), "empty reply"),
            (said([]), "empty reply"),
            (said(None, reasoning_content="[[A]]"), "empty reply"),
            (said(None, refusal="I cannot help with that."), "empty reply: I cannot help"),
            (said(None, "length", reasoning_content="[[A]]"), CUT),
            (said("<think>[[A]]</think>"), "empty reply"),
            (said(None, "tool_calls", tool_calls=[{"id": "1"}]), "empty reply"),
        ],
    ),
    "`finish_reason` `content_filter`": (
        KEPT,
        [
            (said("[[A]]", reason), "stopped by the server")
            for reason in ("content_filter", "SAFETY", "RECITATION", "SPII", "sensitive", "refusal", "guardrail_hit")
        ],
    ),
    "a completion without a message": (
        KEPT,
        [({"choices": choices}, "malformed") for choices in ([], [{"message": {}}], [7])],
    ),
    "a stream": (
        KEPT,
        [
            (stream("My ", "[[A]]"), "My [[A]]"),
            (b": ping\n\n" + stream("[[", "A]]"), "[[A]]"),
            (stream("[[A]]").replace(b"\n", b"\r\n"), "[[A]]"),
            (stream("X").replace(b"X", "of two\u2028lines\x85".encode()), "of two\u2028lines\x85"),
            (stream("<think>[[B]]", "</think>[[A]]"), "[[A]]"),
            (stream("[[A]]", reasoning_content="[[B]]"), "[[A]]"),
            (b"\xef\xbb\xbf" + stream("[[A]]"), "[[A]]"),
            (
                b'data: {"choices": [{"index": 1, "delta": {"content": "[[B]]"}, "finish_reason": "stop"}]}\n\n'
                + stream("[[A]]"),
                "[[A]]",
            ),
        ],
    ),
    "a stream that broke off": (AGAIN, [(stream("My ", "[[A]]", end=""), UNANSWERED), (b'data: {"choi', UNANSWERED)]),
    "a body shorter than its `Content-Length`": (AGAIN, [(short(said("[[A]]")), UNANSWERED)]),
    "no JSON, or JSON without `choices`": (
        AGAIN,
        [
            (b"<html>busy</html>", UNANSWERED), (b"", UNANSWERED), (b"[]", UNANSWERED), (b"[" * 50_000, UNANSWERED),
            (b'{"choices": [{"mess', UNANSWERED), ({"status": "starting"}, UNANSWERED), (b"null", UNANSWERED),
            (json.dumps(said("caf\u00e9"), ensure_ascii=False).encode("latin-1"), UNANSWERED),
            ((200, {"Content-Type": "application/json; charset=utf-16"}, b"<html>"), UNANSWERED),
            ((200, {"Content-Encoding": "br"}, b"\x8b\x02\x80abc\x03"), UNANSWERED),
        ],
    ),
    "an error inside status 200": (
        AGAIN,
        [
            ({"error": {"message": "overloaded"}}, UNANSWERED),
            ({"error": {"message": "busy", "code": 503}}, UNANSWERED),
            ({"error": "upstream timeout"}, UNANSWERED),
            ({"object": "error", "message": "busy", "code": 500}, UNANSWERED),
            ({"choices": [{"error": {"code": 502, "message": "x"}, "message": {"content": ""}}]}, UNANSWERED),
            (said("My verdict", "error"), UNANSWERED),
            *((said("[[A]]", reason), UNANSWERED) for reason in ("abort", "network_error", "cancelled", "timeout")),
            (said("[[A]]", "insufficient_system_resource"), UNANSWERED),
            (stream("[[A]]", end='event: error\ndata: {"message": "x", "code": 500}\n\ndata: [DONE]\n\n'), UNANSWERED),
            (b'data: {"error": {"message": "overloaded"}}\n\n', UNANSWERED),
        ],
    ),
    "408, 409, 425, 429, 5xx; no connection; longer than `--timeout`": (
        AGAIN,
        [(status, UNANSWERED) for status in (408, 409, 425, 429, 500, 502, 503, 529)] + [(None, UNANSWERED)],
    ),
    "400, 413 or 422 about the text": (
        KEPT,
        [
            (error(400, TOO_LONG, code="context_length_exceeded"), REFUSED),
            (error(400, "the request exceeds the available context size"), REFUSED),
            (error(422, "`inputs` tokens + `max_new_tokens` must be <= 4096: input is too long"), REFUSED),
            (error(400, "The response was filtered by the content management policy"), REFUSED),
            (error(403, "Your input was flagged by moderation"), REFUSED),
            ((413, {}, b""), REFUSED),
            (error(500, "the request exceeds the available context size, try increasing it"), REFUSED),
            (error(400, "ctx", code="context_length_exceeded"), REFUSED),
            ({"error": {"message": "ctx", "code": "context_length_exceeded"}}, REFUSED),
            ((400, {}, json.dumps([{"error": {"code": 400, "message": TOO_LONG}}]).encode()), REFUSED),
            ((422, {}, b'{"error": "`inputs` must have less than 512 tokens. Given: 700"}'), REFUSED),
            (error(400, "Your request exceeded model token limit: 8192"), REFUSED),
            (error(400, "This model's maximum prompt length is 131072 but the request contains 200000"), REFUSED),
            (error(400, "Please reduce the length of the messages or completion."), REFUSED),
            (error(400, "Content Exists Risk"), REFUSED),
            ({"error": {"message": TOO_LONG, "type": "invalid_request_error", "code": 400}}, REFUSED),
        ],
    ),
    "another 4xx": (KEPT, [(error(400, "bad request"), REFUSED), (error(422, "no"), REFUSED), (405, REFUSED)]),
}  # fmt: skip
EXAMPLES = [
    pytest.param(reply, expected, fate, id=f"{title}-{number}")
    for title, (fate, replies) in ROWS.items()
    for number, (reply, expected) in enumerate(replies)
]


def endpoint(url: str, folder: Path, **settings) -> Endpoint:
    return Endpoint(url, "judge", **{"retries": 1, "timeout": 5.0, "cache": str(folder / "cache"), **settings})


def ask(one: Endpoint, *texts: str):
    return one.ask_all([one.request([{"role": "user", "content": text}], max_tokens=99) for text in texts])


@pytest.mark.parametrize(("reply", "expected", "fate"), EXAMPLES)
@pytest.mark.daily(24)
def test_a_reply_is_understood_and_kept_or_asked_again_as_the_table_says(reply, expected, fate, tmp_path):
    with serving(lambda body, before: reply if body["messages"][0]["content"] == "odd" else said("good")) as server:
        (got, good), spent = ask(endpoint(server.url, tmp_path), "odd", "even")
        assert got.text == expected if got.failure is None else got.failure.startswith(expected)
        assert good.text == "good"
        assert spent.unanswered == (fate == AGAIN)
        assert spent.refused == (expected == REFUSED)
        assert spent.asked == 2 - (fate == AGAIN) - (expected == REFUSED)
        asked = len(server.asked)
        assert asked == 2 + (fate == AGAIN) * (reply != 425)  # the client itself does not repeat a 425
        again, spent = ask(endpoint(server.url, tmp_path), "odd", "even")
        assert again[0].failure == got.failure
        assert (len(server.asked) > asked) == (fate == AGAIN)
        assert spent.cached == 2 - (fate == AGAIN)
        if got.failure is not None:
            before = len(server.asked)
            ask(endpoint(server.url, tmp_path, retry_malformed=True, retries=0), "odd", "even")
            assert [body["messages"][0]["content"] for body in server.asked[before:]] == ["odd"]


def test_the_documentation_has_a_row_for_each_kind_of_reply():
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
    for title, (fate, _) in ROWS.items():
        assert re.search(rf"^\| {re.escape(title)} [^\n]*\| {fate}", page, re.MULTILINE), title


@pytest.mark.parametrize("body", [said("[[A]] because", "length"), said([{"type": "text", "text": "[[A]]"}], "length")])
def test_a_text_that_the_length_limit_cut_off_has_no_verdict_and_no_grade(body):
    reply = read_reply(body)
    assert (reply.cut, reply.failure) == (True, None)
    assert read_preference(LETTERS, reply) == (None, CUT)
    assert read_grade(reply) == (None, CUT)
    one = read_reply(
        {"choices": [{**completion("m", {"m": -0.1, "M": -3.0})["choices"][0], "finish_reason": "length"}]}
    )
    value, _ = read_preference(JudgePrompt("t", (), "tokens"), one)  # a verdict of one token always reaches its limit
    assert value == pytest.approx(1 + 1 / (1 + 2.718281828 ** (-0.1 + 3.0)), rel=1e-6)


def test_log_probabilities_of_thinking_are_no_verdict():
    body = completion("<think>hm</think>M", {"m": -0.1, "M": -3.0})
    assert read_preference(JudgePrompt("t", (), "tokens"), read_reply(body)) == (2.0, None)
    body = completion("M", {"m": -0.1, "M": -3.0})
    body["choices"][0]["message"]["reasoning_content"] = "m?"
    assert read_preference(JudgePrompt("t", (), "tokens"), read_reply(body)) == (2.0, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[ A ]]", 1.0), ("[[A ]] is better", 1.0), ("[[\nB\n]]", 2.0), ("[[AB]]", None), ("[[ A B ]]", None),
    ],
)  # fmt: skip
def test_spaces_in_a_verdict_do_not_count(text, expected):
    assert read_preference(LETTERS, read_reply(said(text)))[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[[A >> B]]", 1.0), ("[[ B>A ]]", 1.75), ("[[A = B]]", 1.5), ("[[ A > B ]] or [[A>B]]", 1.25)],
)
def test_spaces_in_a_verdict_of_arena_hard_do_not_count(text, expected):
    assert read_preference(JudgePrompt("t", (), "arena"), read_reply(said(text))) == (expected, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[ 8 ]]", 8),
        ("Rating: [ 7 ]", 7),
        ("As source [1] says, it is good.", None),
        ("See [2].\n\nRating: [[ 9.5]]", 9.5),
    ],
)
def test_a_citation_is_no_grade(text, expected):
    assert read_grade(read_reply(said(text)))[0] == expected


WRAPPED = {
    "field": lambda thought, answer: said(answer, reasoning_content=thought),
    "tags": lambda thought, answer: said(f"<think>{thought}</think>\n{answer}"),
    "closing tag": lambda thought, answer: said(f"{thought}\n</think>\n{answer}"),
    "parts": lambda thought, answer: said(
        [{"type": "thinking", "thinking": thought}, {"type": "text", "text": answer}]
    ),
    "stream": lambda thought, answer: completion_of(stream("<think>", thought, "</think>", answer).decode()),
    "preface": lambda thought, answer: said(f"<Analysis>{thought}</analysis>\n{answer.strip() or 'none'}"),
    "turns": lambda thought, answer: said(
        f"<|im_start|>think\n{thought}<|im_start|>answer\n{answer.strip() or 'none'}"
    ),
    "no end": lambda thought, answer: said(f"<think>{thought}{answer}"),
}
TEXTS = st.lists(st.sampled_from(["[[A]]", "[[B]]", "[[C]]", "\n", "is better", " ", "[1]"]), max_size=6).map("".join)


@examples(300)
@given(TEXTS, TEXTS, st.sampled_from(sorted(WRAPPED)), st.sampled_from(["stop", "length", None]))
def test_a_verdict_never_comes_from_thinking_or_from_a_text_that_was_cut_off(thought, answer, form, reason):
    body = WRAPPED[form](thought, answer)
    body["choices"][0]["finish_reason"] = reason
    value, failure = read_preference(LETTERS, read_reply(body))
    verdicts = set(re.findall(r"\[\[([ABC])\]\]", answer))
    if reason == "length" or form == "no end" or len(verdicts) != 1:
        assert value is None
        assert failure
    else:
        assert value == {"A": 1.0, "B": 2.0, "C": 1.5}[verdicts.pop()]


@examples(200)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "[[A]]", "\n", "x", " ", "`", "[THINK]", "[/THINK]"]), max_size=12)
)
def test_thinking_is_taken_off_or_the_text_stays(pieces):
    text = "".join(pieces)
    answer = without_thinking(text)
    if "hink" not in text.lower():
        assert answer == text
    elif answer is not None:
        assert answer in text or "\n<think>" in text or "\n[THINK]" in text or " <think>" in text or " [THINK]" in text
    assert without_thinking(f"<think>{text.replace('/', '')}") is None
    assert without_thinking(f"<think>{text.replace('<', '').replace('[/', '')}</think>fine") == "fine"


@pytest.mark.parametrize(
    "text",
    [
        "<analysis>The whole answer.</analysis>",
        "See <analysis>that</analysis> part.",
        "Write <think> and </think> around it.",
        "The tag `</think>` ends it.",
        'It ends with "</think>" there.',
        "a < b",
    ],
)
def test_a_text_about_tags_stays_whole(text):
    assert without_thinking(text) == text


@pytest.mark.parametrize(
    "reason", ["length", "MAX_TOKENS", "max_completion_tokens", "LENGTH", "model_context_window_exceeded", "truncated"]
)
def test_a_length_limit_by_any_name_leaves_no_verdict(reason):
    assert read_preference(LETTERS, read_reply(said("I would say [[A]], but", reason))) == (None, CUT)
    assert read_preference(LETTERS, read_reply(said("[[A]]", "eos_token"))) == (1.0, None)
    assert read_preference(LETTERS, read_reply(said("[[A]]", "SAFETY")))[0] is None


# --- refusals -------------------------------------------------------------------------------------------------------


def questions(folder: Path, number: int = 4) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps([{"instruction": f"question {i}"} for i in range(number)]))
    return path


def outputs(path: Path, model: str, number: int = 4) -> Path:
    rows = [{"instruction": f"question {i}", "output": f"{model} {i}", "generator": model} for i in range(number)]
    path.write_text(json.dumps(rows))
    return path


def judge(folder: Path, url: str, *options: str) -> int:
    (folder / "pair.txt").write_text("{instruction} A: {output_1} B: {output_2} Say [[A]], [[B]] or [[C]].")
    arguments = ["judge", "--judge", f"server:{url}", "--model-name", "j", "--prompt", str(folder / "pair.txt")]
    arguments += ["--answers", str(outputs(folder / "ours.json", "mine"))]
    arguments += ["--against", str(outputs(folder / "theirs.json", "theirs"))]
    arguments += ["--out", str(folder / "out"), "--cache", str(folder / "cache"), "--retries", "0"]
    return main([*arguments, *options])


def generate(folder: Path, url: str, *options: str) -> int:
    arguments = ["generate", "--model", "m", "--server", url, "--prompts", str(questions(folder))]
    return main(
        [*arguments, "--out", str(folder / "out"), "--cache", str(folder / "cache"), "--retries", "0", *options]
    )


def test_a_refused_question_is_remembered_counted_and_seen_in_the_exit_code(tmp_path, capsys):
    with serving(
        lambda body, before: error(400, "bad request") if "question 1" in str(body) else said("[[A]]")
    ) as server:
        assert judge(tmp_path, server.url) == 1
        record = json.loads((tmp_path / "out" / "judging.json").read_text())
        assert (record["spent"]["refused"], record["spent"]["asked"], record["spent"]["unanswered"]) == (2, 6, 0)
        assert record["failures"] == {"refused: HTTP 400 bad request": 1}
        asked = len(server.asked)
        assert judge(tmp_path, server.url) == 1
        assert len(server.asked) == asked
        assert "--retry-failed" in capsys.readouterr().err
        assert judge(tmp_path, server.url, "--retry-failed") == 1
        assert len(server.asked) == asked + 2


@pytest.mark.parametrize("status", [400, 405, 422])
def test_a_server_that_refuses_every_question_ends_the_command_in_its_own_words(status, tmp_path, capsys):
    with serving(lambda body, before: error(status, "'temperature' does not support 0 with this model")) as server:
        assert judge(tmp_path, server.url) == 2
        lines = capsys.readouterr().err
        assert "refuses every question" in lines
        assert "'temperature' does not support 0" in lines
        assert "stopped answering" not in lines
        assert not list((tmp_path / "cache").rglob("*.json"))  # another setting of the server may answer
        asked = len(server.asked)
        assert judge(tmp_path, server.url) == 2
        assert len(server.asked) == 2 * asked


@pytest.mark.parametrize(
    "message",
    [
        "Your credit balance is too low to access the API.",
        "API key not valid. Please pass a valid API key.",
        "This organization has been disabled.",
        "Access denied, please make sure your account is not overdue",
    ],
)
def test_a_refusal_of_the_account_in_the_middle_ends_the_command_and_is_not_kept(message, tmp_path):
    paid = []

    def reply(body, before):
        paid.append(1)
        return said("fine") if len(paid) == 1 or len(paid) > 2 else error(400, message, type="invalid_request_error")

    with serving(reply) as server:
        one = endpoint(server.url, tmp_path, concurrency=1, retries=0)
        with pytest.raises(UserError, match=re.escape(message)):
            ask(one, "a", "b", "c")
        replies, spent = ask(one, "a", "b", "c")
        assert [reply.text for reply in replies] == ["fine"] * 3
        assert (spent.cached, spent.asked) == (1, 2)


def test_words_of_the_question_in_a_refusal_do_not_decide_what_it_is_about(tmp_path):
    """FastAPI repeats the question in `input`."""

    def reply(body, before):
        text = body["messages"][0]["content"]
        fields = [{"loc": ["body", "seed"], "msg": "not an integer", "input": text}]
        return said("fine") if text == "even" else (422, {}, json.dumps({"detail": fields}).encode())

    with serving(reply) as server:
        replies, _ = ask(
            endpoint(server.url, tmp_path), "even", "my credit balance is too long, and billing moderation"
        )
    assert replies[1].failure == f"{REFUSED}: HTTP 422 not an integer"


def test_temperature_and_other_fields_of_a_request_are_settings(tmp_path):
    with serving(lambda body, before: said("[[A]]")) as server:
        assert judge(tmp_path, server.url, "--temperature", "none", "--request", "reasoning_effort=low") == 0
        assert all("temperature" not in body and body["reasoning_effort"] == "low" for body in server.asked)
        assert judge(tmp_path, server.url, "--temperature", "0.5", "--request", "max_tokens=null") == 0
        assert server.asked[-1].keys() == {"model", "messages", "temperature"}
        assert judge(tmp_path, server.url, "--temperature", "warm") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
        ("max_tokens", "Unrecognized request argument supplied: max_tokens"),
    ],
)
def test_the_name_of_the_length_limit_is_exchanged_where_the_server_does_not_know_it(name, message, tmp_path):
    with serving(lambda body, before: error(400, message) if name in body else said("[[A]]")) as server:
        assert judge(tmp_path, server.url, "--concurrency", "1") == 0
        assert sum(name in body for body in server.asked) == 1
        assert server.asked[-1]["max_completion_tokens"] == 2048
        asked = len(server.asked)
        assert judge(tmp_path, server.url, "--concurrency", "1") == 0
        assert len(server.asked) == asked


def test_a_length_limit_that_is_too_large_is_not_exchanged(tmp_path, capsys):
    message = "max_tokens or max_completion_tokens is too large: 2048. The maximum context length is 1024."
    with serving(lambda body, before: error(400, message)) as server:
        assert judge(tmp_path, server.url) == 2
        assert all("max_tokens" in body for body in server.asked)
    assert "too large" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_command_with_the_way_to_send_it(status, tmp_path, capsys):
    with serving(lambda body, before: error(status, "Access denied due to missing subscription key")) as server:
        assert judge(tmp_path, server.url) == 2
    assert "--key-header its header (Azure: api-key)" in capsys.readouterr().err


def test_a_key_without_quota_ends_the_command_at_once(tmp_path, capsys):
    with serving(lambda body, before: error(429, "You exceeded your quota", code="insufficient_quota")) as server:
        assert judge(tmp_path, server.url, "--retries", "6") == 2
        assert len(server.asked) <= 8
    assert "no quota" in capsys.readouterr().err


# --- keys and certificates ------------------------------------------------------------------------------------------


def test_a_key_is_sent_in_the_header_that_the_server_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AZURE_API_KEY", "azure-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: secret-of-mine")
    with serving(lambda body, before: said("[[A]]")) as server:
        options = ["--key-variable", "AZURE_API_KEY", "--key-header", "api-key", "--header", "X-Title=sepo"]
        assert judge(tmp_path, server.url, *options) == 0
        headers = server.headers[-1]
    assert (headers["Api-Key"], headers["X-Title"]) == ("azure-secret", "sepo")
    assert "Authorization" not in headers
    assert "of-mine" not in str(headers)
    line = capsys.readouterr().err
    assert f"the key in $AZURE_API_KEY goes to {server.url.removesuffix('/v1')}" in line
    assert "azure-secret" not in line


@pytest.mark.parametrize("host", ["http://192.0.2.7:9/v1", "http://judge.example/v1", "http://localhost.example:9/v1"])
def test_a_key_is_never_sent_over_plain_http_to_another_machine(host, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    one = Endpoint(host, "judge", headers={"X": "y"})
    assert one._all_headers() == {"X": "y"}
    one.log_key()
    assert "is not sent to http://" in capsys.readouterr().err
    for safe in ("https://judge.example/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:8/v1"):
        assert Endpoint(safe, "judge")._all_headers() == {"Authorization": "Bearer sk-very-secret"}


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("https://x/v1", {"headers": {"Authorization": "Bearer sk-very-secret"}}),
        ("http://192.0.2.7/v1", {"headers": {"x-goog-api-key": "sk-very-secret"}}),
        ("https://x/v1", {"headers": {"Ocp-Apim-Subscription-Key": "sk-very-secret"}}),
        ("https://x/v1", {"headers": {"X-Auth-Token": "sk-very-secret"}}),
        ("https://x/v1", {"headers": {"Cookie": "session=sk-very-secret"}}),
        ("https://x/v1", {"headers": {"X-Mine": "Bearer sk-very-secret"}}),
        ("https://x/v1?key=sk-very-secret", {}),
        ("https://x/v1?api-version=1&api_key=sk-very-secret", {}),
        ("https://x/v1?sig=sk-very-secret", {}),
        ("https://x/v1", {"more": {"api_key": "sk-very-secret"}}),
        ("https://x/v1", {"more": {"access_token": "sk-very-secret"}}),
    ],
)
def test_a_key_outside_of_its_variable_is_refused_without_a_word_of_it(url, settings):
    with pytest.raises(UserError, match="seems to hold a key: put the key into an environment variable") as raised:
        Endpoint(url, "judge", **settings)
    assert "very-secret" not in str(raised.value)


def test_other_headers_fields_and_parts_of_an_address_are_no_keys():
    headers = {
        "X-Title": "sepo",
        "HTTP-Referer": "https://x",
        "X-Author": "ada",
        "OpenAI-Beta": "x",
        "X-Max-Tokens": "1",
    }
    more = {"prompt_cache_key": "x", "max_tokens": 5, "stop_token": "x", "logit_bias": {}, "stop_token_ids": [1]}
    Endpoint("https://x/v1?api-version=2024-10-21", "judge", headers=headers, more=more)


def test_a_recipe_names_keys_only(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("{output_1} {output_2}")
    judge_of = f"eval.judge={{server: 'https://x/v1', model: j, prompt: {tmp_path / 'p.txt'}, key_variable: HF_TOKEN}}"
    assert main(["run", "quickstart", "--dry-run", judge_of]) == 2
    assert "must end in _API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("OTHER_API_KEY", "sk-other")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"reference: {{model: {tmp_path / 'model'}}}\ndata: {{held_out: 4}}\n")
    assert main(["run", str(tmp_path / "run.yaml"), "--dry-run", judge_of.replace("HF_TOKEN", "OTHER_API_KEY")]) == 0
    assert "the key in $OTHER_API_KEY goes to https://x\n" in capsys.readouterr().err
    monkeypatch.setenv("MY_SECRET", "given-by-hand")
    with serving(lambda body, before: said("[[A]]")) as server:
        assert judge(tmp_path, server.url, "--key-variable", "MY_SECRET") == 0
        assert server.headers[-1]["Authorization"] == "Bearer given-by-hand"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_is_not_trusted_ends_the_command_at_once(tmp_path, monkeypatch, capsys):
    pem, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {pem} -days 2 -subj /CN=localhost"
    subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:localhost"], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    with serving(lambda body, before: said("[[A]]"), context) as server:
        began = time.monotonic()
        assert judge(tmp_path, server.url, "--retries", "6") == 2
        assert time.monotonic() - began < 20
        assert "SSL_CERT_FILE" in capsys.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert judge(tmp_path, server.url) == 0
    with serving(lambda body, before: said("[[A]]")) as server:
        assert judge(tmp_path, server.url.replace("http", "https"), "--retries", "6") == 2
        assert "does not speak https" in capsys.readouterr().err


# --- answers --------------------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, str]:
    rows = json.loads((folder / "out" / "model_outputs.json").read_text())
    return {row["instruction"]: row["output"] for row in rows}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said(None, "length", reasoning_content="Let me think"), CUT),
        (said("<think>Let me think", "length"), CUT),
        (said("<think>Let me think"), "the thinking has no end"),
        (said("<think>x</think>"), "empty reply"),
        (said(""), "empty reply"),
        (said(None), "empty reply"),
    ],
)
def test_no_answer_is_never_kept_as_an_answer(reply, reason, tmp_path, capsys):
    with serving(lambda body, before: reply if "question 1" in str(body) else said("A plum.")) as server:
        assert generate(tmp_path, server.url) == 1
        assert written(tmp_path) == {f"question {i}": "A plum." for i in (0, 2, 3)}
        error = capsys.readouterr().err
        assert "1 of 4 questions have no answer" in error
        assert reason in error
        assert generate(tmp_path, server.url) == 1
        assert len(server.asked) == 4
        assert generate(tmp_path, server.url, "--retry-failed") == 1
        assert len(server.asked) == 5


def test_an_answer_that_the_length_limit_cut_off_is_marked_and_counted(tmp_path, capsys):
    with serving(lambda body, before: said("A pl", "length" if "question 1" in str(body) else "stop")) as server:
        assert generate(tmp_path, server.url, "--max-new-tokens", "3") == 0
        assert "1 of 4 answers are cut off at --max-new-tokens 3" in capsys.readouterr().err
        assert len(written(tmp_path)) == 4
        rows = [json.loads(line) for line in (tmp_path / "out" / "finished.jsonl").read_text().splitlines()]
        assert {row["key"]: row["finished"] for row in rows}["question 1"] is False
        assert generate(tmp_path, server.url, "--max-new-tokens", "3") == 0
        assert "1 of 4 answers are cut off" in capsys.readouterr().err


def test_answers_and_their_lengths_are_without_thinking(tmp_path, capsys):
    usage = {"prompt_tokens": 9, "completion_tokens": 100, "completion_tokens_details": {"reasoning_tokens": 90}}
    body = said("<think>\nPlum is one.\n</think>\n\nA plum.") | {"usage": usage}
    with serving(lambda _, before: body) as server:
        assert generate(tmp_path, server.url, "--request", "top_p=1", "--chat-template", "enable_thinking=true") == 0
        assert set(written(tmp_path).values()) == {"A plum."}
        assert server.asked[0]["top_p"] == 1
        assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}
    rows = [json.loads(line) for line in (tmp_path / "out" / "finished.jsonl").read_text().splitlines()]
    assert {row["tokens"] for row in rows} == {10}
    assert "top_p, top_k and repetition_penalty are the server's own" in capsys.readouterr().err


def test_a_wait_for_replies_under_way_is_said(tmp_path, capsys):
    with serving(lambda body, before: 1.0 if "slow" in str(body) else said("fine")) as server:

        def stop(number, reply):
            raise KeyboardInterrupt

        one = endpoint(server.url, tmp_path, timeout=3.0, retries=0)
        requests = [one.request([{"role": "user", "content": text}]) for text in ("slow", "fast")]
        with pytest.raises(KeyboardInterrupt):
            one.ask_all(requests, done=stop)
    assert "waiting at most 3 s for 1 replies under way" in capsys.readouterr().err
