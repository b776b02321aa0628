"""The tokenizer of a model."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sepo.errors import UserError, named_error
from sepo.files import expand_home
from sepo.models.folders import adapter_base, is_adapter, is_outline, read_json_object
from sepo.models.names import resolve_model


def load_tokenizer(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, always with a pad token.

    A tokenizer without a pad token gets its end-of-sequence token as pad token, so the vocabulary does not change. An
    adapter folder without tokenizer files uses its base model's tokenizer. The padding side is not changed, because
    packed rows have no padding and generation sets the side.

    Raises:
        UserError: no such model, a model without tokenizer, or a tokenizer that needs remote code.
    """
    name = expand_home(name_or_path, "the model")
    # A tokenizer needs no weights and no model.
    without_model = has_tokenizer(name) and (is_outline(name) or not os.path.exists(os.path.join(name, "config.json")))
    folder = Path(name if without_model and not is_adapter(Path(name)) else resolve_model(name, revision=revision))
    if is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        base, base_revision = adapter_base(folder)
        return load_tokenizer(base, revision=base_revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the model '{name_or_path}' has no tokenizer that loads ({named_error(error)})") from None
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():  # where processors keep it
        tokenizer.chat_template = read_json_object(folder / "chat_template.json").get("chat_template")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of '{name_or_path}' has neither a pad nor an end-of-sequence token; "
                "set one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Does a folder hold files of a tokenizer?"""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json"))
