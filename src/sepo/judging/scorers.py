"""Judges that give every answer a number: a reward model, or a function of the user's (an oracle: oracle.py).

Two answers are compared by their numbers. A reward model's are logits of a Bradley-Terry model, so the preference is
1 + σ(reward of the second − reward of the first); a function's only order the answers: 1, 1.5 or 2.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepo.errors import UserError, named_error, nearest, one_line

# A conversation up to the last question, as texts in turn (user, assistant, user, ...), and the answer to it.
Conversation = tuple[tuple[str, ...], str]
Scorer = Callable[[Sequence[Conversation]], np.ndarray]
# Tokens of a batch, padding included.
TOKENS_AT_ONCE = {"cpu": 4_096, "cuda": 32_768, "mps": 8_192}


def as_messages(conversations: Sequence[Conversation]) -> list[tuple[list[dict[str, str]], str]]:
    """Conversations with the role of each turn, and their answers."""
    roles = ("user", "assistant")
    return [
        ([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], answer)
        for turns, answer in conversations
    ]


def user_function(name: str) -> Callable[..., Any]:
    """The function MODULE:NAME; modules of the folder that the command is run in are found too.

    Raises:
        UserError: there is none, or its module fails.
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
    """The file that a function of the user's is written in; None if it has none."""
    try:
        found = inspect.getsourcefile(inspect.unwrap(user_function(name)))
    except TypeError:
        return None
    return None if found is None else Path(found)


def function_scorer(name: str) -> Scorer:
    """Scores by the user's function, called once with all prompts and all responses.

    Raises:
        UserError: it cannot be found; and when called: it fails, or returns no number for each response.
    """
    function = user_function(name)

    def score(conversations: Sequence[Conversation]) -> np.ndarray:
        if not conversations:
            return np.zeros(0)
        prompts, responses = ["\n\n".join(turns) for turns, _ in conversations], [answer for _, answer in conversations]
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
    """Scores by a sequence-classification model with one output, or two (then the second minus the first).

    Conversations are written with the tokenizer's chat template; without one, question and answer are a pair of texts.
    They are sorted by length and read in batches of a token budget. One that is longer than the model reads, or that
    the template does not write, has NaN.

    Raises:
        UserError: no such model, pickled only, a checkpoint without the weights of its head, more than two outputs.
    """
    import torch

    from sepo.bars import progress_bar
    from sepo.data.prompts import encode_answers
    from sepo.models.checkpoint import load_classifier
    from sepo.models.devices import choose_device, choose_dtype
    from sepo.models.folders import check_folder, is_adapter
    from sepo.models.limits import model_limits
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer

    chosen = choose_device(device)
    folder = Path(resolve_model(name, revision=revision))
    check_folder(folder)
    if is_adapter(folder):
        raise UserError(f"the reward model '{name}' is an adapter: merge it into its base first")
    model: Any = load_classifier(folder, name, dtype=choose_dtype(dtype, chosen))
    model.to(chosen).eval()
    tokenizer: Any = load_tokenizer(str(folder))
    limits = model_limits(model)
    # A model that names its pad token finds the last token of a text by it. One that names none takes the last of the
    # row, which in a batch would be padding: a token that no text of the batch holds stands in for it.
    named = model.config.get_text_config().pad_token_id

    def encode(conversations: Sequence[Conversation]) -> list[list[int] | str]:
        if tokenizer.chat_template is not None:
            encoded = encode_answers(as_messages(conversations), tokenizer)
            return [one if isinstance(one, str) else [*one[0], *one[1]] for one in encoded]
        texts = [("\n\n".join(turns), answer) for turns, answer in conversations]
        # Control tokens that an answer holds as text are split into characters.
        return [tokenizer(one, other, split_special_tokens=True)["input_ids"] for one, other in texts]

    def read(rows: list[list[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        used = {token for row in rows for token in row}
        pad = named if named is not None else next(i for i in range(len(used) + 1) if i not in used)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = model(input_ids=ids.to(chosen), attention_mask=mask.to(chosen)).logits.double().cpu().numpy()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def score(conversations: Sequence[Conversation]) -> np.ndarray:
        scores = np.full(len(conversations), np.nan)
        encoded = encode(conversations) if conversations else []
        fits = [
            i for i, ids in enumerate(encoded)
            if not isinstance(ids, str) and ids
            and max(ids) < limits.vocabulary and len(ids) <= (limits.positions or len(ids))
        ]  # fmt: skip
        fits.sort(key=lambda i: -len(encoded[i]))
        budget, start = TOKENS_AT_ONCE.get(chosen.type, 4096), 0
        with torch.inference_mode(), progress_bar(progress, total=len(fits), desc="judge") as bar:
            while start < len(fits):
                number = max(1, budget // len(encoded[fits[start]]))
                batch = fits[start : start + number]
                scores[batch] = read([encoded[i] for i in batch])  # type: ignore[misc]
                start += len(batch)
                bar.update(len(batch))
        return scores

    return score
