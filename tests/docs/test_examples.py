"""The Python code of documentation pages runs, page by page, beside tiny models of the names that the page uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import tiny_tokenizer_of

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def save(folder: Path, seed: int, kind: str | None = None) -> None:
    tokenizer = tiny_tokenizer() if kind is None else tiny_tokenizer_of(kind)
    tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", 0)
    save(tmp_path / "oracle", 1)
    return tmp_path


def test_token_rewards(here, capsys):
    save(here / "my-model", 2, "gpt2")
    names: dict = {}
    for block in code_of("how-to/token-rewards.md"):
        exec(compile(block, "token-rewards.md", "exec"), names)
    assert "[2, 1]" in capsys.readouterr().out
    assert names["mine"].ids != names["theirs"].ids


def test_under_trl(here):
    names: dict = {}
    for block in code_of("how-to/under-trl.md"):
        exec(compile(block, "under-trl.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].sepo_prompt_once


def test_rewards_for_rl(here):
    names: dict = {}
    for block in code_of("how-to/rewards-for-rl.md"):
        exec(compile(block, "rewards-for-rl.md", "exec"), names)
    assert names["best"] in (0, 1)
    assert abs(names["shaped"][0]).max() <= 0.05


def test_from_trl(here):
    names: dict = {}
    for block in code_of("how-to/from-trl.md"):
        exec(compile(block, "from-trl.md", "exec"), names)
    for trainer in (names["trl_trainer"], names["trainer"]):
        assert any("eval_held_out_loss" in row for row in trainer.state.log_history)
    assert (here / "trl-policy" / "adapter_model.safetensors").is_file()
    assert (here / "sepo-policy" / "adapter_model.safetensors").is_file()
    assert not (here / "sepo-policy" / "training_args.bin").exists()
