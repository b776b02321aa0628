"""The prompts of a judge, and how its replies are read.

Prompts are the benchmarks' own files, read at run time: AlpacaEval's text with `<|im_start|>` turns, FastChat's
`judge_prompts.jsonl`, Arena-Hard's yaml. A file is first cut into turns, then its placeholders are filled in one pass,
so `{answer_b}` or `<|im_start|>system` in an answer stays text. An answer may still *claim* "output (a) is better":
only the judge's own reply is read, and a reply with two different verdicts counts as none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from sepo.errors import UserError, nearest, one_line
from sepo.judging.replies import CUT, Reply

# How a reply names the better answer.
TOKENS, LETTERS, ARENA, OUTPUTS, RATING = "tokens", "letters", "arena", "outputs", "rating"
_SHOWS_ANSWERS = re.compile(r"\{(output_[12]|answer(_[ab])?(_\d)?|ANSWER_[AB])\}")
_TURN = re.compile(r"<\|im_start\|>\s*(system|user|assistant)\s*\n?(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ARENA_SCALE = {"A>>B": 1.0, "A>B": 1.25, "A=B": 1.5, "B>A": 1.75, "B>>A": 2.0}
_ARENA = r"[AB<>=]+"
_VERDICT = re.compile(r"\[\[([^\[\]]{1,20})\]\]")
_GRADES = (
    re.compile(r"\[\[\s*(\d+\.?\d*)\s*\]\]"),
    re.compile(r"(?:\A\s*|(?:rating|score|grade)[^\[\]\n]{0,20})\[\s*(\d+\.?\d*)\s*\]", re.IGNORECASE),
)
_ARENA_SAME = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}


class JudgePrompt(NamedTuple):
    """A prompt of a judge.

    Attributes:
        name: in its file.
        messages: role and text, with placeholders in braces.
        verdict: how the reply names the better answer (TOKENS, ...).
        reference: the prompt shows a reference answer.
        turns: number of turns of the conversation that the prompt shows.
    """

    name: str
    messages: tuple[tuple[str, str], ...]
    verdict: str
    reference: bool = False
    turns: int = 1

    def fill(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages with their placeholders filled in one pass; a placeholder without a value stays."""
        pattern = re.compile("{(" + "|".join(map(re.escape, values)) + ")}")
        return [
            {"role": role, "content": pattern.sub(lambda match: values[match[1]], text)} for role, text in self.messages
        ]


def prompt_values(
    questions: Sequence[str], first: Sequence[str], second: Sequence[str] = (), reference: Sequence[str] = ()
) -> dict[str, str]:
    """Values of the placeholders of all benchmarks, for a conversation with as many turns as `questions`.

    Args:
        questions: of the user.
        first, second: the answers of one model (for a grade) or of two.
        reference: right answers.
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


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Prompts of a file by name: a jsonl of FastChat, a yaml of Arena-Hard, or one text.

    Raises:
        UserError: the file is missing or cannot be read, or one of its prompts shows no answer.
    """
    if not path.is_file():
        raise UserError(f"no judge prompt at '{path}': expected the benchmark's txt, jsonl or yaml file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            prompts = [_of_fastchat(json.loads(line)) for line in text.split("\n") if line.strip()]
        elif path.suffix in (".yaml", ".yml"):
            prompts = [_of_arena(yaml.safe_load(text), path.stem)]
        else:
            prompts = [_of_text(text, path.stem)]
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the judge prompt '{path}' cannot be read ({type(error).__name__} {error})") from None
    names = [prompt.name for prompt in prompts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"the judge prompt '{path}' holds {one_line(repr(twice), 60)} twice: expected each name once")
    for prompt in prompts:
        if not any(_SHOWS_ANSWERS.search(text) for _, text in prompt.messages):
            raise UserError(
                f"the judge prompt '{path}' shows no answer: expected {{output_1}}, {{answer_a}} or {{answer}}"
            )
    return {prompt.name: prompt for prompt in prompts}


def _of_fastchat(row: Mapping) -> JudgePrompt:
    # "scores" ([[rating_a,rating_b]]) is not used here, but it is in the same file.
    verdict = {"[[A]]": LETTERS, "[[rating]]": RATING}.get(row["output_format"], "scores")
    text = str(row["prompt_template"])
    messages = (("system", str(row["system_prompt"])), ("user", text))
    return JudgePrompt(str(row["name"]), messages, verdict, "ref_answer" in text, 2 if "question_2" in text else 1)


def _of_arena(settings: Mapping, name: str) -> JudgePrompt:
    texts = settings["prompt_template"]
    texts = [texts] if isinstance(texts, str) else [str(text) for text in texts]
    system = settings.get("system_prompt")
    messages = ([("system", str(system))] if system else []) + [("user", text) for text in texts]
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


def choose_prompt(
    prompts: Mapping[str, JudgePrompt], name: str | None, verdicts: Sequence[str], turns: int, reference: bool
) -> JudgePrompt:
    """The prompt of that name, or the first that fits.

    Args:
        verdicts: the kinds of verdict that are allowed.
        turns: number of turns of the conversation.
        reference: there is a reference answer; a prompt that shows one is then preferred.

    Raises:
        UserError: no prompt fits.
    """
    fitting = {key: prompt for key, prompt in prompts.items() if prompt.verdict in verdicts and prompt.turns == turns}
    if name is not None and name not in prompts:
        raise UserError(f"no judge prompt '{name}'{nearest(name, prompts)}: there are {', '.join(prompts)}")
    if name is not None and turns == 1:
        if name not in fitting:
            raise UserError(f"the judge prompt '{name}' does not fit: expected one of {', '.join(fitting) or 'none'}")
        return fitting[name]
    for wanted in (reference, False):
        for prompt in fitting.values():
            if prompt.reference == wanted:
                return prompt
    kind = "a grade [[rating]]" if RATING in verdicts else "a comparison"
    raise UserError(f"the file of judge prompts has none for {kind} of {turns} turns: there are {', '.join(prompts)}")


def read_preference(prompt: JudgePrompt, reply: Reply) -> tuple[float | None, str | None]:
    """The preference in a reply: 1 for the first answer, 2 for the second, in between by confidence; or None and why.

    TOKENS: `m` is the first and `M` the second; with log-probabilities 1 + P(M) / (P(m) + P(M)), as AlpacaEval's.
    LETTERS: [[A]], [[B]], [[C]] for a tie. OUTPUTS: "Output (a)" at the start of a line. ARENA: [[A>>B]] to [[B>>A]],
    as 1, 1.25, 1.5, 1.75, 2. A text that the length limit cut off has no verdict, but one token is always cut off.
    """
    if reply.failure is not None:
        return None, reply.failure
    if prompt.verdict == TOKENS:
        value, failure = _token_preference(reply)
        return value, CUT if value is None and reply.cut and reply.tokens > 1 else failure
    if reply.cut:
        return None, CUT
    if prompt.verdict == LETTERS:
        return _single_verdict(_verdicts(reply.text, r"[ABC]"), {"A": 1.0, "B": 2.0, "C": 1.5})
    if prompt.verdict == ARENA:
        verdicts = _verdicts(reply.text, _ARENA)
        return _single_verdict({_ARENA_SAME.get(name, name) for name in verdicts}, _ARENA_SCALE)
    verdicts = {match.lower() for match in re.findall(r"(?:^|\n)\s*Output \(([ab])\)", reply.text, re.IGNORECASE)}
    return _single_verdict(verdicts, {"a": 1.0, "b": 2.0})


def arena_verdict(reply: Reply) -> str | None:
    """The verdict of a reply in Arena-Hard's notation; None if there is none, or two."""
    verdicts = set() if reply.failure is not None or reply.cut else _verdicts(reply.text, _ARENA)
    return verdicts.pop() if len(verdicts) == 1 and verdicts <= {*_ARENA_SCALE, *_ARENA_SAME} else None


def _verdicts(text: str, form: str) -> set[str]:
    """The texts in double brackets that have a form; spaces do not count."""
    found = {"".join(verdict.split()) for verdict in _VERDICT.findall(text)}
    return {verdict for verdict in found if re.fullmatch(form, verdict)}


def _single_verdict(verdicts: set[str], meaning: Mapping[str, float]) -> tuple[float | None, str | None]:
    if len(verdicts) > 1:
        return None, "contradictory verdicts"
    known = [meaning[name] for name in verdicts if name in meaning]
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


def read_grade(reply: Reply) -> tuple[float | None, str | None]:
    """The grade from 1 to 10 in a reply, or None and why: `[[7]]`, else "rating: [7]". A citation [1] is no grade."""
    if reply.failure is not None or reply.cut:
        return None, reply.failure or CUT
    for pattern in _GRADES:
        grades = {float(match) for match in pattern.findall(reply.text)}
        if len(grades) > 1:
            return None, "contradictory grades"
        if grades:
            value = grades.pop()
            return (value, None) if 1 <= value <= 10 else (None, "a grade outside 1 to 10")
    return None, "no grade"
