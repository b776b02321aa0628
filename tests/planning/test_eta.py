"""What a run says remains of it, and where its bars go."""

from __future__ import annotations

import io
import sys
from functools import partial

import pytest

from sepo import bars
from sepo.planning.eta import Eta, RunLine, estimates_of_process
from sepo.planning.shapes import load_shape
from sepo.recipe.settings import LoraSettings
from sepo.stages.cost import Cost, Estimate, ModelSize
from tiny_models import tiny_model

STAGES = {"reference_logps": "score", "oracle": "train", "oracle_logps": "score", "select": "", "eval": "generate"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return ModelSize(str(folder), None, load_shape(str(folder)))


def eta_of(model, clock) -> Eta:
    """Stages of 10, 60, 10, 0 and 60 seconds at a rate of 1."""
    per_token = Estimate("score", model, tokens=1).flops
    per_response = Estimate("generate", model, steps=1, width=1).flops
    estimates = {
        "reference_logps": [Estimate("score", model, tokens=10 / per_token)],
        "oracle": [Estimate("train", model, tokens=20 / per_token)],
        "oracle_logps": [Estimate("score", model, tokens=10 / per_token)],
        "select": [],
        "eval": [Estimate("generate", model, steps=1, width=round(20 / per_response))],
    }
    return Eta(estimates, 1.0, clock)


def test_a_machine_that_takes_three_times_as_long_is_noticed_after_the_first_pass(model):
    clock = Clock()
    run = eta_of(model, clock)
    before = run.remaining()
    assert before == pytest.approx(sum(run.expected.values()))
    run.begin("reference_logps")
    clock.now = 3 * run.expected["reference_logps"]
    run.end("reference_logps", done=True)
    assert run.remaining() == pytest.approx(3 * (before - run.expected["reference_logps"]))


def test_a_stage_that_stood_takes_no_time_and_says_nothing_of_the_speed(model):
    clock = Clock()
    run = eta_of(model, clock)
    for name in ("reference_logps", "oracle", "oracle_logps", "select"):
        run.begin(name)
        clock.now += 0.01
        run.end(name, done=False)
    assert run.remaining() == pytest.approx(run.expected["eval"])


def test_the_progress_of_a_training_says_what_remains_of_it_better_than_its_flops(model):
    clock = Clock()
    run = eta_of(model, clock)
    run.begin("oracle")
    run.part(0.0)
    clock.now = 30.0
    run.part(0.1)  # so it takes 300 s in all
    others = run.expected["oracle_logps"] + run.expected["eval"]
    assert run.remaining() == pytest.approx(270 + others)
    assert run.share() == pytest.approx(30 / (300 + others))
    clock.now = 300.0
    run.part(1.0)
    run.end("oracle", done=True)
    # Nothing but a training was seen: its error is the best guess for the others.
    assert run.remaining() == pytest.approx(others * 300 / run.expected["oracle"])


def test_a_stage_that_failed_is_no_measurement(model):
    clock = Clock()
    run = eta_of(model, clock)
    line = RunLine(run, list(STAGES))

    def fail() -> None:
        with line.during("reference_logps"):
            clock.now = 1e6
            raise ValueError("of the stage")

    with pytest.raises(ValueError, match="of the stage"):
        fail()
    line.close()
    assert run.remaining() < 1e3


def test_an_oracle_more_than_was_planned_does_no_harm(model):
    run = eta_of(model, Clock())
    line = RunLine(run, list(STAGES))
    with line.during("oracle-7"):
        line.show("step 1 of 2", 0.5)
    line.close()


def show(monkeypatch) -> None:
    """tqdm has read TQDM_DISABLE=1 of the tests for good."""
    for name in ("tqdm", "_Lines"):
        monkeypatch.setattr(bars, name, partial(getattr(bars, name), disable=False))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bars_of_a_run_are_one_line_that_is_drawn_or_one_now_and_then_in_a_log(model, stream, monkeypatch):
    show(monkeypatch)
    monkeypatch.setattr("sys.stderr", stream())
    clock = Clock()
    line = RunLine(eta_of(model, clock), list(STAGES))
    with bars.show_in(line), line.during("oracle"):
        with bars.progress_bar(True, total=1000, desc="  oracle", unit="step") as bar:
            bar.set_postfix({"loss": "0.693"})
            for _ in range(1000):
                clock.now += 0.3
                line.bar.drawn_at -= 0.5  # as if so much time had passed
                bar.update()
        assert bar.n == 1000
    line.close()
    text = sys.stderr.getvalue()
    drawn = [part for part in text.replace("\r", "\n").split("\n") if "step" in part]
    assert all("oracle (2 of 5): oracle, step " in part and "left" in part for part in drawn)
    if stream is Terminal:
        assert any("step 500 of 1000, loss 0.693;" in part for part in drawn)
    else:
        assert "\r" not in text
        assert 10 <= len(drawn) <= 20, text


def test_a_bar_alone_in_a_log_is_a_line_now_and_then(monkeypatch):
    show(monkeypatch)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with bars.progress_bar(True, total=5000, desc="tokenise", unit="row") as bar:
        for _ in range(5000):
            bar.update()
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tokenise: 100%")


def test_processes_share_scoring_and_training_and_each_generates_everything(model):
    parts = [Estimate(kind, model, tokens=30.0, steps=6.0) for kind in ("load", "score", "train", "generate")]
    shared = estimates_of_process(Cost("", estimates=tuple(parts)), 3)
    assert [part.tokens for part in shared] == [30, 10, 10, 30]
    assert estimates_of_process(None, 3) == []


def test_flops_of_adapters_are_those_of_the_layers_that_their_gradients_reach(model):
    def flops(lora):
        return Estimate("train", model, tokens=10, targets=4, lora=lora).flops

    shape = model.shape
    whole, head = 10 * shape.linear, 4 * shape.head
    assert flops(None) == 6 * (whole + head)
    assert flops(LoraSettings()) == 4 * (whole + head)
    last = LoraSettings(upper=1 / shape.layers)
    named = LoraSettings(target_modules=rf".*layers\.{shape.layers - 1}\..*proj")
    assert flops(named) == flops(last)
    assert flops(last) == pytest.approx(2 * whole + 2 * whole / shape.layers + 4 * head)
    assert flops(LoraSettings(target_modules=["down_proj"])) > flops(last)
