"""Prompt and response equal the rendering of the chat template, for templates of current models."""

from __future__ import annotations

import json

import datasets
import pytest

from chat_templates import (
    CALL,
    KINDS,
    NOT_THINKING,
    OWN,
    PAGE,
    TOOL,
    assistant,
    documented,
    head_lines,
    line_of,
    outcome,
    page,
    results,
    showing_every_cell,
    templates,
    tokenizer_named,
    tokenizer_with,
    user,
)
from sepo.data.encoding import tokenize_pairs
from sepo.data.templates import FIXED_DATE, end_of_turn_id, render
from sepo.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokens_of(row: dict, tokenizer, **options) -> tuple[dict[str, str], dict[str, int]]:
    """Texts of the only pair by column, and the notes."""
    table, report = tokenize_pairs(datasets.Dataset.from_list([row]), tokenizer, progress=False, **options)
    ids = table.to_pylist()[0]
    return {name: tokenizer.decode(ids[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}, report.notes


@pytest.mark.parametrize("name", templates())
@pytest.mark.daily(2)
def test_every_conversation_is_written_as_the_template_writes_it_or_counted(name):
    found = results(name)  # asserts that both sequences equal the rendering of the template
    assert found["one turn"][0] in "=+"
    assert found["turns"][0] in "=+"
    assert found["prefill"][0] in "=+"


@pytest.mark.slow
def test_the_table_in_the_documentation_is_what_the_tests_find():
    """Of the templates that show every outcome of every kind of conversation; the next test tries all."""
    _, table = documented()
    assert table[:2] == head_lines()
    named = {line.split(" ")[1]: line for line in table[2:]}
    assert list(named) == list(templates())
    shown = showing_every_cell(table[2:])
    assert 5 < len(shown) < 20
    for line in shown:
        assert line == line_of(line.split(" ")[1]), "run: PYTHONPATH=src python tests/chat_templates.py"


@pytest.mark.nightly
def test_the_whole_table_in_the_documentation_is_what_the_tests_find():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: PYTHONPATH=src python tests/chat_templates.py"


def test_an_answer_is_not_put_into_an_open_thought():
    texts, notes = tokens_of(KINDS["one turn"], tokenizer_named("deepseek_r1_distill"))
    assert texts["prompt"].endswith("<｜Assistant｜>")
    assert texts["chosen"].startswith("It is 4.")
    assert len(notes) == 1


def test_thinking_goes_on_from_the_thought_that_the_generation_prompt_opened():
    texts, notes = tokens_of(KINDS["both think"], tokenizer_named("deepseek_r1_distill"))
    assert texts["prompt"].endswith("<｜Assistant｜><think>\n")
    assert texts["chosen"].startswith("I add.\n</think>\n\nIt is 4.")
    assert any("leaves out the response's thinking" in note for note in notes)


def test_the_empty_thought_that_qwen_3_writes_belongs_to_the_prompt():
    tokenizer = tokenizer_named("qwen3")
    texts, notes = tokens_of(KINDS["one turn"], tokenizer)
    assert texts["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert texts["chosen"] == "It is 4.<|im_end|>"
    assert notes
    off, notes = tokens_of(KINDS["one turn"], tokenizer, chat_template_kwargs=NOT_THINKING)
    assert off == texts
    assert not notes


def test_a_response_with_thinking_and_one_without_share_a_prompt():
    texts, _ = tokens_of(KINDS["one thinks"], tokenizer_named("qwen3"))
    assert texts["prompt"].endswith("<|im_start|>assistant\n")
    assert texts["chosen"] == "<think>\nI add.\n</think>\n\nIt is 4.<|im_end|>"
    assert texts["rejected"] == "<think>\n\n</think>\n\nIt is 5.<|im_end|>"


def test_thinking_is_the_models_own_token_in_a_response_and_text_elsewhere():
    tokenizer = tokenizer_named("qwen3")
    tag = tokenizer.convert_tokens_to_ids("<think>")
    row = {**KINDS["both think"], "prompt": [user("What does <think> mean?")]}
    table, _ = tokenize_pairs(datasets.Dataset.from_list([row]), tokenizer, progress=False)
    ids = table.to_pylist()[0]
    assert tag not in ids["prompt_ids"]
    assert ids["chosen_ids"].count(tag) == 1


@pytest.mark.parametrize("spelling", ["list", "json", "function_call", "arguments as json", "sharegpt"])
def test_tool_calls_are_written_however_they_are_spelled(spelling):
    tokenizer = tokenizer_named("qwen3")
    wanted, _ = tokens_of(KINDS["tool turns"], tokenizer)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in wanted["prompt"]
    call = {
        "list": assistant("", tool_calls=CALL),
        "json": assistant("", tool_calls=json.dumps(CALL)),
        "function_call": {"role": "assistant", "content": None, "function_call": CALL[0]["function"]},
        "arguments as json": assistant(
            "", tool_calls=[{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
        ),
        "sharegpt": {"role": "function_call", "content": json.dumps(CALL[0]["function"])},
    }[spelling]
    row = {**KINDS["tool turns"], "prompt": [user("Weather?"), call, {"role": "tool", "content": "7 degrees"}]}
    assert tokens_of(row, tokenizer)[0] == wanted


def test_a_template_without_tools_drops_the_row_that_needs_them():
    tokenizer = tokenizer_with(CHATML)
    assert outcome(tokenizer, KINDS["tool turns"]).startswith("- left out by the chat template")
    assert outcome(tokenizer, KINDS["a call"]).startswith("- left out by the chat template")
    row = {**KINDS["one turn"], "tools": json.dumps([TOOL])}
    assert outcome(tokenizer, row) == "- left out by the chat template [tools]"
    assert outcome(tokenizer, {**KINDS["one turn"], "tools": "[...]"}) == "- tools [not JSON]"


@pytest.mark.parametrize("left_out", ["system", "tool", "assistant"])
def test_a_message_that_the_template_leaves_out_drops_the_row(left_out):
    """Even if its text occurs by chance: the user also says "Be brief."."""
    skip = f"{{% if m.role == '{left_out}' and not loop.last %}}{{% continue %}}{{% endif %}}"
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages %}" + skip)
    row = {
        "prompt": [
            {"role": "system", "content": "Be brief."}, user("Be brief."), assistant("Be brief."),
            {"role": "tool", "content": "Be brief."}, user("Be brief."),
        ],
        "chosen": [assistant("It is 4.")],
        "rejected": [assistant("It is 5.")],
    }  # fmt: skip
    a = "an" if left_out == "assistant" else "a"
    assert outcome(tokenizer_with(template), row) == f"- left out by the chat template [{a} {left_out} message]"


def test_the_templates_own_sentence_is_the_reason():
    found = outcome(tokenizer_named("gemma"), KINDS["system"])
    assert found == "- refused by the chat template [System role not supported]"


@pytest.mark.parametrize("name", ["llama3_2", "smollm3"])
def test_the_date_in_a_prompt_is_always_the_same(name):
    texts, _ = tokens_of(KINDS["one turn"], tokenizer_named(name))
    assert FIXED_DATE.strftime("%d %b") in texts["prompt"]
    assert "2024" in texts["prompt"]


def test_a_plain_prompt_goes_on_within_the_turn_that_it_began():
    texts, _ = tokens_of(KINDS["prefill"], tokenizer_with(CHATML))
    assert texts["prompt"].endswith("<|im_start|>assistant\nIt is")
    assert texts["chosen"] == " 4.<|im_end|>"


def test_options_of_a_row_override_those_of_the_recipe():
    tokenizer = tokenizer_named("smollm3")
    thinking, _ = tokens_of(KINDS["one turn"], tokenizer)
    not_thinking, _ = tokens_of(KINDS["one turn"], tokenizer, chat_template_kwargs=NOT_THINKING)
    assert not_thinking["prompt"].endswith("<think>\n\n</think>\n")
    row = {**KINDS["one turn"], "chat_template_kwargs": {"enable_thinking": True}}
    assert tokens_of(row, tokenizer, chat_template_kwargs=NOT_THINKING)[0] == thinking


def test_the_end_of_a_response_is_the_same_everywhere():
    cohere = tokenizer_named("cohere2")
    texts, _ = tokens_of(KINDS["one turn"], cohere)
    assert texts["chosen"].endswith("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")
    assert end_of_turn_id(cohere) == cohere.eos_token_id
    phi = tokenizer_named("phi3")  # writes <|endoftext|> on a line of its own, which no model generates
    assert tokens_of(KINDS["one turn"], phi)[0]["chosen"] == "It is 4.<|end|>"
    assert end_of_turn_id(phi) == phi.convert_tokens_to_ids("<|end|>")


def test_templates_that_take_content_in_parts_are_given_parts():
    texts, _ = tokens_of(KINDS["system"], tokenizer_named("smolvlm"))
    assert "Be brief." in texts["prompt"]
    assert texts["chosen"].strip().startswith("It is 4.")


def test_a_template_that_leaves_out_messages_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot render a user and an assistant turn") as caught:
        tokens_of(KINDS["one turn"], tokenizer_with("{{ bos_token }}"))
    assert "\n" not in str(caught.value)


def test_the_test_templates_have_the_formats_of_real_models():
    """Each template writes a conversation as its model card shows."""
    shown = {
        "llama2": "<bos>[INST] 2+2? [/INST] It is 4. <eos>",
        "mistral": "<bos>[INST] 2+2?[/INST] It is 4.<eos>",
        "phi4": "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>It is 4.<|im_end|>",
    }
    for name, text in shown.items():
        messages = [*KINDS["one turn"]["prompt"], *KINDS["one turn"]["chosen"]]
        assert render(tokenizer_with(OWN[name]), messages) == text
