"""A chat template that is in another file than the tokenizer's."""

import json

import datasets
import pytest

from sepo.data import tokenize_pairs
from sepo.errors import UserError
from sepo.models import load_tokenizer
from tiny_models import tiny_model, tiny_tokenizer

ROW = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def pairs(folder) -> list[dict]:
    rows = datasets.Dataset.from_list([ROW])
    return tokenize_pairs(rows, load_tokenizer(folder), progress=False)[0].to_pylist()


def test_the_template_of_a_processor_is_read(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny_tokenizer().chat_template}))
    expected = tokenize_pairs(datasets.Dataset.from_list([ROW]), tiny_tokenizer(), progress=False)[0].to_pylist()
    assert pairs(folder) == expected


@pytest.mark.parametrize(("names", "fine"), [(["tool_use"], False), (["rag", "tool_use"], False),
                                             (["default", "rag"], True)])  # fmt: skip
def test_templates_with_names_need_a_default(folder, names, fine):
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(tiny_tokenizer().chat_template)
    if fine:
        assert len(pairs(folder)) == 1
    else:
        with pytest.raises(UserError, match="additional_chat_templates"):
            pairs(folder)
