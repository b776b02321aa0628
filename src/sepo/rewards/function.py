"""`token_rewards`: the reward of every token of some responses, from Python."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from peft import PeftModel
from torch import nn

from sepo.credit.rewards import pair_rewards
from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.ragged import flat, ragged
from sepo.data.tables import provenance_of
from sepo.data.vocabulary import load_vocabulary, token_bytes
from sepo.errors import UserError, wrong_type
from sepo.forward.scoring import dataset_logps, numerics
from sepo.models.adapters import causal_lm
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.report.token_texts import MARK_OFF, MARK_ON, TokenTexts, visible
from sepo.rewards.answers import tokenize_answers
from sepo.transfer.alignment import Texts, align, response_texts
from sepo.transfer.carry import allocate_rewards, check_allocation, join_cuts

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages
_END = 0xFF  # in `alignment.Texts`: the token that ends a response
NO_REFERENCE = "the reference is missing: name the model that the oracle was trained from"


@dataclass(frozen=True)
class TokenRewards:
    """The rewards of one response.

    Attributes:
        response: the text that was given.
        ids: token ids `[tokens]`, with the token that ends the response.
        texts: what each token adds to the response `[tokens]`. A token that holds part of a character adds it with the
            last of its tokens.
        offsets: begin and end of each token in the UTF-8 bytes of `response` `[tokens]`. The token that ends the
            response has no width. None where the chat template or the tokenizer changed the text beyond recognition.
        rewards: s = log π_oracle − log π_reference of each token, in nats, `[tokens]` float32.
    """

    response: str
    ids: list[int]
    texts: list[str]
    offsets: list[tuple[int, int]] | None
    rewards: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total(self) -> float:
        """Sum of the rewards; times β the DPO reward of the response, up to a term of the prompt alone."""
        return float(self.rewards.sum(dtype=np.float64))

    def _repr_html_(self) -> str:
        """The tokens coloured by reward, for a notebook: blue above 0, orange below, the palest colour at 0."""
        largest = float(np.abs(self.rewards).max(initial=0.0)) or 1.0
        spans = []
        for text, reward in zip(self.texts, self.rewards.tolist(), strict=True):
            colour = "29,92,168" if reward > 0 else "179,84,30"
            style = f"background:rgba({colour},{0.6 * abs(reward) / largest:.2f});white-space:pre-wrap"
            spans.append(f'<span style="{style}" title="{reward:+.3f}">{html.escape(visible(text))}</span>')
        return "".join(spans).translate({ord(MARK_ON): None, ord(MARK_OFF): None})


@dataclass(frozen=True)
class Scorers:
    """An oracle and its reference in memory, with their tokenizer; `reference` None: the oracle without its adapter."""

    oracle: nn.Module
    reference: nn.Module | None
    tokenizer: Any

    def scores(self, pairs: pa.Table, tokens_per_row: int | None = None) -> pa.Table:
        """A table of kind "scores": each prompt is read once for all of its responses."""
        return pair_rewards(pairs, *self.logps(pairs, tokens_per_row))

    def logps(self, pairs: pa.Table, tokens_per_row: int | None = None) -> tuple[pa.Table, pa.Table]:
        """Tables of kind "logps": log-probabilities under the oracle and under the reference."""
        after = dataset_logps(self.oracle, pairs, tokens_per_row=tokens_per_row)
        alone = self.oracle.disable_adapter() if self.reference is None else nullcontext()  # type: ignore[operator]
        with alone:
            before = dataset_logps(self.reference or self.oracle, pairs, tokens_per_row=tokens_per_row)
        return after, before


def load_scorers(oracle: Any, reference: Any = None, *, oracle_tokenizer: Any = None, device: str = "auto") -> Scorers:
    """Load what was given by name, and check that both models read alike.

    Args:
        oracle, reference: models in memory, or names; weights loaded here are float32, or as those of the other model.
            Without a reference, the oracle is an adapter and its base the reference.
        oracle_tokenizer: tokenizer of both models; by default that of the oracle's name.

    Raises:
        UserError: no such model; both are the same model; they have different tokenizers, or weights of different
            types or on different devices.
    """
    given = [model for model in (oracle, reference) if isinstance(model, nn.Module)]
    dtype = numerics(given[0])["dtype"] if given else "float32"
    if given and device == "auto":
        device = str(next(given[0].parameters()).device)
    tokenizer = oracle_tokenizer or _tokenizer_of(oracle)
    if reference is not None and not isinstance(reference, nn.Module) and oracle_tokenizer is None:
        check_same_tokenizer("the oracle", tokenizer, "the reference", load_tokenizer(reference))
    loaded = [
        _loaded(name, model, str(dtype), device) for name, model in (("oracle", oracle), ("reference", reference))
    ]
    after, before = loaded
    assert after is not None
    if before is None and not isinstance(after, PeftModel):
        raise UserError(NO_REFERENCE)
    if before is after or (isinstance(oracle, str | os.PathLike) and str(oracle) == str(reference)):
        raise UserError("oracle and reference are the same model: every reward would be 0")
    if before is not None and (here := numerics(after)) != (there := numerics(before)):
        differ = next(name for name in here if here[name] != there[name])
        raise UserError(
            f"the oracle's {differ} is {here[differ]}, the reference's {there[differ]}: token rewards are small "
            "differences, so both models must read alike"
        )
    return Scorers(after, before, tokenizer)


def _loaded(name: str, model: Any, dtype: str, device: str) -> nn.Module | None:
    if model is None and name == "reference":
        return None
    if isinstance(model, str | os.PathLike):
        return load_model(model, dtype=dtype, device=device)
    if not isinstance(model, nn.Module):
        raise wrong_type(f"the {name}", model, "a name, a folder or a causal language model in memory")
    causal_lm(model)
    return model


def _tokenizer_of(oracle: Any) -> Any:
    name = causal_lm(oracle).config.name_or_path if isinstance(oracle, nn.Module) else oracle
    if not isinstance(name, str | os.PathLike):
        raise wrong_type("the oracle", oracle, "a name, a folder or a causal language model in memory")
    if not name:
        raise UserError("the oracle has no name to find its tokenizer by: pass oracle_tokenizer")
    return load_tokenizer(name)


def token_rewards(
    oracle: Any,
    reference: Any,
    prompt: Prompt | Sequence[Prompt],
    responses: Sequence[str] | Sequence[Sequence[str]],
    *,
    tokenizer: Any = None,
    allocation: str = "bytes",
    oracle_tokenizer: Any = None,
    as_chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str = "auto",
    tokens_per_row: int | None = None,
) -> list[TokenRewards] | list[list[TokenRewards]]:
    """The reward s = log π_oracle − log π_reference of every token of some responses.

    Prompts and responses are formatted like training pairs. Each prompt is read once for all of its responses, all
    prompts go through the models in packed rows, and both models read the same rows in the same types.

    Args:
        oracle: a model trained with DPO: a name that `load_model` takes, or a model in memory.
        reference: the model that it was trained from. None: the oracle is a LoRA adapter, and its base the reference.
        prompt: a text, or the messages before the response; or a list of prompts. A text stays plain text.
        responses: the texts of one prompt's responses; for a list of prompts, a list for each.
        tokenizer: another tokenizer, whose tokens the rewards are carried over to (`sepo.transfer`).
        allocation: how a reward that several of its tokens share is divided: bytes, group or first.
        oracle_tokenizer: tokenizer of both models, where they are in memory and have no name.
        as_chat: wrap a prompt that is a text as one user turn.
        chat_template_kwargs: keywords for the chat template.
        device: of models that are loaded here.
        tokens_per_row: token budget of a packed row; bounds the memory.

    Returns:
        for each response its `TokenRewards`; for a list of prompts, a list of them for each.

    Raises:
        UserError: a model or a text cannot be read, both models are the same, or a response's text cannot be found
            again in the tokens of `tokenizer`.

    Example:
        >>> first, second = token_rewards("oracle", "base", "2 + 2 =", [" 4", " 5"])  # doctest: +SKIP
        >>> list(zip(first.texts, first.rewards))  # doctest: +SKIP
        [(' 4', 1.25), ('</s>', 0.03)]
    """
    many, prompts, groups = _by_prompt(prompt, responses)
    check_allocation(allocation)
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        tokenizer = load_tokenizer(tokenizer)
    scorers = load_scorers(oracle, reference, oracle_tokenizer=oracle_tokenizer, device=device)
    if not (rows := _rows(prompts, groups)):
        return [[] for _ in groups] if many else []  # type: ignore[return-value]
    options = {"as_chat": as_chat, "chat_template_kwargs": chat_template_kwargs}
    scores = scorers.scores(_tokenized(rows, scorers.tokenizer, options), tokens_per_row)
    if tokenizer is not None:
        scores = _carried(scores, _tokenized(rows, tokenizer, options), scorers.tokenizer, tokenizer, allocation)
    target = scorers.tokenizer if tokenizer is None else tokenizer
    results = iter(_results(scores, target, [response for group in groups for response in group]))
    return [[next(results) for _ in group] for group in groups] if many else list(results)


def _by_prompt(prompt: Any, responses: Any) -> tuple[bool, list[Any], list[Any]]:
    """Whether there is a list of prompts; the prompts, and the responses of each."""
    many = isinstance(prompt, Sequence) and not isinstance(prompt, str) and not _is_messages(prompt)
    prompts, groups = (list(prompt), list(responses)) if many else ([prompt], [responses])
    _check_texts(prompts, groups)
    return many, prompts, groups


def _rows(prompts: Sequence[Any], groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {"row": number, "answer": answer, "prompt": text, "chosen": response}
        for number, (text, group) in enumerate(zip(prompts, groups, strict=True))
        for answer, response in enumerate(group)
    ]


def _is_messages(prompt: Sequence[Any]) -> bool:
    return bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _check_texts(prompts: Sequence[Any], groups: Sequence[Any]) -> None:
    if len(prompts) != len(groups):
        raise UserError(f"there are {len(prompts)} prompts and {len(groups)} lists of responses: expected one for each")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, Sequence) and _is_messages(prompt)):
            raise wrong_type("prompt", prompt, "a text, a list of messages, or a list of those")
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Sequence) or not all(isinstance(r, str) for r in group):
            raise wrong_type("responses", group, "a list of texts for each prompt")


def _tokenized(rows: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any]) -> pa.Table:
    table, report = tokenize_answers(rows, tokenizer, **options)
    if report.dropped:
        first = min(report.first_dropped.values())
        reason = next(reason for reason, row in report.first_dropped.items() if row == first)
        detail = next(iter(report.details.get(reason, {})), "")
        where = rows[first]
        raise UserError(
            f"response {where['answer'] + 1} of prompt {where['row'] + 1} cannot be scored: {reason}"
            + (f" ({detail})" if detail else "")
        )
    return table


def _carried(scores: pa.Table, target: pa.Table, source: Any, tokenizer: Any, allocation: str) -> pa.Table:
    """`target` with the rewards of `scores`, whose tokens are those of the tokenizer `source`."""
    ids_a, lengths_a = flat(scores.column("chosen_ids"))
    ids_b, lengths_b = flat(target.column("chosen_ids"))
    aligned = align(
        response_texts(ids_a, lengths_a, token_bytes(source, "the oracle"), provenance_of(scores)["end_ids"]),
        response_texts(ids_b, lengths_b, token_bytes(tokenizer, "the caller"), provenance_of(target)["end_ids"]),
    )
    bad = np.flatnonzero((aligned.form < 0) | (aligned.scored < lengths_b))
    if len(bad):
        raise UserError(
            f"response {target.column('answer')[int(bad[0])].as_py() + 1} of prompt "
            f"{target.column('row')[int(bad[0])].as_py() + 1} is another text under `tokenizer`, or holds a token "
            "without known bytes: its rewards cannot be carried over"
        )
    cuts = join_cuts(aligned.ends_a, lengths_a, aligned.ends_b, lengths_b)
    rewards = flat(scores.column("chosen_rewards"))[0]
    moved, _ = allocate_rewards(rewards, lengths_a, cuts, len(ids_b), allocation)
    return target.append_column("chosen_rewards", ragged(moved.astype(np.float32), lengths_b))


def _results(scores: pa.Table, tokenizer: Any, responses: Sequence[str]) -> list[TokenRewards]:
    ids, lengths = flat(scores.column("chosen_ids"))
    rewards = flat(scores.column("chosen_rewards"))[0]
    texts = TokenTexts(load_vocabulary(tokenizer))
    numbers = texts.encode(ids, lengths)
    offsets = token_offsets(ids, lengths, tokenizer, provenance_of(scores)["end_ids"], responses)
    results, end = [], 0
    for response, size, places in zip(responses, lengths.tolist(), offsets, strict=True):
        part = slice(end, end + size)
        end += size
        shown = [texts.texts[number].text for number in numbers[part].tolist()]
        results.append(TokenRewards(response, ids[part].tolist(), shown, places, rewards[part].copy()))
    return results


def token_offsets(
    ids: np.ndarray, lengths: np.ndarray, tokenizer: Any, end_ids: list[int], responses: Sequence[str]
) -> list[list[tuple[int, int]] | None]:
    """Begin and end of each token in the UTF-8 bytes of its response; None for a response that the tokens do not hold.

    The tokens may hold the text in another form: trimmed, normalised, without accents (`alignment.FORMS`).
    """
    of_tokens = response_texts(ids, lengths, token_bytes(tokenizer, "the model"), end_ids)
    last = np.cumsum(lengths) - 1
    bytes_of = np.cumsum(of_tokens.tokens)[last] - 1  # the last byte of each response
    ended = of_tokens.data[bytes_of] == _END
    encoded = [text.encode() + bytes([_END]) * bool(end) for text, end in zip(responses, ended, strict=True)]
    sizes = np.array([len(text) for text in encoded], np.int64)
    data = np.frombuffer(b"".join(encoded), np.uint8)
    of_bytes = Texts(data, np.ones(len(data), np.int64), sizes, np.ones(len(sizes), bool))
    aligned = align(of_tokens, of_bytes)
    results: list[list[tuple[int, int]] | None] = []
    for row, (size, stop) in enumerate(zip(sizes.tolist(), np.cumsum(sizes).tolist(), strict=True)):
        if aligned.form[row] < 0:
            results.append(None)
            continue
        ends = aligned.ends_a[last[row] + 1 - lengths[row] : last[row] + 1]
        places = np.searchsorted(aligned.ends_b[stop - size : stop], ends, side="right")
        places = np.minimum(places, len(responses[row].encode())).tolist()
        results.append(list(zip([0, *places[:-1]], places, strict=True)))
    return results
