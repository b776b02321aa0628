"""One finished run of a tiny model, which the tests of a run read, or copy before they change something."""

from __future__ import annotations

import json
from pathlib import Path

from sepo.cli import main
from tiny_models import tiny_model, tiny_tokenizer

COLORS = ["red", "blue", "green", "pink", "teal", "gold"]


def prepare(folder: Path, recipe: str, rows: int = 24) -> None:
    """Write a tiny model, plain preferences and a recipe that names them as `model` and `prefs.jsonl`."""
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    pairs = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(rows)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "recipe.yaml").write_text(recipe)


def fill(folder: Path) -> None:
    """Write a tiny chat model, preferences for polite answers and a recipe into a folder, and run the recipe."""
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = []
    for index in range(40):
        color = COLORS[index % 6]
        prompt = [{"role": "user", "content": f"Is it {color}? {index}"}]
        texts = (f"Yes, {color}, thanks!", f"no {color} here {index}" + " and so on" * (index % 2))
        good, bad = ([{"role": "assistant", "content": text}] for text in texts)
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    rows[3]["rejected"] = rows[3]["chosen"]  # identical
    rows[5]["chosen"] = None
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
output_dir: {folder / "run"}
data: {{source: {folder / "prefs.jsonl"}, held_out: 10}}
reference: {{model: {folder / "model"}}}
device: cpu
oracle:
  sample: 0.8
  training: {{learning_rate: 0.002, batch_size: 8, num_train_epochs: 3}}
policy:
  training: {{learning_rate: 0.001, batch_size: 8, num_train_epochs: 2}}
eval: {{gold: vader, prompts: 4, samples: 2, max_new_tokens: 8}}
"""
    )
    assert main(["run", str(folder / "recipe.yaml")]) == 0


def run_command(finished: Path, run: Path) -> list[str]:
    """The command that made the finished run, for a copy of it at `run`."""
    return ["run", str(finished / "recipe.yaml"), f"output_dir={run}"]


def stages_done(text: str) -> list[str]:
    """The stages that a run did, from its log, but for the passes over the pairs."""
    names = [line.split("]")[0][1:] for line in text.splitlines() if line.startswith("[") and line.endswith(" s")]
    return [name for name in names if not name.endswith("_logps")]
