"""Uploads to the hub: cards are correct and escaped, uploads are complete, the run folder is unchanged."""

from __future__ import annotations

import io
import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM

from sepo.cli import main
from sepo.data.tables import read_table
from sepo.hub import push
from sepo.hub.card import settings_block
from sepo.recipe.reading import parse_recipe
from sepo.runs.folder import hub_names
from tiny_gguf import write_gguf
from tiny_models import tiny_model, tiny_tokenizer

WILD = "<script>alert(1)</script> | [x](http://evil.example) ![i](//e.example/p) @all `c` www.evil.example"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, whose prompts are full of markup."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    rows = [{"prompt": f"{WILD} {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} here"} for i in range(20)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
output_dir: {folder / "run"}
data: {{source: {folder / "prefs.jsonl"}, held_out: 5, as_chat: true}}
reference: {{model: {folder / "model"}}}
device: cpu
oracle: {{training: {{learning_rate: 0.002, batch_size: 8}}}}
policy: {{lora: {{r: 2}}, training: {{learning_rate: 0.001, batch_size: 8, arguments: {{hub_token: hf_secret}}}}}}
eval: {{gold: vader, prompts: 3, max_new_tokens: 4, examples: 2}}
"""
    )
    assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def specified():
    return create_autospec(HfApi, instance=True)


@pytest.fixture
def hub(monkeypatch, specified):
    """A stub of huggingface_hub's API that checks signatures and records calls."""
    api = specified
    api.reset_mock(side_effect=True, return_value=True)
    api.create_repo.return_value = "https://huggingface.co/me/mine"
    api.repo_info.return_value = SimpleNamespace(private=True)
    api.list_repo_files.return_value = []
    api.files = {}

    def commit(repo_id, operations, **kwargs):
        for one in operations:
            if isinstance(one, CommitOperationAdd):
                with one.as_file() as file:  # temporary files are deleted afterwards
                    api.files[one.path_in_repo] = file.read()
            else:
                assert isinstance(one, CommitOperationDelete)
                api.files[one.path_in_repo] = None

    api.create_commit.side_effect = commit
    monkeypatch.setattr(push, "HfApi", lambda: api)
    return api


def stages_done(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.split("]")[0][1:] for line in lines if line.startswith("[") and line.endswith(" s")]


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_is_beside_the_policy_and_no_text_of_the_data_is_markup_in_it(finished):
    text = (finished / "run" / "policy" / "README.md").read_text()
    head = front_matter(text)
    assert head["library_name"] == "peft"
    assert head["license"] == "mit"
    assert "base_model" not in head  # it was a folder of this machine
    assert "AutoPeftModelForCausalLM" in text
    body = text.split("## Examples")[1].split("## Settings")[0]
    assert "alert" in body  # the prompt is shown, ...
    for markup in ("<script", "[x]", "http://", "www.", "@all", "`c`"):
        assert markup not in body, markup  # ... as text
    assert {row.count("|") for row in body.splitlines() if row.startswith("| ")} == {4}
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| KL from the start"))
    value, error = metrics["kl"], metrics["kl_se"]
    low, high = (float(part) for part in row.split("|")[3].split(" to "))
    assert (low + high) / 2 == pytest.approx(value, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * error, abs=1e-3)  # three prompts
    assert str(finished) not in text  # no folder of this machine
    assert "hf_secret" not in text


def test_a_card_changes_nothing_that_stages_depend_on(finished, tmp_path, capsys):
    recipe = ["run", str(finished / "recipe.yaml")]
    card = finished / "run" / "policy" / "README.md"
    capsys.readouterr()
    assert main(recipe) == 0
    assert stages_done(capsys) == []
    written = card.read_text()
    card.write_text("My own words.")
    assert main(recipe) == 0
    assert stages_done(capsys) == []
    assert card.read_text() == "My own words."
    # Without its entry in the manifest a stage is checked again, and the same result is recorded.
    manifest = finished / "run" / "manifest.json"
    before = json.loads(manifest.read_text())["stages"]["train"]
    assert "policy/README.md" not in before["files"]
    shutil.copytree(finished / "run", tmp_path / "run")
    lost = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del lost["stages"]["train"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(lost))
    capsys.readouterr()
    assert main([*recipe, f"output_dir={tmp_path / 'run'}"]) == 0
    assert stages_done(capsys) == ["train"]
    again = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["train"]
    assert again["content"] == before["content"]
    card.write_text(written)


def test_a_card_that_cannot_be_written_fails_no_run(finished, capsys, monkeypatch):
    monkeypatch.setattr("sepo.hub.card.front_matter", lambda *_: 1 / 0)
    assert main(["run", str(finished / "recipe.yaml")]) == 0
    assert "no model card was written (ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        "/home/ada/secret place/pairs.jsonl", "secret place/pairs.jsonl", "~/secret place/pairs.jsonl",
        "C:\\Users\\secret place\\pairs.jsonl", "../secret/pairs.jsonl", "file:///secret place/pairs.jsonl",
    ],
)  # fmt: skip
def test_a_card_shows_no_folder_of_this_machine_whatever_its_name(place):
    recipe = parse_recipe({"data": {"source": place}})
    block = settings_block(recipe, ())
    assert "pairs.jsonl" in block
    assert "secret" not in block


def test_a_dry_run_lists_the_upload_and_sends_no_request(finished, hub, capsys):
    run = str(finished / "run")
    assert main(["push", run, "--to", "me/mine", "--base", "org/base", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name in ("README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert name in shown
    assert "trainer_state.json" not in shown
    assert main(["push", run, "--to", "me/mine", "--what", "scores", "--dry-run"]) == 0
    assert "15 pairs" in capsys.readouterr().out
    assert hub.mock_calls == []


def test_a_policy_goes_up_with_its_card_and_a_base_that_others_have(finished, hub, capsys):
    run = str(finished / "run")
    hub.list_repo_files.return_value = ["model.safetensors", "config.json", "notes.json", "README.md"]
    assert main(["push", run, "--to", "me/mine", "--base", "org/base", "--license", "apache-2.0", "--private"]) == 0
    assert "huggingface.co/me/mine" in capsys.readouterr().out
    assert hub.create_repo.call_args.kwargs == {"repo_type": "model", "private": True, "exist_ok": True}
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert hub.files["adapter_model.safetensors"] == (finished / "run/policy/adapter_model.safetensors").read_bytes()
    # Files of an earlier upload of a whole model would be loaded instead. Files of other people stay.
    assert {name for name, content in hub.files.items() if content is None} == {"model.safetensors", "config.json"}
    text = hub.files["README.md"].decode()
    head = front_matter(text)
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")
    assert head["license"] == "apache-2.0"
    assert 'name = "me/mine"' in text
    assert not any(str(finished).encode() in content for content in hub.files.values() if content)


def uploaded(hub, folder):
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_policy_on_a_gguf_goes_up_as_a_whole_model(finished, hub, tmp_path, monkeypatch, capsys):
    """The quickstart's policy: no adapter on the hub can name a file or a Python package as its base."""
    monkeypatch.setenv("SEPO_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "base.gguf", AutoModelForCausalLM.from_pretrained(finished / "model"))
    run = shutil.copytree(finished / "run", tmp_path / "run")
    config = json.loads((run / "policy" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base.gguf")
    (run / "policy" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["push", str(run), "--to", "me/mine"]) == 0
    assert "the adapter and its base as one model" in capsys.readouterr().out
    folder = uploaded(hub, tmp_path / "up")
    assert "adapter_config.json" not in hub.files
    assert not any(str(tmp_path).encode() in content for name, content in hub.files.items() if "model" not in name)
    text = (folder / "README.md").read_text()
    assert "AutoPeft" not in text
    assert front_matter(text)["library_name"] == "transformers"
    ids = torch.tensor([[1, 40, 41, 60]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished / "model"), run / "policy")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(whole, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert main(["push", str(run), "--to", "me/mine", "--base", "org/base", "--dry-run"]) == 0  # the user's word
    assert "adapter_config.json" in capsys.readouterr().out


def test_an_adapter_goes_up_as_a_whole_model_where_asked(finished, hub):
    assert main(["push", str(finished / "run"), "--to", "me/mine", "--merge"]) == 0
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert "adapter_config.json" not in hub.files


def test_an_oracle_goes_up_as_a_model(finished, hub):
    assert main(["push", str(finished / "run"), "--to", "me/oracle", "--what", "oracle"]) == 0
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert front_matter(hub.files["README.md"].decode())["library_name"] == "transformers"
    assert not any(str(finished).encode() in content for content in hub.files.values())


def test_token_rewards_go_up_as_a_dataset_that_others_can_read(finished, hub, tmp_path):
    assert main(["push", str(finished / "run"), "--to", "me/rewards", "--what", "scores"]) == 0
    assert hub.create_repo.call_args.kwargs["repo_type"] == "dataset"
    assert set(hub.files) == {
        "README.md", "data/train-00000-of-00001.parquet", "data/held_out-00000-of-00001.parquet"
    }  # fmt: skip
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    # load with the card's settings only
    data = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    found = {split: (len(data[split]), [data[split][0], data[split][1]]) for split in data}
    assert {split: rows for split, (rows, _) in found.items()} == {"train": 15, "held_out": 5}
    row = found["train"][1][0]
    selection = read_table(finished / "run" / "selection", "selection").to_pylist()[0]
    scores = read_table(finished / "run" / "scores", "scores").to_pylist()[0]
    assert row["pair_id"] == selection["pair_id"]
    assert row["prompt_text"] == tiny_tokenizer().decode(scores["prompt_ids"])
    assert WILD in row["prompt_text"]
    assert row["prompt"] == json.loads(scores["conversation"])["messages"]
    assert WILD in row["prompt"][-1]["content"]
    for side in ("chosen", "rejected"):
        assert "".join(row[f"{side}_tokens"]) == row[side]  # one character a token
        assert row[f"{side}_rewards"] == scores[f"{side}_rewards"]
        kept = [i for i, weight in enumerate(row[f"{side}_weights"]) if weight]
        assert kept == selection[f"{side}_positions"]
        assert found["held_out"][1][0][f"{side}_weights"] is None
    assert [row["pair_weight"] for row in found["train"][1] + found["held_out"][1]] == [1, 1, None, None]
    table = pq.read_table(io.BytesIO(hub.files["data/train-00000-of-00001.parquet"]))
    assert table.column("chosen_tokens").type.value_type == "string"


def test_token_rewards_in_a_folder_are_read_and_used_without_this_package(finished, tmp_path, capsys, monkeypatch):
    """The code of the card, run on the folder, gives the objective's weighted mean."""
    out = tmp_path / "rewards"
    assert main(["push", str(finished / "run"), "--what", "scores", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rewards"]
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for block in code:
        exec(block.replace("ORG/NAME", str(out)), names)
    model = AutoModelForCausalLM.from_pretrained(finished / "model").double()
    row = next(row for row in names["trained"] if any(row["chosen_weights"]))
    ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
    with torch.no_grad():
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        found = float(names["weighted_logp"](model, row, "chosen"))
    start = len(row["prompt_ids"])
    kept = [i for i, weight in enumerate(row["chosen_weights"]) if weight]
    expected = sum(float(logps[start + i - 1, ids[start + i]]) for i in kept) / len(kept)
    assert found == pytest.approx(expected, rel=1e-6)
    assert main(["push", str(finished / "run"), "--what", "scores", "--out", str(out)]) == 2
    assert "choose a new folder" in capsys.readouterr().err


def answered(code):
    return HfHubHTTPError("no", response=SimpleNamespace(status_code=code, headers={}, request=None))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "mine"], "expected ORG/NAME"),
        (["--to", "../x/y"], "expected ORG/NAME"),
        (["--to", "me/mine"], "--base ORG/NAME"),  # an adapter of a folder here
        (["--to", "me/mine", "--what", "oracle", "--base", "b"], "expected ORG/NAME"),
        (["--to", "me/mine", "--what", "oracle", "--merge"], "is a whole model"),
        (["--to", "me/mine", "--what", "scores", "--merge"], "--merge is for a policy or an oracle"),
    ],
)
def test_bad_input_ends_in_one_line_before_any_request(arguments, says, finished, hub, capsys):
    assert main(["push", str(finished / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert hub.mock_calls == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalTokenNotFoundError("none"), "hf auth login"),
        (answered(401), "hf auth login"),
        (answered(403), "may not write"),
        (answered(500), "run the command again"),
        (ConnectionError("no network"), "run the command again"),
    ],
)
def test_what_the_hub_refuses_ends_in_one_line(error, says, finished, hub, capsys):
    hub.create_repo.side_effect = error
    assert main(["push", str(finished / "run"), "--to", "me/mine", "--what", "oracle"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_nothing_goes_to_a_public_repository_where_a_private_one_was_asked_for(finished, hub, capsys):
    hub.repo_info.return_value = SimpleNamespace(private=False)
    assert main(["push", str(finished / "run"), "--to", "me/mine", "--what", "scores", "--private"]) == 2
    assert "public" in capsys.readouterr().err
    assert hub.files == {}


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["push", str(tmp_path), "--to", "me/mine", "--dry-run"]) == 2
    assert "no finished run" in capsys.readouterr().err


# Where a recipe names data and models. From another folder each of these relative paths looks like a hub id.
PLACES = ["data.source", "data.held_out_source", "reference.model", "policy.model", "oracle.model"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.daily(2)
def test_only_a_name_that_was_no_file_when_the_run_ran_is_linked_as_one_of_the_hub(
    place, local, finished, hub, tmp_path, monkeypatch
):
    section, key = place.split(".")
    at_run, at_push = tmp_path / "at-run", tmp_path / "at-push"
    at_push.mkdir()
    (at_run / "team" / "private-1").mkdir(parents=True)
    name = "team/private-1" if local else "team/public-1"
    changed = {section: {key: name}, "name": "tiny"}
    if place == "data.held_out_source":
        changed["data"]["held_out"] = 0
    monkeypatch.chdir(at_run)
    names = hub_names(parse_recipe(changed, "test"))
    assert (name in names) is not local
    run = shutil.copytree(finished / "run", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"hub": names}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe.setdefault(section, {})[key] = name
    if place == "data.held_out_source":
        recipe["data"]["held_out"] = 0
    if place == "oracle.model":
        recipe["oracle"] = {"model": name}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(at_push)
    for what in ("policy", "scores"):
        base = ["--base", "org/base"] if what == "policy" else []
        assert main(["push", str(run), "--to", "me/mine", "--what", what, *base]) == 0
        text = hub.files["README.md"].decode()
        assert ("team/private-1" in text) is False, what
        head = front_matter(text)
        linked = place == "data.source" and not local
        assert (f"huggingface.co/datasets/{name}" in text) == linked
        assert (name in (head.get("datasets") or head.get("source_datasets") or [])) == linked
    if place == "policy.model" and local:
        assert main(["push", str(run), "--to", "me/mine"]) == 2  # an adapter needs a base that others have


def test_a_run_of_an_earlier_release_has_no_links_to_the_hub(finished, hub, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.pop("hub") == []
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(str(finished / "prefs.jsonl"), "org/prefs"))
    assert main(["push", str(run), "--to", "me/mine", "--what", "scores"]) == 0
    assert "org/prefs" not in hub.files["README.md"].decode()
