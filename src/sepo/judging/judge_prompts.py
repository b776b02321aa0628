"""The words that a judge is asked with, and what its reply means.

Templates are the benchmarks' own files, read at run time: AlpacaEval's text with `<|im_start|>` turns, FastChat's
`judge_prompts.jsonl`, Arena-Hard's yaml. Placeholders are filled in one pass and after the template was cut into turns,
so an answer that holds `{answer_b}` or `<|im_start|>system` stays text. An answer may still *say* "output (a) is
better": what is read is the judge's own reply, and one with two different verdicts is no verdict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from sepo.errors import UserError, nearest
from sepo.judging.endpoint import Reply

# How a reply names the better answer.
TOKENS, LETTERS, ARENA, OUTPUTS, RATING = "tokens", "letters", "arena", "outputs", "rating"
_SHOWS_ANSWERS = re.compile(r"\{(output_[12]|answer(_[ab])?(_\d)?|ANSWER_[AB])\}")
_TURN = re.compile(r"<\|im_start\|>\s*(system|user|assistant)\s*\n?(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ARENA_SCALE = {"A>>B": 1.0, "A>B": 1.25, "A=B": 1.5, "B>A": 1.75, "B>>A": 2.0}
_ARENA_SAME = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}


class JudgePrompt(NamedTuple):
    """What a judge is asked.

    Attributes:
        name: of the template.
        messages: role and text with placeholders in braces.
        verdict: how the reply names the better answer (TOKENS, ...).
        reference: it shows a reference answer.
        turns: of the conversation that it shows.
    """

    name: str
    messages: tuple[tuple[str, str], ...]
    verdict: str
    reference: bool = False
    turns: int = 1

    def fill(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages with every placeholder replaced in one pass; what has no value stays as it is."""
        pattern = re.compile("{(" + "|".join(map(re.escape, values)) + ")}")
        return [
            {"role": role, "content": pattern.sub(lambda match: values[match[1]], text)} for role, text in self.messages
        ]


def values_of(
    questions: Sequence[str], first: Sequence[str], second: Sequence[str] = (), reference: Sequence[str] = ()
) -> dict[str, str]:
    """Values of all names that the benchmarks' templates have, for a conversation of as many turns as `questions`.

    Args:
        questions: of the user.
        first, second: the answers to them, of one model (for a grade) or of two.
        reference: answers that are right.
    """
    values = {f"question_{i}": text for i, text in enumerate(questions, 1)}
    values |= {f"answer_{i}": text for i, text in enumerate(first, 1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
    values |= dict.fromkeys(("question", "instruction", "QUESTION"), questions[-1])
    values |= dict.fromkeys(("answer", "answer_a", "output_1", "ANSWER_A"), first[-1])
    values |= {f"answer_a_{i}": text for i, text in enumerate(first, 1)}
    if second:
        values |= dict.fromkeys(("answer_b", "output_2", "ANSWER_B"), second[-1])
        values |= {f"answer_b_{i}": text for i, text in enumerate(second, 1)}
        if len(questions) == 1:
            values["answer_2"] = second[0]  # Arena-Hard v0.1 numbers the two answers
    return values


def read_templates(path: Path) -> dict[str, JudgePrompt]:
    """Templates of a file by name: a jsonl of FastChat, a yaml of Arena-Hard, or one text.

    Raises:
        UserError: the file is missing, or shows no answers.
    """
    if not path.is_file():
        raise UserError(f"no judge prompt at '{path}': expected the benchmark's txt, jsonl or yaml file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found = [_of_fastchat(json.loads(line)) for line in text.split("\n") if line.strip()]
        elif path.suffix in (".yaml", ".yml"):
            found = [_of_arena(yaml.safe_load(text), path.stem)]
        else:
            found = [_of_text(text, path.stem)]
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the judge prompt '{path}' cannot be read ({type(error).__name__} {error})") from None
    for template in found:
        shown = "".join(text for _, text in template.messages)
        if not _SHOWS_ANSWERS.search(shown):
            raise UserError(
                f"the judge prompt '{path}' shows no answer: expected {{output_1}}, {{answer_a}} or {{answer}}"
            )
    return {template.name: template for template in found}


def _of_fastchat(row: Mapping) -> JudgePrompt:
    verdict = {"[[A]]": LETTERS, "[[rating]]": RATING}.get(row["output_format"])
    if verdict is None:
        verdict = "scores"  # [[rating_a,rating_b]]: of no use here, and in the same file
    prompt = str(row["prompt_template"])
    turns = 2 if "question_2" in prompt else 1
    return JudgePrompt(
        str(row["name"]),
        (("system", str(row["system_prompt"])), ("user", prompt)),
        verdict,
        "ref_answer" in prompt,
        turns,
    )


def _of_arena(settings: Mapping, name: str) -> JudgePrompt:
    prompt = settings["prompt_template"]
    prompts = [prompt] if isinstance(prompt, str) else [str(one) for one in prompt]
    system = settings.get("system_prompt")
    messages = ([("system", str(system))] if system else []) + [("user", one) for one in prompts]
    return JudgePrompt(name, tuple(messages), ARENA)


def _of_text(text: str, name: str) -> JudgePrompt:
    turns = [(match[1], match[2].strip()) for match in _TURN.finditer(text)]
    turns = [turn for turn in turns if turn[1]] or [("user", text.strip())]
    if "[[A]]" in text:
        verdict = LETTERS
    elif "[[A>B]]" in text:
        verdict = ARENA
    elif "Output (a)" in text:
        verdict = OUTPUTS
    elif "[[rating]]" in text or "[[5]]" in text:
        verdict = RATING
    else:
        verdict = TOKENS
    return JudgePrompt(name, tuple(turns), verdict)


def choose(
    templates: Mapping[str, JudgePrompt], name: str | None, verdicts: Sequence[str], turns: int, reference: bool
) -> JudgePrompt:
    """The template of that name, or the first that fits what is to be judged.

    Args:
        verdicts: the kinds that will do.
        turns: of the conversation.
        reference: there is a reference answer; a template that shows one is then preferred.

    Raises:
        UserError: there is none.
    """
    fitting = {key: one for key, one in templates.items() if one.verdict in verdicts and one.turns == turns}
    if name is not None and name not in templates:
        raise UserError(f"no judge prompt '{name}'{nearest(name, templates)}: there are {', '.join(templates)}")
    if name is not None and turns == 1:
        if name not in fitting:
            raise UserError(f"the judge prompt '{name}' does not fit: expected one of {', '.join(fitting) or 'none'}")
        return fitting[name]
    for wanted in (reference, False):
        found = [one for one in fitting.values() if one.reference == wanted]
        if found:
            return found[0]
    kinds = "a grade [[rating]]" if RATING in verdicts else "a comparison"
    raise UserError(
        f"the file of judge prompts has none for {kinds} of {turns} turns: there are {', '.join(templates)}"
    )


def preference(template: JudgePrompt, reply: Reply) -> tuple[float | None, str | None]:
    """What a reply says of two answers: 1 the first is better, 2 the second, between how sure; or why it says nothing.

    TOKENS: `m` is the first and `M` the second; with log-probabilities 1 + P(M) / (P(m) + P(M)), as AlpacaEval's.
    LETTERS: [[A]], [[B]], [[C]] for a tie. OUTPUTS: "Output (a)" at the start of a line. ARENA: [[A>>B]] to [[B>>A]],
    as 1, 1.25, 1.5, 1.75, 2.
    """
    if reply.failure is not None:
        return None, reply.failure
    if template.verdict == TOKENS:
        return _token_preference(reply)
    if template.verdict == LETTERS:
        found = set(re.findall(r"\[\[(A|B|C)\]\]", reply.text))
        return _one_of(found, {"A": 1.0, "B": 2.0, "C": 1.5})
    if template.verdict == ARENA:
        named = {name.strip() for name in re.findall(r"\[\[([AB<>=]+)\]\]", reply.text)}
        return _one_of({_ARENA_SAME.get(name, name) for name in named}, _ARENA_SCALE)
    found = {match.lower() for match in re.findall(r"(?:^|\n)\s*Output \(([ab])\)", reply.text, re.IGNORECASE)}
    return _one_of(found, {"a": 1.0, "b": 2.0})


def arena_verdict(reply: Reply) -> str | None:
    """The verdict of a reply in Arena-Hard's own words; None if there is none, or two."""
    named = set(re.findall(r"\[\[([AB<>=]+)\]\]", reply.text))
    return named.pop() if len(named) == 1 and named <= {*_ARENA_SCALE, *_ARENA_SAME} else None


def _one_of(found: set[str], meaning: Mapping[str, float]) -> tuple[float | None, str | None]:
    if len(found) > 1:
        return None, "contradictory verdicts"
    known = [meaning[name] for name in found if name in meaning]
    return (known[0], None) if known else (None, "no verdict")


def _token_preference(reply: Reply) -> tuple[float | None, str | None]:
    if reply.logprobs:
        chances = {"m": 0.0, "M": 0.0}
        for token, logp in reply.logprobs[0].items():
            if token.strip() in chances and logp <= 1e-6:
                chances[token.strip()] += math.exp(logp)
        total = sum(chances.values())
        if total > 0:
            return 1 + chances["M"] / total, None
    word = reply.text.strip().strip("\"'`.*")
    return {"m": (1.0, None), "M": (2.0, None)}.get(word, (None, "no verdict"))


def grade(reply: Reply) -> tuple[float | None, str | None]:
    """The grade from 1 to 10 in a reply, `[[7]]` or `[7]`; or why there is none."""
    if reply.failure is not None:
        return None, reply.failure
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        found = {float(match) for match in re.findall(pattern, reply.text)}
        if len(found) > 1:
            return None, "contradictory grades"
        if found:
            value = found.pop()
            return (value, None) if 1 <= value <= 10 else (None, "a grade outside 1 to 10")
    return None, "no grade"
