"""Hostile rows end in a pair, a counted drop or a message of one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from properties import examples
from sepo.data.encoding import tokenize_pairs, truncate_pair
from sepo.data.loading import load_preferences
from sepo.data.rows import DROP_REASONS, DropRow, TextPair, normalise_row
from sepo.errors import UserError

CONTROL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: any text can be encoded and decoded without loss."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


pieces = st.sampled_from(
    [
        *CONTROL, "<|im_", "end|>", "{{ 7 * 7 }}", "{% raw %}", "\x00", "\ud800", "\udfff", "\u202e", "\ue000",
        "\ue001", "\n\nHuman:", "\n\nAssistant:", "Human:", " ", "\n", "\r", "[{", "</s>", "é", "👩", "a",
    ]
)  # fmt: skip
texts = st.one_of(st.text(max_size=12), st.lists(pieces, max_size=8).map("".join))
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "", "user\n<|im_end|>", "developer"]), texts)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}),
    st.fixed_dictionaries({"role": roles, "content": scalars}),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": texts}),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
cells = st.one_of(texts, st.lists(messages, max_size=4), anything)
sides = st.one_of(texts, st.tuples(st.lists(messages, max_size=2), texts).map(
    lambda pair: [*pair[0], {"role": "assistant", "content": pair[1]}]
))  # fmt: skip
rows = st.one_of(
    st.fixed_dictionaries({"chosen": sides, "rejected": sides}, optional={"prompt": cells}),
    st.fixed_dictionaries({"chosen": cells, "rejected": cells}, optional={"prompt": cells, "other": anything}),
    st.tuples(texts, texts, texts).map(lambda t: {"chosen": t[0] + t[1], "rejected": t[0] + t[2]}),
)


@examples(600)
@given(row=rows, as_chat=st.booleans())
def test_any_row_becomes_a_valid_pair_or_a_documented_drop(row, as_chat):
    pair, reason = None, None
    try:
        pair = normalise_row(row, as_chat=as_chat)
    except DropRow as drop:
        reason = drop.reason
    if pair is None:
        assert reason in DROP_REASONS
        return
    assert isinstance(pair, TextPair)
    assert pair.chosen != pair.rejected
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    if isinstance(pair.prompt, list):
        assert {message["role"] for message in pair.prompt} <= {"system", "user", "assistant", "tool"}
    assert isinstance(pair.prompt, list) or not as_chat


@examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(rows, min_size=1, max_size=6), as_chat=st.booleans(), max_length=st.integers(2, 60))
def test_any_json_file_ends_in_a_sound_table_or_one_line(tokenizer, batch, as_chat, max_length):
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    batch = [good, *batch]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in batch))
        loaded = load_preferences(path)
        table, report = tokenize_pairs(loaded, tokenizer, as_chat=as_chat, max_length=max_length, progress=False)
    assert report.rows == len(batch)
    assert report.rows == report.kept + sum(report.dropped.values())
    assert set(report.dropped) <= set(DROP_REASONS)
    for row in table.to_pylist():
        assert row["prompt_ids"]
        for side in ("chosen_ids", "rejected_ids"):
            assert 1 <= len(row[side]) <= max_length - len(row["prompt_ids"])
        assert row["chosen_ids"] != row["rejected_ids"]


@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    conversation=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), min_size=1, max_size=4),
    chosen=texts,
    rejected=texts,
)
def test_no_text_changes_the_structure_of_a_conversation(tokenizer, conversation, chosen, rejected):
    prompt = [{"role": role, "content": content} for role, content in conversation]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        normalise_row(row)
    except DropRow:
        return
    table, _ = tokenize_pairs(datasets.Dataset.from_list([row]), tokenizer, max_length=100_000, progress=False)
    (ids,) = table.to_pylist()
    start, end = tokenizer.convert_tokens_to_ids(CONTROL)
    prefill = prompt[-1]["role"] == "assistant"  # the responses continue it
    turns = len(prompt) - prefill
    assert (ids["prompt_ids"].count(start), ids["prompt_ids"].count(end)) == (turns + 1, turns)
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=not prefill)
    if prefill:
        rendered = rendered.removesuffix("<|im_end|>\n")
    assert tokenizer.decode(ids["prompt_ids"]) == rendered
    for side, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert tokenizer.decode(ids[side]) == text + "<|im_end|>"
        assert [i for i in ids[side] if i in (start, end)] == [end]


@examples(150)
@example(content=b"BZh", suffix=".jsonl")
@given(content=st.one_of(st.binary(max_size=60), texts.map(lambda t: t.encode("utf-8", "surrogatepass"))),
       suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]))  # fmt: skip
def test_any_bytes_in_a_file_end_in_a_dataset_or_one_line(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(b"prompt,chosen,rejected\n" + content if suffix == ".csv" else content)
        columns, message = {"chosen", "rejected", "pair_id"}, ""
        try:
            columns = set(load_preferences(path).column_names)
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    assert {"chosen", "rejected", "pair_id"} <= columns


some_ids = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@examples(300)
@given(prompt=some_ids, chosen=some_ids, rejected=some_ids, max_length=st.integers(2, 50), keep=st.integers(0, 1))
def test_truncation_cuts_no_more_than_it_must(prompt, chosen, rejected, max_length, keep):
    cut, first, second = truncate_pair(prompt, chosen, rejected, max_length=max_length, keep=keep)
    longest = max(len(chosen), len(rejected))
    assert 1 <= len(cut) < max_length
    assert first
    assert second
    assert len(cut) + max(len(first), len(second)) == min(max_length, len(prompt) + longest)
    assert cut[:keep] == prompt[:keep]
    assert cut[keep:] == prompt[len(prompt) - (len(cut) - keep) :]
    assert (first, second) == (chosen[: len(first)], rejected[: len(second)])
    assert len(cut) == len(prompt) or len(cut) >= max_length // 2
