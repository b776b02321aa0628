"""The probe of the KL during training: its value, and that few probes detect targets soon after they are passed."""

import json
import math

import pytest
import torch

from sepo.recipe.settings import EvalSettings
from sepo.study.passing import Passing
from sepo.targets.kl_probe import Probe, next_look, scale_of
from tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [[1, 4, 20, 30, 2, 5], [1, 4, 50, 2, 5], [1, 4, *range(10, 40), 2, 5]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_probe_is_the_kl_along_answers_of_the_start_summed_over_tokens(architecture):
    start = tiny_model(architecture, initializer_range=0.1)
    policy = tiny_model(architecture, initializer_range=0.1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    probe = Probe(start, tiny_tokenizer(), PROMPTS, EvalSettings(samples=2, max_new_tokens=7), seed=3)
    assert len(probe.pairs) == probe.number == len(PROMPTS)  # one answer per prompt, whatever `samples` is
    expected = 0.0
    for index in range(len(PROMPTS)):
        prompt, answer = probe.pairs[index].prompt_ids, probe.pairs[index].chosen_ids
        assert list(prompt) == PROMPTS[index]
        ids = torch.tensor([[*prompt, *answer]])
        after, before = (model.double()(ids).logits[0].log_softmax(-1) for model in (policy, start))
        expected += (after.exp() * (after - before)).sum(-1)[len(prompt) - 1 : -1].sum().item() / len(PROMPTS)
    policy.float().train()
    start.float()
    assert expected > 0.05
    assert probe(policy) == pytest.approx(expected, rel=1e-4)
    assert probe(policy) == pytest.approx(expected, rel=1e-4)  # reuses the start's hidden states
    assert policy.training
    assert probe(start) == pytest.approx(0, abs=1e-6)


# sqrt(KL) by step, over 1,000 steps.
COURSES = {
    "even": lambda step: step / 250,
    "warm-up": lambda step: 4 * (step / 1000) ** 2,
    "fast": lambda step: 4 * (1 - math.exp(-step / 100)),
    "slow": lambda step: step / 2000,
}


def follow(passing, course, measured, steps=1000, start=0, points=()):
    """Train along a course of the KL; a measurement is `measured` times the probe. Returns points and probed steps."""
    points, probed = list(points), []
    passing.begin(start)
    for step in range(start + 1, steps + 1):
        before = len(passing.probes)
        passed = passing.passed(step, course(step) ** 2, points)
        if len(passing.probes) > before:
            probed.append(step)
        if passed and not any(point["step"] == step for point in points):
            points.append({"step": step, "kl": measured * course(step) ** 2, **passed})
    return points, probed


@pytest.mark.parametrize("course", COURSES)
def test_few_probes_detect_targets_soon_after_they_are_passed(course, tmp_path):
    targets = [1.0, 3.0, 6.0]
    points, probed = follow(Passing(targets, lambda kl: kl, tmp_path / "probes.json"), COURSES[course], 1.0)
    reached = [target for target in targets if COURSES[course](1000) ** 2 >= target]
    assert len(reached) == (0 if course == "slow" else 3)
    assert [target for point in points for target in point["passed"]] == reached
    for point in points:
        assert min(point["passed"]) <= point["kl"] < 1.35 * max(point["passed"])
    assert len(probed) <= 30
    assert json.loads((tmp_path / "probes.json").read_text()) == [[step, COURSES[course](step) ** 2] for step in probed]


def test_a_measurement_rescales_the_probe_for_the_remaining_targets(tmp_path):
    """The measured KL is twice the probed KL."""
    targets = [1.0, 3.0, 6.0, 12.0]
    points, _ = follow(Passing(targets, lambda kl: kl, tmp_path / "probes.json"), COURSES["even"], 2.0)
    first, *later = points
    assert 2.0 <= first["kl"] < 2.7  # before any measurement
    assert [point["passed"] for point in points] == [[1.0], [3.0], [6.0], [12.0]]
    for point in later:
        assert point["passed"][0] <= point["kl"] < 1.35 * point["passed"][0]
    assert scale_of(points) == pytest.approx(2.0)
    assert scale_of([]) == 1.0
    assert scale_of([{"kl": 90.0, "probe": 1.0}]) == 3.0


def test_targets_below_a_measured_kl_are_not_measured_again(tmp_path):
    points, _ = follow(Passing([1.0, 1.5, 1.9, 5.0], lambda kl: kl, tmp_path / "probes.json"), COURSES["even"], 2.0)
    assert len(points) == 2
    assert points[0]["kl"] > 1.9


@pytest.mark.parametrize("stopped", [1, 260, 300, 999])
def test_a_resumed_run_probes_the_same_steps(stopped, tmp_path):
    """The run resumes from an earlier checkpoint, with points and probes of steps that are repeated."""
    undisturbed = follow(Passing([1.0, 3.0], lambda kl: kl, tmp_path / "whole.json"), COURSES["even"], 1.3)
    path = tmp_path / "probes.json"
    points, first = follow(Passing([1.0, 3.0], lambda kl: kl, path), COURSES["even"], 1.3, steps=stopped)
    from_step = stopped // 2
    points, again = follow(
        Passing([1.0, 3.0], lambda kl: kl, path), COURSES["even"], 1.3, start=from_step, points=points
    )
    assert points == undisturbed[0]
    assert [step for step in first if step <= from_step] + again == undisturbed[1]
    assert path.read_text() == (tmp_path / "whole.json").read_text()
    path.write_text("{ no JSON")
    passing = Passing([1.0], lambda kl: kl, path)
    passing.begin(10)
    assert passing.probes == []


def test_probes_are_neither_too_far_apart_nor_too_close():
    assert next_look([], 1.0) == 1
    assert next_look([(1, 0.0)], 1.0) == 2
    assert next_look([(100, 0.01)], 9.0) == 150
    assert next_look([(100, 0.5), (120, 0.4)], 1.0) == 180  # the KL fell
    assert next_look([(100, 0.99), (120, 0.999)], 1.0) == 130
