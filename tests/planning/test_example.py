"""A dry run shows one pair as the models read it."""

from __future__ import annotations

import json

from chat_templates import user
from sepo.cli import main
from tiny_models import tiny_model, tiny_tokenizer


def test_a_dry_run_shows_a_pair_with_what_is_masked(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Yes!"), ("rejected", "No."))}
    rows = [{"prompt": [user(f"Is it\t{i}?")], **sides} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"reference: {{model: {tmp_path / 'm'}}}\ndata: {{source: {tmp_path / 'p.jsonl'}, held_out: 1}}\ndevice: cpu\n"
    )
    assert main(["run", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    shown = {line.split(" (")[0].strip(): line for line in capsys.readouterr().out.splitlines() if " tokens, " in line}
    assert list(shown) == ["prompt", "chosen", "rejected"]
    assert "masked: read, not trained): " in shown["prompt"]
    assert "<|user|>Is it" in shown["prompt"]
    assert shown["prompt"].endswith("<|assistant|>")
    assert "trained): Yes!" in shown["chosen"]
    assert shown["rejected"].endswith("</s>")


def test_the_dry_run_of_a_comparison_shows_a_pair_too(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"prompt": f"Is it {i}?", "chosen": "Yes!", "rejected": "No."} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base.yaml").write_text(
        f"reference: {{model: {tmp_path / 'm'}}}\ndevice: cpu\neval: {{gold: vader, prompts: 2, max_new_tokens: 4}}\n"
        f"data: {{source: {tmp_path / 'p.jsonl'}, held_out: 2, as_chat: true}}\n"
    )
    variants = "variants: {top: {}, dpo: {set: {policy.objective: dpo}}}"
    (tmp_path / "grid.yaml").write_text(f"base: base.yaml\noutput_dir: {tmp_path / 'out'}\n{variants}\n")
    assert main(["compare", str(tmp_path / "grid.yaml"), "--dry-run"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if " tokens, " in line]
    assert [line.split(" (")[0].strip() for line in shown] == ["prompt", "chosen", "rejected"]
    assert "masked: read, not trained): <s><|user|>Is it" in shown[0]
