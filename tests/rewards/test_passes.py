"""Commands that measure an oracle and are interrupted: finished shards are kept, and the results are the same."""

import json
from pathlib import Path

import pytest

from sepo.cli import main
from sepo.models.saving import save_model
from sepo.stages import data, logps
from tiny_models import tiny_model, tiny_tokenizer

ROWS = 7


def reward(folder: Path) -> list[str]:
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": "no", "subset": "math-prm", "id": i}
        for i in range(ROWS)
    ]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["reward", "--data", str(folder / "bench.jsonl")]


def marked(folder: Path) -> list[str]:
    rows = [{"input": f"{i}?", "steps": ["It is 1.", f"So {i}."], "mistake_index": 0} for i in range(ROWS)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["bench", "marked", "--texts", str(folder / "traces.jsonl")]


@pytest.mark.parametrize("command_of", [reward, marked])
def test_an_interrupted_command_continues_with_the_next_shard(command_of, tmp_path, monkeypatch, capsys):
    models = []
    for name, seed in (("oracle", 1), ("reference", 0)):
        save_model(tiny_model("llama", seed=seed), tiny_tokenizer(), tmp_path / name)
        models += [f"--{name}", str(tmp_path / name)]
    command = [*command_of(tmp_path), *models, "--device", "cpu", "--out"]
    monkeypatch.setattr(data, "PAIRS_PER_SHARD", 2)  # four shards for each of two models
    written, write = [], logps.write_shard

    def counted(*arguments):
        if len(written) == 5:
            written.clear()
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(logps, "write_shard", counted)
    assert main([*command, str(tmp_path / "stopped")]) == 130
    assert "1 of 4 parts" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "stopped")]) == 0
    assert len(written) == 3
    monkeypatch.setattr(logps, "write_shard", write)
    assert main([*command, str(tmp_path / "whole")]) == 0
    results = [{path.relative_to(out): path.read_bytes() for path in out.rglob("*.json")} for out in
               (tmp_path / "whole", tmp_path / "stopped")]  # fmt: skip
    assert results[0]
    assert results[0] == results[1]
    assert not list(tmp_path.glob(".*-work"))
