"""What a run says remains of it, and where its bars go."""

from __future__ import annotations

import io
import sys
from functools import partial

import numpy as np
import pytest

from sepo import bars
from sepo.planning.cost import Cost, Estimate, ModelSize
from sepo.planning.eta import Eta, RunLine, estimates_of_process
from sepo.planning.sizes import load_shape
from sepo.recipe.settings import LoraSettings
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
    """Stages of equal FLOPs; `select` has none."""
    per_token = Estimate("score", model, tokens=1).flops
    per_response = Estimate("generate", model, steps=1, width=1).flops
    estimates = {
        "reference_logps": [Estimate("score", model, tokens=60 / per_token)],
        "oracle": [Estimate("train", model, tokens=20 / per_token)],
        "oracle_logps": [Estimate("score", model, tokens=60 / per_token)],
        "select": [],
        "eval": [Estimate("generate", model, steps=60 / per_response, width=1)],
    }
    return Eta(estimates, clock)


def test_nothing_is_said_before_something_was_measured(model):
    clock = Clock()
    run = eta_of(model, clock)
    everything = [name for name in STAGES if name != "select"]
    assert run.remaining() == (0, everything)
    run.begin("reference_logps")
    for now, share in ((0.0, 0.0), (30.0, 0.01), (31.0, 0.2), (40.0, 0.02)):  # loading; too short; too little
        clock.now = now
        run.part(share)
        assert run.remaining() == (0, everything)
        if share == 0.2:
            run.begin("reference_logps")


def test_a_finished_stage_tells_how_long_a_stage_like_it_takes_and_no_other(model):
    clock = Clock()
    run = eta_of(model, clock)
    run.begin("reference_logps")
    clock.now = 30.0
    run.end("reference_logps", done=True)
    assert run.remaining() == (30, ["oracle", "eval"])
    run.begin("oracle_logps")
    clock.now = 35.0
    assert run.remaining() == (25, ["eval"])
    clock.now = 45.0  # half of its time, and no progress seen
    assert run.remaining() == (0, ["oracle_logps", "eval"])


def test_a_stage_that_stood_takes_no_time_and_says_nothing_of_the_speed(model):
    clock = Clock()
    run = eta_of(model, clock)
    for name in ("reference_logps", "oracle", "oracle_logps", "select"):
        run.begin(name)
        clock.now += 0.01
        run.end(name, done=False)
    assert run.remaining() == (0, ["eval"])


def test_the_progress_of_a_training_gives_the_rest_of_it(model):
    clock = Clock()
    run = eta_of(model, clock)
    run.begin("oracle")
    for now, share in ((0.0, 0.0), (20.0, 0.05), (60.0, 0.25)):  # loading takes a while, then 200 s in all
        clock.now = now
        run.part(share)
    assert run.remaining() == (pytest.approx(150), ["oracle_logps", "eval"])
    clock.now = 70.0
    assert run.remaining()[0] == pytest.approx(140)


# Seconds of the stages of real quickstarts: on two quiet cores (results/quickstart.md), in a clean clone, and beside
# other work. Of work that begins during a run nothing can be known before.
RUNS = {
    "quiet": (24, 38, 27, 31, 52),
    "first": (40.4, 75.3, 33.5, 43.0, 55.9),
    "beside other work": (126.5, 142.3, 106.3, 137.9, 227.8),
}
LOADING = 2.0  # seconds at the begin of a bar


@pytest.mark.parametrize("seconds", RUNS.values(), ids=RUNS)
def test_what_a_run_says_remains_is_within_a_third_or_left_out(model, seconds):
    """Replays the stages of a run, whose progress is even after the loading, with every moment at which a bar moves."""
    score = [Estimate("load", model), *(Estimate("score", model, tokens=n, targets=n / 2) for n in (121, 90))]
    work = {
        "reference_logps": score,
        "oracle": [Estimate("load", model), Estimate("train", model, tokens=121, targets=60, lora=LoraSettings())],
        "oracle_logps": score,
        "train": [Estimate("load", model), Estimate("train", model, tokens=121, targets=18, lora=LoraSettings())],
        "eval": [Estimate("generate", model, steps=32, width=116)] * 2,
    }
    shown = {"reference_logps": (2, 2), "oracle": (16,), "oracle_logps": (2, 2), "train": (16,), "eval": (1, 1)}
    took, clock, said = dict(zip(work, seconds, strict=True)), Clock(), []
    run = Eta(work, clock)
    for name, end in zip(work, np.cumsum(seconds), strict=True):
        run.begin(name)
        whole = sum(run.work[name])
        for size, moments in zip(run.work[name], shown[name], strict=True):
            run.part(0.0)
            length = took[name] * size / whole
            loading = min(LOADING, length / 2)
            began = clock.now
            for moment in range(moments + 1):
                clock.now = began + loading + (length - loading) * moment / moments
                if moment:
                    run.part(moment / moments)
                left, unknown = run.remaining()
                truth = (0 if name in unknown else end - clock.now) + sum(
                    took[other] for other in list(work)[list(work).index(name) + 1 :] if other not in unknown
                )
                said.append(left > 0)
                assert left == pytest.approx(truth, rel=0.3, abs=2), (name, moment, unknown)
        run.end(name, done=True)
    assert sum(said) >= 20  # of the moments


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
    assert run.remaining()[0] == 0


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
    assert all("oracle (2 of 5): oracle, step " in part and ("left" in part or "measuring" in part) for part in drawn)
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
    assert estimates_of_process(Cost("data"), 3) == []


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
