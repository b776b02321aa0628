"""Conversations outside of a preference dataset -> token ids: prompts to answer, and answers to judge.

As in `encoding.py`, the chat template renders the conversations and control tokens typed in a text stay text. So an
answer cannot end its own turn and begin another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sepo.data.encoding import Encoder, make_encoder
from sepo.data.messages import DropRow, check_text, leaves
from sepo.data.rows import TextPair
from sepo.errors import UserError

Turns = Sequence[Mapping[str, Any]]


def encode_prompts(
    conversations: Sequence[Turns], tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Ids of conversations that end with a user's turn, including the generation prompt.

    Without a chat template the texts are joined with an empty line.

    Raises:
        UserError: the chat template rejects a conversation, or a text tokenises into control tokens.
    """
    encoder = make_encoder(tokenizer, dict(chat_template_kwargs or {}))
    prompts = []
    for number, messages in enumerate(conversations, 1):
        try:
            prompts.append(_prompt(encoder, messages))
        except DropRow as drop:
            raise UserError(f"prompt {number} cannot be asked: {drop.reason} {drop.detail}".rstrip()) from None
    return prompts


def _prompt(encoder: Encoder, messages: Turns) -> list[int]:
    _check_texts(messages)
    if encoder.writer is None:
        text = encoder.guard("\n\n".join(message["content"] for message in messages))
    else:
        pair = TextPair([dict(message) for message in messages], "a", "b")
        text = encoder.writer.opening(pair)
    (ids,) = encoder.encode([text])
    encoder.check_control_ids(ids, text)
    return ids if encoder.writer is not None else encoder.plain_prompt(ids)


def _check_texts(value: Any) -> None:
    """Raise DropRow for a text that cannot be encoded: half of a surrogate pair, which JSON can hold."""
    for text in leaves(value):
        check_text(text)


def encode_answers(
    conversations: Sequence[tuple[Turns, str, Sequence[Any]]],
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> list[tuple[list[int], list[int]] | str]:
    """Ids of the prompt and the answer of each conversation, as in a table of pairs; or the reason of a failure.

    Without a chat template the texts are joined as in `encode_prompts`.

    Args:
        conversations: messages before the answer, the answer, and schemas of tools.
        plain: join the texts though there is a chat template.
    """
    encoder = make_encoder(tokenizer, dict(chat_template_kwargs or {}))
    as_text = plain or encoder.writer is None
    results: list[tuple[list[int], list[int]] | str] = []
    for messages, answer, tools in conversations:
        turns = [dict(message) for message in messages]
        text = "\n\n".join(turn["content"] for turn in turns)
        pair = TextPair(text if as_text else turns, answer, answer, tools=tuple(tools))
        try:
            _check_texts([*messages, answer])
            item = encoder.item(pair, [])
            ids = encoder.encode([item.prompt, item.prompt + item.chosen])
            prompt, response, _ = encoder.ids_of(item, ids[0], ids[1], ids[1])
            results.append((prompt, response))
        except DropRow as drop:
            results.append(drop.reason)
    return results
