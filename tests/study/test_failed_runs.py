"""A training of a grid that diverges: it is recorded as failed, the grid goes on, and it is not trained again."""

from __future__ import annotations

import json

import pytest

from sepo.cli import main
from sepo.study import comparison
from sepo.study.results import best_setting
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def place(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(24)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base.yaml").write_text(
        f"data: {{source: {tmp_path / 'prefs.jsonl'}, as_chat: true, held_out: 4}}\n"
        f"reference: {{model: {tmp_path / 'model'}}}\ndevice: cpu\n"
        "policy: {objective: simpo, training: {learning_rate: 0.001, batch_size: 5, max_steps: 3}}\n"
        "eval: {prompts: 2, max_new_tokens: 4}\n"
    )
    return tmp_path


def grid(place, variants: str, head: str = "seeds: [1]\n") -> str:
    text = f"base: base.yaml\noutput_dir: {place / 'out'}\nseeds_vary: policy\ncheckpoints: [1.0]\n{head}variants:\n"
    (place / "grid.yaml").write_text(text + variants)
    return str(place / "grid.yaml")


HUGE = "1.0e+30"
TWO = f"  fine: {{}}\n  wild: {{set: {{policy.training.learning_rate: {HUGE}}}}}\n"


def results(place) -> dict:
    return json.loads((place / "out" / "compare.json").read_text())


def test_a_diverging_run_is_recorded_and_the_grid_goes_on(place, capfd, monkeypatch):
    # The run that diverges comes first.
    path = grid(place, f"  wild: {{set: {{policy.training.learning_rate: {HUGE}}}}}\n  fine: {{}}\n")
    assert main(["compare", path]) == 0
    first = results(place)
    assert [run["variant"] for run in first["runs"]] == ["fine"]
    assert [(run["variant"], run["seed"]) for run in first["failed"]] == [("wild", 1)]
    assert "finite" in first["failed"][0]["error"]
    assert "## Failed" in (place / "out" / "compare.md").read_text()
    assert "the grid goes on" in capfd.readouterr().err
    assert not list((place / "out").rglob("checkpoint-*"))

    trained = []
    real = comparison.Run.do
    monkeypatch.setattr(comparison.Run, "do", lambda self, stage, *a, **k: trained.append(stage.kind) or
                        real(self, stage, *a, **k))  # fmt: skip
    assert main(["compare", path]) == 0
    assert trained.count("run") == 1  # the finished one, which is up to date
    assert results(place)["failed"] == first["failed"]
    trained.clear()
    assert main(["compare", path, "--retry-failed"]) == 0
    assert trained.count("run") == 2
    assert results(place)["failed"] == first["failed"]


def test_a_sweep_is_decided_among_the_settings_that_were_trained(place):
    sweep = f"  a: {{sweep: {{policy.training.learning_rate: [{HUGE}, 0.001]}}}}\n"
    lost = f"  b: {{sweep: {{policy.training.learning_rate: [{HUGE}, 1.0e+29]}}}}\n"
    assert main(["compare", grid(place, sweep + lost, "seeds: [1]\nsweep_seed: 0\n")]) == 0
    done = results(place)
    assert [(run["variant"], run["label"], run["reported"]) for run in done["runs"]] == [
        ("a", "policy.training.learning_rate=0.001", False),
        ("a", "policy.training.learning_rate=0.001", True),
    ]
    assert len(done["failed"]) == 3


def test_a_grid_in_which_nothing_was_trained_ends_in_one_line(place, capsys):
    path = grid(place, f"  wild: {{set: {{policy.training.learning_rate: {HUGE}}}}}\n")
    assert main(["compare", path]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("sepo: every run failed; the first: ")
    assert len(results(place)["failed"]) == 1


def test_a_value_that_is_not_a_number_is_never_the_best():
    rows = [{"variant": "a", "label": label, "value": value} for label, value in (("x", float("nan")), ("y", -1.0))]
    assert best_setting(rows, "a") == "y"
