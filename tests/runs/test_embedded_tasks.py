"""The embedded tasks as sources: which there are, their splits, and a whole run on words of one sign."""

import json

import pytest

from sepo.cli import main
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.recipe.settings import EMBEDDED_DATA, DataSettings, Recipe
from sepo.stages import data, score
from sepo.stages.stage import StageResult
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(
        f"""
name: plain
output_dir: {folder / "run"}
data: {{source: "embedded:plain", sample: 0.04, held_out: 8, max_length: 140}}
reference: {{model: {folder / "model"}}}
device: cpu
oracle: {{training: {{learning_rate: 0.002, batch_size: 8}}}}
policy: {{training: {{learning_rate: 0.001, batch_size: 8}}}}
eval: {{gold: plain, prompts: 3, samples: 1, max_new_tokens: 8}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(workplace):
    assert main(["run", str(workplace / "recipe.yaml")]) == 0
    return workplace / "run"


@pytest.mark.parametrize("source", EMBEDDED_DATA)
def test_an_embedded_task_has_two_splits_and_no_other(source):
    sizes = [len(data.read_split(DataSettings(source=source), split)) for split in ("train", "held_out")]
    assert sizes[0] > 400
    assert sizes[1] > 150
    with pytest.raises(UserError, match=f"{source} has no split 'test'"):
        data.read_split(DataSettings(source=source), "test")


def test_an_embedded_task_that_does_not_exist_is_refused_with_those_that_do(workplace, capsys):
    assert main(["run", str(workplace / "recipe.yaml"), "data.source=embedded:plane"]) == 2
    said = capsys.readouterr().err
    assert "no 'embedded:plane' (did you mean 'embedded:plain'?)" in said
    assert all(source in said for source in EMBEDDED_DATA)
    assert main(["run", str(workplace / "recipe.yaml"), "eval.gold=plane"]) == 2
    said = capsys.readouterr().err
    assert "eval.gold" in said
    assert "'plain'" in said


def test_the_data_stage_knows_one_embedded_task_from_the_other(workplace):
    stages = [
        data.stage(Recipe(data={"source": "embedded:plain", key: source}), tiny_tokenizer())
        for key in ("source", "held_out_source")
        for source in EMBEDDED_DATA
    ]
    places = [(stage.depends["source"], stage.depends["held_out_source"]) for stage in stages]
    assert len(set(places)) == 4
    assert not any("embedded" in str(place) for place in places)  # known by content, not by name


def test_rewards_are_judged_by_the_words_of_the_gold_reward_that_was_asked_for(finished):
    pairs = StageResult(finished / "pairs", "pairs")
    words = [score.Words(tiny_tokenizer(), gold) for gold in ("vader", "plain")]
    of_stage = [score.stage(pairs, [pairs], pairs, one).depends["words"] for one in (*words, None)]
    assert of_stage == ["vader", "plain", False]
    found = [score.words_found(finished / "scores", one)["fidelity/auc"] for one in words]
    assert found[0] != found[1]
    assert found[1] == json.loads((finished / "metrics.json").read_text())["fidelity/auc"]


def test_a_run_on_words_of_one_sign_leaves_its_figures_and_shows_a_dash_for_the_others(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["fidelity/tokens_negative"] > 0 == metrics["fidelity/tokens_positive"]
    assert 0 < metrics["fidelity/auc"] == metrics["fidelity/auc_negative"] < 1
    assert metrics["fidelity/precision_rejected"] is not None
    assert metrics["fidelity/precision_chosen"] is metrics["fidelity/auc_positive"] is None
    assert 0 <= metrics["gold_reward/policy"] <= 1
    page = (finished / "metrics.md").read_text()
    (row,) = [line for line in page.splitlines() if "auc_positive" in line]
    assert "–" in row
    assert "plain" in (finished / "policy" / "README.md").read_text()
    assert len(read_table(finished / "pairs" / "held_out", "pairs")) == 8
