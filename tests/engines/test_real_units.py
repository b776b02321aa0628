"""Passes of models and transfers as units: tables byte-equal to engine "local", with workers that are killed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path

import pytest

import spawn
from sepo import engines
from sepo.cli import main
from sepo.data.tables import read_table, write_shard
from sepo.engines import files
from sepo.engines.files import Files
from sepo.errors import UserError
from sepo.forward.scoring import Types
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.reading import load_recipe
from sepo.stages import data, encode, logps
from sepo.transfer import stages as transfer
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer_of


def save(folder: Path, tokenizer, **changes) -> None:
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tables(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("part-*.parquet")}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models with tokenizers of their own, pairs in 6 shards, and the tables of engine "local"."""
    folder = tmp_path_factory.mktemp("units")
    save(folder / "small", tiny_tokenizer_of("gpt2"))
    save(folder / "large", tiny_tokenizer_of("llama2"), eos_token_id=tiny_tokenizer_of("llama2").eos_token_id)
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"Yes, wonderful {i}! ☕", "rejected": f"no {i} here"} for i in range(30)
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
name: two
output_dir: {folder / "run"}
data: {{source: {folder / "prefs.jsonl"}, held_out: 0}}
reference: {{model: {folder / "small"}}}
device: cpu
policy: {{model: {folder / "large"}}}
eval: {{prompts: 0}}
"""
    )
    recipe = load_recipe(folder / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PAIRS_PER_SHARD", 5)
        data.prepare_data(recipe.data, load_tokenizer(str(folder / "small")), folder / "pairs", progress=False)
    transfer.prepare_pairs(recipe, folder / "pairs", folder / "policy_pairs")
    score(folder, "local", folder / "local")
    assert len(tables(folder / "local" / "scores")) == 6
    return folder


def score(place: Path, engine: str, out: Path) -> None:
    """Two passes, their token rewards, and these under the other tokenizer."""
    from sepo.stages.score import score_pairs

    recipe = load_recipe(place / "recipe.yaml")
    with engines.use(engine, out):
        for name in ("small", "oracle"):
            model = place / "small" if name == "small" else oracle(place)
            logps.logps_pass(str(model), place / "pairs" / "train", out / name, device="cpu", types=Types("float32"))
        score_pairs(place / "pairs" / "train", [out / "oracle"], out / "small", out / "scores")
        transfer.carry_scores(recipe, out / "scores", place / "policy_pairs" / "train", out / "carried", "transfer")


def oracle(place: Path) -> Path:
    if not (place / "oracle").is_dir():
        save(place / "oracle", tiny_tokenizer_of("gpt2"), seed=3)
    return place / "oracle"


def test_passes_and_transfers_as_units_give_the_tables_of_local(place, tmp_path):
    score(place, "files", tmp_path)
    assert tables(tmp_path) == tables(place / "local")


def test_the_command_transfers_as_units_of_every_engine(place, tmp_path):
    """The table of `sepo transfer` is the same with both engines, also from a table in one file."""
    arguments = ["transfer", "--data", str(place / "prefs.jsonl"), "--tokenizer", str(place / "large")]
    arguments += ["--table-tokenizer", str(place / "small")]
    scores = place / "local" / "scores"
    for name, more in (("local", []), ("files", ["--engine", "files"])):
        assert main([*arguments, "--table", str(scores), "--out", str(tmp_path / name), *more]) == 0
    assert tables(tmp_path / "files") == tables(tmp_path / "local")
    assert len(tables(tmp_path / "local")) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "local"]
    (tmp_path / "one").mkdir()
    one = write_shard(tmp_path / "one", 0, read_table(scores, "scores"))
    assert main([*arguments, "--table", str(one), "--out", str(tmp_path / "of_one"), "--engine", "files"]) == 0
    assert read_table(tmp_path / "of_one", "scores").equals(read_table(tmp_path / "local", "scores"))


def test_a_table_is_not_carried_over_into_itself(place, capsys):
    scores = place / "local" / "scores"
    arguments = ["--data", str(place / "prefs.jsonl"), "--tokenizer", str(place / "large")]
    assert main(["transfer", "--table", str(scores), *arguments, "--out", str(scores)]) == 2
    assert "holds the table itself" in capsys.readouterr().err
    assert len(tables(scores)) == 6


@pytest.mark.nightly
def test_passes_and_transfers_on_a_ray_cluster_give_the_tables_of_local(place, tmp_path, monkeypatch):
    """Two nodes on loopback, each with a core. Needs the extra."""
    pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        score(place, f"ray:{cluster.address}", tmp_path)
    finally:
        cluster.shutdown()
    assert tables(tmp_path) == tables(place / "local")


def test_an_interrupted_transfer_goes_on_and_takes_no_shards_of_other_scores(place, tmp_path):
    recipe, targets = load_recipe(place / "recipe.yaml"), place / "policy_pairs" / "train"
    with engines.use("files", tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_write_carried", _fails_at(3, transfer._write_carried))
        with pytest.raises(OSError, match="no space"):
            transfer.carry_scores(recipe, place / "local" / "scores", targets, tmp_path / "carried", "t")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "carried").glob("part-*.parquet")}
    assert len(kept) == 3
    with engines.use("files", tmp_path):
        transfer.carry_scores(recipe, place / "local" / "scores", targets, tmp_path / "carried", "t")
    assert tables(tmp_path / "carried") == tables(place / "local" / "carried")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = recipe.model_copy(update={"transfer": recipe.transfer.model_copy(update={"allocation": "first"})})
    with engines.use("files", tmp_path):
        transfer.carry_scores(other, place / "local" / "scores", targets, tmp_path / "carried", "t")
    transfer.carry_scores(other, place / "local" / "scores", targets, tmp_path / "local", "t")
    assert tables(tmp_path / "carried") == tables(tmp_path / "local")


def _fails_at(number: int, write):
    written = []

    def writes(*arguments):
        if len(written) == number:
            raise OSError("no space")
        written.append(arguments)
        write(*arguments)

    return writes


def test_a_worker_with_another_model_under_the_same_name_does_no_unit(place, tmp_path):
    save(tmp_path / "model", tiny_tokenizer_of("gpt2"))
    seen = {}

    class Keep(Files):
        def do(self, job, progress):
            seen["job"] = job
            return {}

    with engines.use("files", tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "do", Keep.do)
        patch.setattr("sepo.processes._VISIBLE_WITHIN", 0.0)
        with pytest.raises(UserError, match="does not appear"):
            logps.logps_pass(str(tmp_path / "model"), place / "pairs" / "train", tmp_path / "out", device="cpu")
    save(tmp_path / "model", tiny_tokenizer_of("gpt2"), seed=7)
    with pytest.raises(UserError, match="is not the same here"):
        seen["job"].kind_class()(seen["job"].settings)


@pytest.mark.nightly
def test_sepo_score_with_workers_of_which_one_is_killed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "patience", 3.0)
    monkeypatch.setattr(files, "POLL", 0.1)
    monkeypatch.setattr(data, "PAIRS_PER_SHARD", 5)
    command = ["score", "--oracle", oracle(place), "--reference", place / "small", "--data", place / "prefs.jsonl"]
    command = [*map(str, command), "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "local")]) == 0
    workers = [spawn.start(["-m", "sepo", "work", tmp_path / "files", "--wait", "60"]) for _ in range(2)]

    own_claims = files.claims

    def late_claims(*arguments):
        """This process leaves the first unit to the workers."""
        while killer.is_alive():
            time.sleep(0.01)
        return own_claims(*arguments)

    monkeypatch.setattr(files, "claims", late_claims)

    def kill_one() -> None:
        """Kill the first worker as soon as it has a unit."""
        while True:
            for path in (tmp_path / "files").glob(".units/*/claims/*"):
                with contextlib.suppress(OSError):
                    if f"-{workers[0].pid}-" in path.read_text():
                        workers[0].send_signal(signal.SIGKILL)
                        return
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert main([*command, str(tmp_path / "files"), "--engine", "files"]) == 0
    assert tables(tmp_path / "files") == tables(tmp_path / "local")
    assert workers[1].wait(60) == 0


@pytest.mark.nightly
def test_a_run_with_engine_files_is_the_run_with_engine_local(place, tmp_path, monkeypatch):
    recipe = (place / "recipe.yaml").read_text().replace("prompts: 0", "prompts: 2, max_new_tokens: 4")
    (tmp_path / "recipe.yaml").write_text(recipe)
    settings = [
        "oracle.training.learning_rate=0.002",
        "oracle.training.batch_size=6",
        "policy.training.learning_rate=0.002",
        "policy.training.batch_size=6",
        "data.held_out=6",
    ]
    for name in ("local", "files"):
        out = f"output_dir={tmp_path / name}"
        assert main(["run", str(tmp_path / "recipe.yaml"), *settings, out, "--engine", name]) == 0
    assert tables(tmp_path / "local") == tables(tmp_path / "files")
    assert len(tables(tmp_path / "local")) >= 8
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("local", "files")]
    first, second = ({name: stage["content"] for name, stage in m["stages"].items()} for m in manifests)
    assert first == second


def test_tokenising_as_units_gives_the_pairs_and_the_report_of_local(place, tmp_path, monkeypatch):
    """Also drops, notes and truncation, and pairs whose held-out part is another split."""
    monkeypatch.setattr(encode, "ROWS_AT_ONCE", 7)
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes {i} " * (1 + i % 9), "rejected": f"no {i}"} for i in range(30)]
    rows[3]["rejected"], rows[11]["chosen"] = rows[3]["chosen"], None
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = load_recipe(place / "recipe.yaml").data.model_copy(
        update={"source": str(tmp_path / "prefs.jsonl"), "max_length": 24, "held_out": 4}
    )
    tokenizer = load_tokenizer(str(place / "small"))
    results = []
    for engine in ("local", "files"):
        with engines.use(engine, tmp_path / engine):
            results.append(data.prepare_data(settings, tokenizer, tmp_path / engine / "pairs", progress=False))
    assert results[0] == results[1]
    assert len(results[0]["report"]["train"]["dropped"]) == 2
    assert tables(tmp_path / "local" / "pairs") == tables(tmp_path / "files" / "pairs")
    assert not list((tmp_path / "files" / ".units").glob("parts/*"))
