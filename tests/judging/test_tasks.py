"""Tasks of lm-evaluation-harness: paired differences, and a run with its own task."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

from sepo.cli import main
from sepo.errors import UserError
from sepo.judging.tasks import RESULTS, check_tasks, task_metrics
from sepo.recipe.reading import parse_recipe
from sepo.report.run_summary import cautions, summary_of
from tiny_models import tiny_model, tiny_tokenizer

WITH_HARNESS = importlib.util.find_spec("lm_eval") is not None


def found(scores, task="sums", **extra):
    """Results in the harness's format, for documents with these accuracies."""
    scores = np.asarray(scores, float)
    error = scores.std(ddof=1) / math.sqrt(len(scores))
    return {
        "results": {task: {"alias": task, "acc,none": scores.mean(), "acc_stderr,none": error, **extra}},
        "samples": {task: [{"doc_id": i, "filter": "none", "acc": one} for i, one in enumerate(scores)]},
        "n-samples": {task: {"original": 99, "effective": len(scores)}},
    }


BEFORE, AFTER = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 0]


def test_the_error_of_a_difference_is_paired_by_document():
    metrics = task_metrics(found(BEFORE), found(AFTER), ["sums"])
    differences = np.subtract(AFTER, BEFORE)
    assert metrics["sums/acc/difference"] == pytest.approx(differences.mean())
    assert metrics["sums/acc/difference_se"] == pytest.approx(differences.std(ddof=1) / math.sqrt(8))
    assert metrics["sums/acc/base"] == pytest.approx(np.mean(BEFORE))
    assert metrics["sums/acc/policy_se"] == pytest.approx(np.std(AFTER, ddof=1) / math.sqrt(8))
    assert metrics["sums/documents"] == 8


def test_without_scores_of_documents_the_figures_count_as_independent():
    """A perplexity is no mean over documents, a group has no documents, and other documents cannot be paired."""
    extra = {"ppl,none": 12.0, "ppl_stderr,none": 3.0, "f1,strict": 0.5, "f1_stderr,strict": "N/A"}
    before, after = found(BEFORE, **extra), found(AFTER, **extra | {"ppl,none": 10.0, "ppl_stderr,none": 4.0})
    for sample in [*before["samples"]["sums"], *after["samples"]["sums"]]:
        sample["ppl"] = 1.0
    metrics = task_metrics(before, after, ["sums"])
    assert metrics["sums/ppl/difference"] == -2
    assert metrics["sums/ppl/difference_se"] == 5
    assert metrics["sums/f1-strict/difference"] == 0
    assert "sums/f1-strict/difference_se" not in metrics
    for sample in after["samples"]["sums"]:
        sample["doc_id"] += 1
    one, other = (side["results"]["sums"]["acc_stderr,none"] for side in (before, after))
    assert task_metrics(before, after, ["sums"])["sums/acc/difference_se"] == pytest.approx(math.hypot(one, other))


def test_a_group_has_its_own_result_and_a_tag_those_of_its_tasks():
    one, two, three = (found(BEFORE, task=name)["results"] for name in ("one", "two", "three"))
    group = {"group": {"acc,none": 0.6, "acc_stderr,none": 0.1}}
    results = {"results": {**group, **one, **two, **three}, "group_subtasks": {"group": ["one"]}}

    def tasks(*names):
        return {name.split("/")[0] for name in task_metrics(results, results, names)}

    assert tasks("group") == {"group"}
    assert tasks("one", "two") == {"one", "two"}
    assert tasks("group", "tag") == {"group", "two", "three"}


def test_a_summary_shows_and_warns_of_forgetting():
    recipe = parse_recipe({"name": "mine"}, "test")
    metrics = {f"tasks/{name}": value for name, value in task_metrics(found(BEFORE), found(AFTER), ["sums"]).items()}
    row = next(row for row in summary_of(recipe, metrics, None, []).moved if row.what == "sums (acc)")
    assert (row.before, row.after, row.change) == ("0.625", "0.375", "-0.250 ± 0.164")
    assert not any("forgot" in sentence for sentence in cautions(recipe, metrics))
    metrics["tasks/sums/acc/difference_se"] = 0.05
    assert any("sums (acc) fell by 0.250" in sentence for sentence in cautions(recipe, metrics))


def test_the_cache_key_of_the_evaluation_leaves_tasks_out():
    assert "tasks" not in parse_recipe({}, "test").eval.cache_key()
    check_tasks([])


@pytest.mark.skipif(WITH_HARNESS, reason="lm_eval is installed")
def test_without_the_harness_tasks_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"\.\[tasks\]"):
        check_tasks(["hellaswag"])


def write_task(folder, name="sums", answers=(0, 1)):
    rows = [{"q": f"Is it {i}?", "choices": ["yes", "no"], "a": answers[i % 2]} for i in range(10)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return path


@pytest.mark.slow
@pytest.mark.skipif(not WITH_HARNESS, reason="needs lm_eval")
def test_a_run_reports_what_its_policy_forgot(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": "yes", "rejected": "no"} for i in range(24)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = write_task(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: tiny
output_dir: {tmp_path / "run"}
data: {{source: {tmp_path / "prefs.jsonl"}, held_out: 6, as_chat: true}}
reference: {{model: {tmp_path / "model"}}}
device: cpu
oracle: {{training: {{learning_rate: 0.002, batch_size: 8}}}}
policy: {{training: {{learning_rate: 0.01, batch_size: 8, num_train_epochs: 4}}}}
eval: {{prompts: 0, tasks: ["{task}"]}}
"""
    )

    def done():
        lines = capsys.readouterr().err.splitlines()
        return [line.split("]")[0][1:] for line in lines if line.startswith("[") and line.endswith(" s")]

    run = ["run", str(tmp_path / "recipe.yaml")]
    assert main(run) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    stored = json.loads((tmp_path / "run" / "tasks" / RESULTS).read_text())
    assert metrics["tasks/sums/documents"] == 10
    for role in ("base", "policy"):
        assert metrics[f"tasks/sums/acc/{role}"] == stored[role]["results"]["sums"]["acc,none"]
    assert metrics["tasks/sums/acc/difference"] == pytest.approx(
        metrics["tasks/sums/acc/policy"] - metrics["tasks/sums/acc/base"]
    )
    assert "tasks/sums/acc/difference_se" in metrics
    assert "`tasks/sums/acc/difference`" in (tmp_path / "run" / "metrics.md").read_text()
    done()
    assert main(run) == 0
    assert done() == []
    assert main([*run, "eval.task_limit=4"]) == 0
    assert done() == ["tasks"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks/sums/documents"] == 4
    task.write_text(task.read_text().replace("{{q}}", "Q: {{q}}"))
    assert main([*run, "eval.task_limit=4"]) == 0
    assert done() == ["tasks"]
    assert main([*run, "eval.tasks=[nowhere.yaml]"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    (tmp_path / "sums.jsonl").unlink()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "another"))
    assert main([*run, "eval.task_limit=5"]) == 2
    assert "cannot be set up" in capsys.readouterr().err
