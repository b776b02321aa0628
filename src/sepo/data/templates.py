"""What a chat template writes around a response, found out by rendering probes: one rule for what ends a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sepo.errors import UserError, one_line


def any_of(strings: Iterable[str]) -> re.Pattern:
    """A pattern that matches any of these strings, the longest first; without strings it matches nothing."""
    longest_first = sorted({s for s in strings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) never matches


@dataclass(frozen=True)
class Template:
    """What a chat template writes around the messages it is given.

    Attributes:
        control: matches every control token: the special ones, and those that the template writes around a turn.
        turn_end: what it writes after a response.
        kept_end: the part of it that a model generates: up to the token that ends the turn.
        end_token: that token; None if the template closes a turn with none.
        trims: it strips white space around the response.
    """

    control: re.Pattern
    turn_end: str
    kept_end: str
    end_token: str | None
    trims: bool


def control_tokens(tokenizer: Any, around: str = "") -> re.Pattern:
    """Match the special tokens of a tokenizer, and the added ones that `around` (what a template writes) holds."""
    return any_of(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in around and not token.content.isspace())
    )


def probe_template(tokenizer: Any) -> Template | None:
    """Find out what the tokenizer's chat template writes, by rendering two probes; None if it has no template.

    Raises:
        UserError: the template cannot render a user and an assistant turn, or leaves their content out.
    """
    if not tokenizer.chat_template:
        return None
    question, answer = "Sepo probe question", "Sepo probe answer"
    user = {"role": "user", "content": question}

    def render(*messages: dict[str, str], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    try:
        prompt = render(user, add_generation_prompt=True)
        full = render(user, {"role": "assistant", "content": answer})
        spaced = render(user, {"role": "assistant", "content": f"  {answer}  "})
    except Exception as error:  # the template is foreign code
        raise UserError(
            f"the tokenizer's chat template cannot render a user and an assistant turn ({one_line(error)}): "
            "use another model, or repair the template"
        ) from error
    if question not in prompt or answer not in full:
        raise UserError(
            "the tokenizer's chat template does not write the messages it is given: expected the content of "
            "the user and the assistant turn in its output; repair the template"
        )
    # Added tokens that are not declared special are structure nevertheless if the template writes them.
    control = control_tokens(tokenizer, prompt.replace(question, "\0"))
    turn_end = full[full.rindex(answer) + len(answer) :]
    end = control.search(turn_end)
    return Template(
        control=control,
        turn_end=turn_end,
        kept_end=turn_end[: end.end()] if end else turn_end.rstrip(),
        end_token=end[0] if end else None,
        trims=f"  {answer}  " not in spaced,
    )


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that the chat template closes a response with, if it does."""
    try:
        template = probe_template(tokenizer)
    except UserError:
        return None
    if template is None or template.end_token is None:
        return None
    return tokenizer.convert_tokens_to_ids(template.end_token)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a response: the model's, the tokenizer's and the chat template's, ascending.

    The chat template matters because many checkpoints name only the end of text as their end-of-sequence token while
    their template closes a turn with another one.
    """
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = end_of_turn_id(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return sorted(found)
