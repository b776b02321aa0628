"""Judges that score every answer: a reward model, or a Python function of the user (for an oracle: oracle_judge.py).

Two answers are compared by their scores. Those of a reward model are logits of a Bradley-Terry model, so the preference
is 1 + σ(reward of the second − reward of the first). Those of a function only order the answers: 1, 1.5 or 2.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepo.data.conversation import read_conversation
from sepo.data.messages import Message
from sepo.errors import UserError, named_error, nearest, one_line

# The turns of a conversation up to the last question (user, assistant, user, ...), the answer to that question and, if
# the first turn is more than a user's text, the JSON text of the messages that it stands for (`Contest.opening`).
Judged = tuple[tuple[str, ...], str] | tuple[tuple[str, ...], str, str]
Scorer = Callable[[Sequence[Judged]], np.ndarray]
# Tokens of a batch, padding included.
TOKENS_AT_ONCE = {"cpu": 4_096, "cuda": 32_768, "mps": 8_192}


def as_messages(conversations: Sequence[Judged]) -> list[tuple[list[Message], str, list[Any]]]:
    """Conversations as messages with roles, their answers, and the schemas of their tools."""
    roles = ("user", "assistant")
    result = []
    for turns, answer, *opening in conversations:
        messages: list[Message] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        tools: list[Any] = []
        if any(opening):
            begun, tools = read_conversation(opening[0])
            messages[:1] = begun
        result.append((messages, answer, tools))
    return result


def user_function(name: str) -> Callable[..., Any]:
    """Import the function MODULE:NAME, also from the current folder.

    Raises:
        UserError: there is no such function, or its module fails.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's code
        raise UserError(f"the judge '{name}' cannot be imported ({named_error(error)}): expected MODULE:NAME") from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(
            f"the module '{module_name}' has no function '{function_name}'{nearest(function_name, callables)}"
        )
    return function


def source_file(name: str) -> Path | None:
    """The source file of a user's function; None if it has none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(user_function(name)))
    except TypeError:
        return None
    return None if file is None else Path(file)


def function_scorer(name: str) -> Scorer:
    """A scorer that calls the user's function once, with all prompts and all responses.

    Raises:
        UserError: the function cannot be found. The scorer raises it if the function fails, or does not return one
            number for each response.
    """
    function = user_function(name)

    def score(conversations: Sequence[Judged]) -> np.ndarray:
        if not conversations:
            return np.zeros(0)
        prompts, responses = ["\n\n".join(turns) for turns, *_ in conversations], [row[1] for row in conversations]
        try:
            values = function(prompts, responses)
        except Exception as error:
            raise UserError(f"the judge '{name}' failed: {named_error(error)}") from error
        try:
            scores = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            scores = np.zeros(())
        if scores.shape != (len(conversations),):
            raise UserError(
                f"the judge '{name}' returned {one_line(repr(values), 60)} for {len(conversations)} responses: "
                "expected one number for each"
            )
        return scores

    return score


def reward_scorer(
    name: str, *, revision: str | None = None, device: str = "auto", dtype: str = "auto", progress: bool = True
) -> Scorer:
    """A scorer that is a sequence-classification model with one output, or two (the second minus the first).

    Conversations are formatted by the tokenizer's chat template; without one, question and answer are a pair of texts.
    They are sorted by length and read in batches with a budget of tokens. A conversation scores NaN if it is longer
    than the model's context or the template refuses it.

    Raises:
        UserError: no such model, pickled weights only, a checkpoint without the weights of its head, or more than two
            outputs.
    """
    return load_reward_model(name, revision, device, dtype, progress)


def load_reward_model(
    name: str, revision: str | None = None, device: str = "auto", dtype: str = "auto", progress: bool = True
) -> _RewardModel:
    """The model of `reward_scorer`."""
    from sepo.judging.classifier import load_classifier
    from sepo.models.devices import choose_device, choose_dtype
    from sepo.models.tokenizer import load_tokenizer

    chosen = choose_device(device)
    folder = _reward_folder(name, revision)
    model: Any = load_classifier(folder, name, dtype=choose_dtype(dtype, chosen))
    model.to(chosen).eval()
    return _RewardModel(model, load_tokenizer(str(folder)), progress)


def _reward_folder(name: str, revision: str | None) -> Path:
    from sepo.models.folders import is_adapter
    from sepo.models.names import resolve_model

    folder = Path(resolve_model(name, revision=revision))
    if is_adapter(folder):
        raise UserError(f"the reward model '{name}' is an adapter: merge it into its base first")
    return folder


class _RewardModel:
    """A sequence-classification model that scores conversations."""

    def __init__(self, model: Any, tokenizer: Any, progress: bool):
        from sepo.models.limits import model_limits

        self.model, self.progress = model, progress
        self.reader = ConversationReader(tokenizer, model_limits(model))
        # A model with a pad token finds the last token of a text by it. A model without one takes the last token of the
        # row, which in a batch would be padding. A token that no text of the batch contains is its pad token then.
        self.pad_token = model.config.get_text_config().pad_token_id

    def __call__(self, conversations: Sequence[Judged]) -> np.ndarray:
        from sepo.bars import progress_bar

        scores = np.full(len(conversations), np.nan)
        batches = list(self.reader.batches(conversations, self.model.device.type))
        with progress_bar(self.progress, total=sum(len(places) for places, _ in batches), desc="judge") as bar:
            for places, rows in batches:
                scores[places] = self.read_batch(rows)
                bar.update(len(places))
        return scores

    def read_batch(self, rows: list[list[int]]) -> np.ndarray:
        """The score of each row of token ids: `[rows]` float64."""
        import torch

        with torch.inference_mode():
            return self._read(rows)

    def _read(self, rows: list[list[int]]) -> np.ndarray:
        import torch

        used = {token for row in rows for token in row}
        pad = self.pad_token if self.pad_token is not None else next(i for i in range(len(used) + 1) if i not in used)
        self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = pad
        ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu().numpy()
        logits = logits.astype(np.float64)  # here: some devices (MPS) have no float64
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


class ConversationReader:
    """Conversations as batches of token ids for a reward model.

    Args:
        tokenizer: of the model.
        limits: the ids and positions that it can read.
    """

    def __init__(self, tokenizer: Any, limits: Any):
        self.tokenizer, self.limits = tokenizer, limits

    @classmethod
    def of_model(cls, name: str, revision: str | None) -> ConversationReader:
        """The reader of a model that need not be in memory."""
        from sepo.models.limits import model_limits
        from sepo.models.names import load_config
        from sepo.models.tokenizer import load_tokenizer

        folder = _reward_folder(name, revision)
        return cls(load_tokenizer(str(folder)), model_limits(load_config(str(folder))))

    def batches(self, conversations: Sequence[Judged], device: str) -> Iterator[tuple[list[int], list[list[int]]]]:
        """The places of the conversations of a batch, and their ids; those that the model cannot read are left out."""
        encoded = {i: ids for i, ids in enumerate(self._encode(conversations)) if self._fits(ids)}
        waiting = sorted(encoded, key=lambda i: -len(encoded[i]))
        budget = TOKENS_AT_ONCE.get(device, 4096)
        while waiting:
            number = max(1, budget // len(encoded[waiting[0]]))
            places, waiting = waiting[:number], waiting[number:]
            yield places, [encoded[i] for i in places]

    def _encode(self, conversations: Sequence[Judged]) -> list[list[int]]:
        """The ids of each conversation; none where the template refuses it."""
        from sepo.judging.prompts import encode_answers

        if not conversations:
            return []
        if self.tokenizer.chat_template is not None:
            encoded = encode_answers(as_messages(conversations), self.tokenizer)
            return [[] if isinstance(row, str) else [*row[0], *row[1]] for row in encoded]
        texts = [("\n\n".join(turns), answer) for turns, answer, *_ in conversations]
        # A control token in an answer is text: it is split into characters.
        return [
            self.tokenizer(asked, answer, split_special_tokens=True)["input_ids"] if _is_unicode(asked + answer) else []
            for asked, answer in texts
        ]

    def _fits(self, ids: list[int]) -> bool:
        longest = self.limits.positions or len(ids)
        return bool(ids) and max(ids) < self.limits.vocabulary and len(ids) <= longest


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded. JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
