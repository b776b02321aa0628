"""Previews of prompts."""

from __future__ import annotations

import pytest

from sepo.data.previews import previews
from sepo.models.tokenizer import load_tokenizer


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
