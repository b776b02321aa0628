"""Prompts to sample answers to: from a file, from the embedded tasks, or from tokenised pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sepo.data.conversation import Conversation, conversations_of, in_words
from sepo.data.messages import Message
from sepo.errors import UserError
from sepo.files import digest
from sepo.judging.judgements import read_rows
from sepo.judging.questions import find_questions, read_question
from sepo.processes import log
from sepo.stages.data import embedded_data


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        messages: the conversation up to the answer.
        plain: the model reads the prompt as a text, without a chat template.
        ids: token ids, where they are known.
    """

    messages: tuple[Message, ...]
    plain: bool = False
    ids: tuple[int, ...] | None = None

    @property
    def words(self) -> str:
        """The prompt as one text, as gold rewards and tables read it."""
        return in_words(self.messages)

    def key(self) -> list[Any]:
        """What identifies the prompt, as a JSON-like value."""
        return [list(self.messages), list(self.ids or ())]


def read_prompts(name: str, split: str = "train") -> list[Prompt]:
    """The prompts of a file in any format of `sepo generate --prompts`, of preference data, or of an embedded task.

    Each prompt counts once. Questions of several turns are left out and counted.

    Args:
        split: of an embedded task.

    Raises:
        UserError: there is no such file, or a row holds no prompt.
    """
    embedded = name.startswith("embedded:")
    path = embedded_data(name) if embedded else find_questions(name)[0]
    prompts: dict[str, Prompt] = {}
    several = repeated = 0
    for number, row in enumerate(read_rows(path), 1):
        if embedded and row["split"] != split:
            continue
        question, _ = read_question(Path(name), row, number)
        if len(question.turns) > 1:
            several += 1
            continue
        prompt = Prompt((*question.context, {"role": "user", "content": question.turns[0]}))
        key = digest(prompt.key())
        repeated += key in prompts
        prompts.setdefault(key, prompt)
    if several:
        log(f"  {several:,} questions have several turns: left out")
    if repeated:
        log(f"  {repeated:,} rows repeat a prompt: sampled once")
    if not prompts:
        raise UserError(f"'{name}' holds no prompt to sample answers to")
    return list(prompts.values())


def prompts_of_pairs(pairs: pa.Table, plain: Sequence[bool]) -> list[Prompt]:
    """The distinct prompts of a table of pairs, in the order of their first rows. Prompts with tools are left out.

    Args:
        plain: whether the prompt of each row is a text that no chat template renders.
    """
    prompts: dict[tuple[int, ...], Prompt | None] = {}
    rows = zip(pairs.column("prompt_ids").to_pylist(), conversations_of(pairs), plain, strict=True)
    for ids, conversation, is_plain in rows:
        prompts.setdefault(tuple(ids), _without_tools(conversation, is_plain, tuple(ids)))
    kept = [prompt for prompt in prompts.values() if prompt is not None]
    if len(kept) < len(prompts):
        log(f"  {len(prompts) - len(kept):,} prompts with tools: left out")
    return kept


def _without_tools(conversation: Conversation, plain: bool, ids: tuple[int, ...]) -> Prompt | None:
    """A prompt, unless its conversation has tools or further fields, which no sampled pair can hold."""
    if conversation.tools or any(set(message) - {"role", "content"} for message in conversation.messages):
        return None
    messages = tuple(conversation.messages)
    return Prompt(messages, plain and [message["role"] for message in messages] == ["user"], ids)


def some_prompts(
    prompts: Sequence[Prompt], *, limit: int | None = None, part: tuple[int, int] | None = None, seed: int = 0
) -> list[Prompt]:
    """Part i of n (by a hash of the seed and the prompt), and of that the first `limit` prompts; the order stays."""
    if part is not None:
        number, count = part

        def place(prompt: Prompt) -> str:
            return hashlib.sha256(f"{seed} {digest(list(prompt.messages))}".encode()).hexdigest()

        order = sorted(range(len(prompts)), key=lambda i: place(prompts[i]))
        prompts = [prompts[i] for i in sorted(order[number - 1 :: count])]
    return list(prompts[:limit])
