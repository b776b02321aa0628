"""Previews of prompts."""

from __future__ import annotations

import pytest
from transformers import AddedToken

from sepo.data.previews import previews
from sepo.models.tokenizer import load_tokenizer
from tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_dir):
    return load_tokenizer(smollm2_dir)


def test_what_all_prompts_share_is_left_out_and_what_they_say_stays(smollm2_tokenizer):
    def ids(text: str) -> list[int]:
        messages = [{"role": "system", "content": "Answer in one short sentence."}, {"role": "user", "content": text}]
        return smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    texts = ["How was the soup?", "How was the soup today?", "Describe a walk.", "What is it like?"]
    assert previews(smollm2_tokenizer, [ids(text) for text in texts]) == texts
    # A single prompt shares no text.
    assert "How was the soup?" in previews(smollm2_tokenizer, [ids(texts[0])])[0]
    assert previews(smollm2_tokenizer, []) == []


def test_an_end_of_turn_without_a_role_is_a_boundary():
    """Gemma's end of turn is special and in no role, so `all_special_ids` lacks it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])

    def ids(text: str) -> list[int]:
        return tokenizer(f"Be brief.<end_of_turn>{text}<end_of_turn>", add_special_tokens=False)["input_ids"]

    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") not in tokenizer.all_special_ids
    texts = ["How is it?", "How is that?", "How far?"]
    assert previews(tokenizer, [ids(text) for text in texts]) == texts
