"""The chat templates of current models, and what becomes of one conversation of each kind under them.

Run as a program it writes the table of docs/chat-templates.md anew; test_chat_templates.py holds it to the table.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from pathlib import Path

import datasets
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sepo.data.encoding import tokenize_pairs
from sepo.data.ragged import as_read
from sepo.data.templates import probe_template, render
from sepo.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "chat-templates.md"

# Formats of families that TRL ships no template of, written out here from their model cards.
_MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + (ns.system if loop.last or loop.index == messages | length - 1 else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported') }}{% endif %}{% endfor %}"
)
_LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() }}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_SMOLLM3 = (
    "{% set think = enable_thinking if enable_thinking is defined else true %}"
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}"
    "{{ ('/think' if think else '/no_think') + '\n\n' + ns.system + '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if not think %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not think %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
_QWQ = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
OWN = {"llama2": _LLAMA_2, "mistral": _MISTRAL, "phi4": _PHI_4, "qwq": _QWQ, "smollm3": _SMOLLM3}
# The token that ends a turn, where it is not the last that the template writes after a response.
_EOS = {"cohere2": "<|END_OF_TURN_TOKEN|>"}


def templates() -> dict[str, str]:
    """All templates by name: TRL's (but for the copies it makes for training), and `OWN`."""
    folder = Path(trl.__file__).parent / "chat_templates"
    shipped = {path.stem: path.read_text() for path in folder.glob("*.jinja") if not path.stem.endswith("_training")}
    return dict(sorted((shipped | OWN).items()))


_SPECIAL = re.compile(
    r"<\|[^|<>{}' ]{1,40}\|>|<｜[^｜<>']{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>|\[/?INST\]|\[gMASK\]|<sop>"
    r"|<\|[a-z_\"]+>|<[a-z_]+\|>"
)
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # no special tokens, in Qwen 3 and its kin


def tokenizer_with(template: str, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has every control token of a template."""
    special = sorted({*_SPECIAL.findall(template), "<bos>", eos} - {*_ADDED})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["It is 4. It is 5."],
        trainers.BpeTrainer(
            vocab_size=280 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in _ADDED if token in template])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_with(templates()[name], _EOS.get(name, "<eos>"))


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


_CALL_AS_TEXT = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A town."}}},
    },
}
_FOUR, _FIVE = [assistant("It is 4.")], [assistant("It is 5.")]
_THINKS = [assistant("<think>\nI add.\n</think>\n\nIt is 4.")]
KINDS: dict[str, dict] = {
    "one turn": {"prompt": [user("2+2?")], "chosen": _FOUR, "rejected": _FIVE},
    "system": {
        "prompt": [{"role": "system", "content": "Be brief."}, user("2+2?")], "chosen": _FOUR, "rejected": _FIVE,
    },
    "turns": {
        "prompt": [user("Hello"), assistant("Good day."), user("2+2?")], "chosen": _FOUR, "rejected": _FIVE,
    },
    "prefill": {
        "prompt": [user("2+2?"), assistant("It is")], "chosen": [assistant(" 4.")], "rejected": [assistant(" 5.")],
    },
    "both think": {
        "prompt": [user("2+2?")], "chosen": _THINKS, "rejected": [assistant("<think>\nI guess.\n</think>\n\nIt is 5.")],
    },
    "one thinks": {"prompt": [user("2+2?")], "chosen": _THINKS, "rejected": _FIVE},
    "reasoning_content": {
        "prompt": [user("2+2?")], "chosen": [assistant("It is 4.", reasoning_content="I add.")],
        "rejected": [assistant("It is 5.", reasoning_content="I guess.")],
    },
    "tool turns": {
        "prompt": [user("Weather?"), assistant("", tool_calls=CALL),
                   {"role": "tool", "content": "7 degrees", "name": "weather"}],
        "chosen": [assistant("7 degrees.")], "rejected": [assistant("I do not know.")],
    },
    "several turns": {
        "prompt": [user("2+2?")], "chosen": [*_FOUR, user("So?"), assistant("Yes, 4.")],
        "rejected": [*_FIVE, user("So?"), assistant("Perhaps 4.")],
    },
    "a call": {
        "prompt": [user("Weather?")], "tools": json.dumps([TOOL]), "chosen": [assistant("", tool_calls=CALL)],
        "rejected": [assistant("I do not know.")],
    },
}  # fmt: skip
NOT_THINKING = {"enable_thinking": False}


@functools.cache
def _dataset(row: str) -> datasets.Dataset:
    """A dataset of one row, given as JSON: most of the time of making one is its fingerprint."""
    return datasets.Dataset.from_list([json.loads(row)])


@functools.lru_cache(maxsize=8)
def _in_parts(tokenizer, template: str, options: tuple) -> bool:
    """Whether a tokenizer with this chat template takes content in parts."""
    return probe_template(tokenizer, dict(options)).in_parts


def outcome(tokenizer, row: dict, options: dict | None = None) -> str:
    """What became of a pair: "=", or "+" and what was noted, if both sequences are what the template writes of the
    conversation; "*" and what was noted if the thinking that it would leave out was put in its place; or "-" and why
    the pair was dropped. Anything else is an error.
    """
    options = options or {}
    try:
        dataset = _dataset(json.dumps(row))
        table, report = tokenize_pairs(dataset, tokenizer, chat_template_kwargs=options, progress=False)
    except UserError as error:
        found = re.search(r"usable pair in 1 rows: (.*) 1 \(first", str(error))
        return f"- {found[1]}" if found else f"! {error}"
    ids = table.to_pylist()[0]
    notes = [note.split(":")[0] for note in report.notes if "several assistant turns" not in note]
    placed = any("leaves out the response" in note for note in notes)
    apart = any("ignores thinking" in note for note in notes)
    for side in ("chosen", "rejected"):
        text = tokenizer.decode([*ids["prompt_ids"], *as_read(table, side)[0]])
        renderings = _written(tokenizer, row, side, options, apart)
        if not any(one.startswith(text) for one in renderings):
            text = text.removesuffix("<eos>")  # added where the template ends a turn with no token
        wanted = next((one for one in renderings if one.startswith(text)), renderings[-1])
        assert text.count("<think>") == text.count("</think>"), text
        if placed and "</think>" in text:
            assert text.startswith(render(tokenizer, row["prompt"], add_generation_prompt=True, options=options)), text
            answer = row[side][0]["content"].split("</think>")[-1].strip()
            assert text.endswith(answer + wanted[wanted.rindex(".") + 1 :].strip()), text
            continue
        rest = wanted[len(text) :]
        assert wanted.startswith(text), (text, wanted)
        assert not rest.strip() or (text.endswith("|>") and len(rest) < 20), (text, rest)  # beyond the end of turn
    return " ".join(["*" if placed else "+" if notes else "=", *notes])


def _written(tokenizer, row: dict, side: str, options: dict, apart: bool) -> list[str]:
    """The template's own rendering of the conversation with one of the responses; several where it has tool calls."""
    *earlier, last = [*row["prompt"], *row[side][:-1]]
    response = row[side][-1]
    if last["role"] == "assistant":
        messages = [*earlier, assistant(last["content"] + response["content"])]
    else:
        if apart and "</think>" in response["content"]:
            thought, _, content = response["content"].partition("</think>")
            response = assistant(content.lstrip("\n"), reasoning_content=thought.removeprefix("<think>").strip())
        messages = [*earlier, last, response]
    in_parts = _in_parts(tokenizer, tokenizer.chat_template, tuple(options.items()))
    tools = json.loads(row.get("tools", "[]"))
    renderings = []
    for calls, empty in itertools.product((CALL, _CALL_AS_TEXT), ("", None)):
        spelled = [
            {**one, "tool_calls": calls, "content": one["content"] or empty} if "tool_calls" in one else one
            for one in messages
        ]
        with contextlib.suppress(Exception):  # of the four spellings, a template takes what it takes
            renderings.append(render(tokenizer, spelled, tools=tools, options=options, in_parts=in_parts))
    return renderings


# --- the table of the documentation ---------------------------------------------------------------------------------

_SHORT = {
    "refused by the chat template": "refused",
    "left out by the chat template": "not written",
}


COLUMNS = [*KINDS, "off: one turn", "off: both think"]


@functools.cache
def results(name: str) -> dict[str, str]:
    """Outcomes by kind of conversation, with thinking turned off where the template can."""
    tokenizer = tokenizer_named(name)
    found = {kind: outcome(tokenizer, row) for kind, row in KINDS.items()}
    if "enable_thinking" in templates()[name]:
        found["off: one turn"] = outcome(tokenizer, KINDS["one turn"], NOT_THINKING)
        found["off: both think"] = outcome(tokenizer, KINDS["both think"], NOT_THINKING)
    return found


def head_lines() -> list[str]:
    """The two lines of the table's head."""
    return ["| template | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]


def line_of(name: str) -> str:
    """The line of a template."""
    found = results(name)
    return f"| {name} | " + " | ".join(_cell(found.get(kind, "")) for kind in COLUMNS) + " |"


def documented() -> tuple[str, list[str]]:
    """The page before the table, and the lines of the table, as they stand in the documentation."""
    before, mark, table = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    return before + mark, table.splitlines()


def showing_every_cell(lines: list[str]) -> list[str]:
    """Of the lines of templates those that, in their order of new cells, show every cell of every column once."""
    cells = {line: set(enumerate(line.split(" | ")[1:])) for line in lines}
    left, chosen = set().union(*cells.values()), []
    while left:
        chosen.append(max(lines, key=lambda line: len(cells[line] & left)))
        left -= cells[chosen[-1]]
    return chosen


def page() -> str:
    """The page with the table, as it should stand in the documentation."""
    return documented()[0] + "\n".join([*head_lines(), *map(line_of, templates())]) + "\n"


def _cell(text: str) -> str:
    if not text:
        return ""
    sign, _, rest = text.partition(" ")
    if sign != "-":
        return {"=": "✓", "+": "✓ noted", "*": "after the generation prompt"}[sign]
    reason, _, detail = rest.partition(" [")
    what = detail.removesuffix("]")
    return f"{_SHORT.get(reason, reason)}: {what}" if reason == "left out by the chat template" else _SHORT[reason]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
