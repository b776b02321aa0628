"""Commands that measure an oracle and are interrupted: finished shards are kept, and the results are the same."""

import json
from pathlib import Path

import pytest

from sepo.cli import main
from sepo.models.saving import save_model
from sepo.stages import data, logps
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import tiny_tokenizer_of

ROWS = 7


def reward(folder: Path) -> list[str]:
    rows = [
        {"prompt": f"Is it {i % 3}?", "chosen": f"Yes, {i}!", "rejected": "no", "subset": "math-prm", "id": i}
        for i in range(ROWS)
    ]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["reward", "--data", str(folder / "bench.jsonl")]


def marked(folder: Path) -> list[str]:
    rows = [
        {"input": f"{i % 3}?", "steps": [f"It is {37 * i}.", f"So {'x' * i} {i}."], "mistake_index": i % 2}
        for i in range(ROWS)
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["bench", "marked", "--texts", str(folder / "traces.jsonl")]


def numbers_of(value: object) -> list[float]:
    """All numbers of a JSON value, in their order."""
    if isinstance(value, dict | list):
        return [
            number for inner in (value.values() if isinstance(value, dict) else value) for number in numbers_of(inner)
        ]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("command_of", [reward, marked])
def test_an_interrupted_command_continues_with_the_next_shard(command_of, tmp_path, monkeypatch, capsys):
    models = []
    tokenizer = tiny_tokenizer() if command_of is reward else tiny_tokenizer_of("gpt2")
    for name, seed in (("oracle", 1), ("reference", 0)):
        save_model(tiny_model("llama", seed=seed, vocab_size=len(tokenizer)), tokenizer, tmp_path / name)
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
    assert b'"answers": 0' not in b"".join(results[0].values())
    assert not list(tmp_path.glob(".*-work"))
    monkeypatch.setattr(data, "PAIRS_PER_SHARD", 1000)  # the order of the rows does not depend on the shards
    assert main([*command, str(tmp_path / "one")]) == 0
    for name, content in results[0].items():
        numbers = [numbers_of(json.loads(text)) for text in (content, (tmp_path / "one" / name).read_bytes())]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
