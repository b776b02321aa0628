"""What docs/reliability.md promises about damage, changes, bad numbers and interrupted saves."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from pairs import config, pairs_table, some_pairs, weights
from sepo import processes
from sepo.cli import main
from sepo.credit.rewards import response_sums
from sepo.data.tables import make_table, read_table, write_table
from sepo.files import recover_folder
from sepo.forward.logps import token_logps
from sepo.forward.packing import Pair, pack
from sepo.forward.prepare import prepare_model
from sepo.recipe.settings import TrainingSettings
from sepo.stages.logps import logps_pass
from sepo.training import checkpoints
from sepo.training.batches import NO_PAIR, PairSampler
from sepo.training.checkpoints import seal_checkpoint
from sepo.training.fit import train_model
from sepo.training.trainer import NonFiniteLossError, PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer
from tiny_run import run_command, stages_done


@pytest.fixture
def run(finished_run, copied_run, capsys):
    """A copy of a finished run, and a function that gives the command again: (stages done again, what was said)."""

    def again(*overrides):
        capsys.readouterr()
        assert main([*run_command(finished_run, copied_run), *overrides]) == 0
        said = capsys.readouterr().err
        return stages_done(said), said

    return copied_run, again


def alter(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0x55
    path.write_bytes(content)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("data", "pairs/train/part-00000.parquet"),
        ("oracle_logps", "logps/oracle/part-00000.parquet"),
        ("score", "scores_held_out/part-00000.parquet"),
        ("select", "selection/part-00000.parquet"),
    ],
)
@pytest.mark.daily(2)
def test_an_altered_table_is_named_and_only_its_stage_is_done_again(run, stage, name):
    folder, again = run
    before = (folder / name).read_bytes()
    alter(folder / name)
    done, said = again()
    assert f"[{stage}] {name} was altered: done again" in said
    assert done == [name for name in (stage,) if not name.endswith("_logps")]
    assert (folder / name).read_bytes() == before
    assert again()[0] == []


def test_damaged_weights_are_trained_again_to_the_same_bytes(run):
    folder, again = run
    before = (folder / "oracle" / "model.safetensors").read_bytes()
    (folder / "oracle" / "model.safetensors").write_bytes(before[:-100])
    done, said = again()
    assert "[oracle] oracle/model.safetensors was altered: done again" in said
    assert done == ["oracle"]
    assert (folder / "oracle" / "model.safetensors").read_bytes() == before


def test_a_missing_file_is_named(run):
    folder, again = run
    (folder / "policy" / "tokenizer.json").unlink()
    done, said = again()
    assert "[train] policy/tokenizer.json is missing: done again" in said
    assert done == ["train"]


def test_with_a_damaged_manifest_models_and_shards_are_kept(run):
    folder, again = run
    stamps = {name: os.stat(folder / name).st_mtime_ns for name in ("oracle/model.safetensors", "policy/config.json")}
    (folder / "manifest.json").write_text('{"stages": {"data"')
    done, said = again()
    assert "manifest.json is damaged" in said
    assert done == ["data", "oracle", "score", "select", "train", "eval"]
    assert said.count("data and settings: reused") == 2
    assert {name: os.stat(folder / name).st_mtime_ns for name in stamps} == stamps
    assert again()[0] == []


def test_a_note_beside_a_model_does_no_harm_but_another_shard_does(run):
    folder, again = run
    (folder / "oracle" / "notes.txt").write_text("a good one")
    shutil.copy(folder / "scores" / "part-00000.parquet", folder / "scores" / "part-00001.parquet")
    done, said = again()
    assert "[score] scores/part-00001.parquet was added: done again" in said
    assert done == ["score"]
    assert (folder / "oracle" / "notes.txt").exists()
    assert not (folder / "scores" / "part-00001.parquet").exists()


def test_a_manifest_of_an_older_version_is_not_believed(run):
    folder, again = run
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["select"]["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done, said = again()
    assert "[select] was made by an older version: done again" in said
    assert done == ["select"]


def test_a_changed_setting_is_named_with_the_stages_it_touches(run):
    _, again = run
    done, said = again("policy.gamma=3.0")
    assert "[train] policy.gamma changed: done again" in said
    assert done == ["train", "eval"]
    # What an upstream stage writes counts, not that it ran: another way to report gives the same oracle.
    done, said = again("policy.gamma=3.0", "oracle.training.report_to=[]")
    assert "[oracle] oracle.training.report_to changed: done again" in said
    assert done == ["oracle"]


def test_a_data_file_of_the_same_size_with_other_words_is_noticed(run, finished_run, tmp_path):
    _, again = run
    path = tmp_path / "prefs.jsonl"
    shutil.copy(finished_run / "prefs.jsonl", path)
    assert again(f"data.source={path}")[0] == ["data"]
    path.write_text(path.read_text().replace("thanks", "cheers"))
    done, said = again(f"data.source={path}")
    assert "[data] source changed: done again" in said
    assert done == ["data", "oracle", "score", "select", "train", "eval"]


def test_shards_of_another_model_or_other_pairs_are_computed_again(tmp_path, capsys):
    for seed in (0, 1):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / f"model{seed}")
    write_table(tmp_path / "pairs", some_pairs(6), rows_per_shard=2)
    for seed in (0, 1):
        logps_pass(str(tmp_path / f"model{seed}"), tmp_path / "pairs", tmp_path / f"logps{seed}", device="cpu")
    right, wrong = ([tmp_path / f"logps{seed}" / f"part-{i:05d}.parquet" for i in range(3)] for seed in (0, 1))
    good = [path.read_bytes() for path in right]
    for damage, said in (
        (wrong[1].read_bytes(), "was made with another model"),
        (good[0], "was made with another pairs"),
        (good[1][:-20], "is damaged"),
    ):
        right[1].write_bytes(damage)
        logps_pass(str(tmp_path / "model0"), tmp_path / "pairs", tmp_path / "logps0", device="cpu")
        assert f"part-00001.parquet {said}" in capsys.readouterr().err
        assert [path.read_bytes() for path in right] == good


# --- interrupted saves ----------------------------------------------------------------------------------------------


def train_tiny(folder, **settings):
    if not (folder / "model").exists():
        tiny_model("llama").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    defaults = {"learning_rate": 1e-3, "batch_size": 4, "num_train_epochs": 2, "save_minutes": 1e-6}
    training = TrainingSettings(**{**defaults, **settings})
    return train_model(str(folder / "model"), some_pairs(12), folder / "out", training, device="cpu", objective="sepo")


def test_a_finished_model_is_kept_and_an_altered_one_trained_again(tmp_path, capsys):
    first = train_tiny(tmp_path)
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train_tiny(tmp_path) == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    alter(tmp_path / "out" / "model.safetensors", at=0.99)
    assert train_tiny(tmp_path)["loss"] == first["loss"]
    assert "model.safetensors was altered; trained again" in capsys.readouterr().err
    (tmp_path / "out" / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # another attempt, given up
    assert train_tiny(tmp_path)["loss"] == first["loss"]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert train_tiny(tmp_path, learning_rate=1e-4)["loss"] != first["loss"]


def test_unfinished_and_damaged_checkpoints_are_not_continued_from(tmp_path, monkeypatch, capsys):
    unbroken = train_tiny(tmp_path)
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")

    def stop_at_four(folder):
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        seal_checkpoint(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal_checkpoint", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path)
    folder = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert train_tiny(tmp_path) == {**unbroken, "seconds": pytest.approx(0, abs=60)}
    said = capsys.readouterr().err
    assert "checkpoint-4: it was not finished; removed" in said
    assert "continuing from" in said
    assert "checkpoint-3" in said.split("continuing from")[1].splitlines()[0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "kept").write_text("yes")
    (tmp_path / ".out.new").mkdir()
    recover_folder(tmp_path / "out")
    assert (tmp_path / "out" / "kept").read_text() == "yes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_bad_loss_names_step_and_pair_and_the_last_checkpoint_goes_on(tmp_path, monkeypatch):
    unbroken = train_tiny(tmp_path)
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    losses = PreferenceTrainer._losses

    def bad_at_two(self, *arguments):
        values, *rewards = losses(self, *arguments)
        if self.state.global_step == 2:
            values = torch.where(torch.arange(len(values)) == 0, torch.nan, values)
        return values, *rewards

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_losses", bad_at_two)
        with pytest.raises(NonFiniteLossError, match=r"loss of pair \d+ .* is not finite at step 2"):
            train_tiny(tmp_path)
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "sealed.json").is_file()
    assert train_tiny(tmp_path)["loss"] == pytest.approx(unbroken["loss"], rel=1e-12)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_a_bad_gradient_names_the_pair_and_changes_no_weight(tmp_path, monkeypatch):
    losses = PreferenceTrainer._losses

    def bad_for_seven(self, first, batch, reference):
        values, *rewards = losses(self, first, batch, reference)
        # Zero, with an infinite slope.
        bad = torch.tensor([pair_id == 7 for pair_id in batch.pair_ids])
        return values + torch.where(bad, values - values.detach(), 1.0).sqrt() - (~bad).float(), *rewards

    monkeypatch.setattr(PreferenceTrainer, "_losses", bad_for_seven)
    model = tiny_model("llama")
    before = weights(model).clone()
    trainer = PreferenceTrainer(
        model, config(tmp_path, per_device_train_batch_size=12), train_dataset=some_pairs(12)
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="gradient of pair 7 is not finite at step 0"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_a_model_with_bad_weights_is_not_kept(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"the weight .* is not finite after step 1"):
        train_tiny(tmp_path, learning_rate=1e39, warmup_ratio=0.0, max_steps=1)
    assert not (tmp_path / "out" / "config.json").exists()


def test_tiny_log_ratios_add_up_as_in_float64():
    number, ratio = 4096, 1e-3
    rewards = np.full(number, ratio, np.float32)
    ids = list(range(4, 4 + 90))
    columns = {"pair_id": [0], "prompt_ids": [[5]], "chosen_ids": [(ids * 46)[:number]], "rejected_ids": [[6]]}
    table = make_table("scores", {**columns, "chosen_rewards": [rewards], "rejected_rewards": [[0.0]]})
    assert response_sums(table, "rewards")[0][0] == pytest.approx(number * ratio, rel=1e-6)
    in_bfloat16 = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(number):
        in_bfloat16 += ratio
    assert float(in_bfloat16) < 0.6 * number * ratio  # what the promise is against


def test_a_bfloat16_model_gives_log_probabilities_in_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    prepare_model(model)
    batch = pack([Pair(0, (5, 6), (7, 8, 9), (10, 11))])
    assert token_logps(model, batch).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert token_logps(tiny_model("llama"), batch).dtype == torch.float32


# --- processes ------------------------------------------------------------------------------------------------------


def test_the_order_of_the_pairs_is_the_trainers_own_and_every_pair_comes_once():
    for epoch in (0, 3):
        theirs = SeedableRandomSampler(range(11), data_seed=5)
        theirs.set_epoch(epoch)
        ours = list(PairSampler(11, 4, 5, lambda epoch=epoch: epoch))
        assert ours[:11] == list(theirs)
        assert ours[11:] == [NO_PAIR]
    assert list(PairSampler(4, 4, None)) == [0, 1, 2, 3]


def test_an_update_with_no_pair_of_its_own_does_nothing(tmp_path):
    trainer = PreferenceTrainer(tiny_model("llama"), config(tmp_path), train_dataset=some_pairs(4))
    assert trainer.data_collator([None, None]) == {"batches": [], "references": [], "num_pairs": 0}
    trainer.args.per_device_train_batch_size = 3
    loader = trainer.get_train_dataloader()
    assert sum(inputs["num_pairs"] for inputs in loader) == 4


def test_one_process_needs_no_group():
    assert (processes.size(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.on_main(lambda: pairs_table) is pairs_table
    assert not torch.distributed.is_initialized()


def test_a_run_of_a_selection_without_order_is_refused(tmp_path):
    columns = {"pair_id": [3], "prompt_ids": [[5]]}
    for side in ("chosen", "rejected"):
        columns |= {f"{side}_ids": [[5, 6, 7]], f"{side}_positions": [[1, 0]], f"{side}_weights": [[1.0, 1.0]]}
    write_table(tmp_path / "selection", make_table("selection", columns))
    with pytest.raises(Exception, match="pair 3: the chosen key tokens are not in ascending order"):
        read_table(tmp_path / "selection", "selection")
