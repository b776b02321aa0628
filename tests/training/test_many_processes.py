"""Training on several processes gives the losses and weights of one process, for any number of pairs."""

import json
import os
from pathlib import Path

import pytest

import fsdp_on_cpu
import spawn
from many_processes import run
from pairs import some_pairs
from sepo import processes
from sepo.errors import UserError
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import table_pairs
from sepo.planning.cost import TrainingMemory
from sepo.planning.memory import parts_of
from sepo.planning.sizes import model_shape
from sepo.recipe.settings import TrainingSettings
from tiny_models import tiny_model

DEEPSPEED = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
             "gradient_accumulation_steps": "auto"}  # fmt: skip

HERE = Path(__file__).parents[1]
# In the ordinary run: fewer pairs than a batch, and a last batch that leaves a process without one.
SIZES = {False: (3, 17), True: (3, 17, 20, 24)}
slow = pytest.mark.slow
# The ordinary run has two processes; three are for the nightly one.
NUMBERS = [2, pytest.param(3, marks=pytest.mark.nightly)]


def launch(number, folder, objective, sizes, **variables):
    """Train on each size in `number` processes; returns the results by size."""
    environment = environment_of(variables)
    command = [str(HERE / "many_processes.py"), str(folder), objective, ",".join(map(str, sizes))]
    if "ACCELERATE_USE_DEEPSPEED" in variables:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), *command]
    else:
        command.append(str(number))
    return result_of(command, environment)


def environment_of(variables):
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]), "OMP_NUM_THREADS": "1",
        **variables,
    }  # fmt: skip


def result_of(command, environment):
    """What the main process of a launch printed."""
    done = spawn.run(command, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def sizes(nightly_run):
    return SIZES[nightly_run]


@pytest.fixture(scope="module")
def one_process(made_once, sizes, nightly_run):
    """Results of one process by objective and size."""

    def fill(folder):
        objectives = ("dpo", "simpo") if nightly_run else ("dpo",)
        results = {objective: run(folder / objective, objective, list(sizes)) for objective in objectives}
        (folder / "results.json").write_text(json.dumps(results))

    return json.loads((made_once("one-process", fill) / "results.json").read_text())


@slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_any_number_of_pairs_trains_evaluates_and_saves_as_in_one_process(
    tmp_path, one_process, sizes, number, sharded
):
    """Some processes get no pair (3 pairs on 3 processes, the last batch of 17 and 20 on 2), and nothing hangs."""
    objective = "simpo" if sharded and number == 3 else "dpo"
    results = launch(number, tmp_path, objective, sizes, **(fsdp_on_cpu.ENVIRONMENT if sharded else {}))
    shape = model_shape(tiny_model("llama"))
    need = TrainingMemory(shape, TrainingSettings(), "cpu", 64, 64, 64, processes=number, sharded=sharded)
    plan = parts_of(need)
    assert results.keys() == one_process[objective].keys()
    for size, expected in one_process[objective].items():
        assert results[size]["losses"] == pytest.approx(expected["losses"], abs=2e-5), f"{size} pairs"
        assert results[size]["eval"] == pytest.approx(expected["eval"], abs=2e-5), f"{size} pairs"
        assert results[size]["wrapper"].startswith("FSDP" if sharded else "DistributedDataParallel")
        weights, moments = results[size]["own_bytes"]
        # Bytes of the main process, which has the larger share of a tensor that cannot be sharded evenly.
        assert weights == pytest.approx(4 * shape.parameters / (number if sharded else 1), rel=0.03)
        assert moments == pytest.approx(plan["AdamW"], rel=0.03)
        assert results[size]["reduced_every_row"] or not sharded
        assert results[size]["weights"] == pytest.approx(expected["weights"], rel=1e-5), f"{size} pairs"


# Replicas × shards: each weight is whole twice over, in two processes each time.
HSDP = {
    **fsdp_on_cpu.ENVIRONMENT, "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}  # fmt: skip


@pytest.mark.nightly
def test_two_replicas_of_two_shards_train_as_one_process(tmp_path, one_process, sizes):
    """HSDP on four processes: the losses and weights of one, and half of the weights and moments in each."""
    results = launch(4, tmp_path, "dpo", sizes, **HSDP)
    shape = model_shape(tiny_model("llama"))
    for size, expected in one_process["dpo"].items():
        assert results[size]["losses"] == pytest.approx(expected["losses"], abs=2e-5), f"{size} pairs"
        assert results[size]["eval"] == pytest.approx(expected["eval"], abs=2e-5), f"{size} pairs"
        assert results[size]["weights"] == pytest.approx(expected["weights"], rel=1e-5), f"{size} pairs"
        assert results[size]["own_bytes"] == pytest.approx([2 * shape.parameters, 4 * shape.parameters], rel=0.03)
        assert results[size]["reduced_every_row"]


@pytest.mark.nightly
@pytest.mark.parametrize("number", [1, 4])
def test_a_sharded_training_continues_with_another_number_of_processes(tmp_path, number):
    """FSDP2 on two processes, stopped in the middle of an epoch, writes one file a process (SHARDED_STATE_DICT)."""

    def train(folder, stop, number):
        command = [str(HERE / "sharded_checkpoints.py"), str(folder), str(stop), str(number)]
        return result_of(command, environment_of(fsdp_on_cpu.ENVIRONMENT))

    whole = train(tmp_path / "whole", 0, 2)
    assert len(whole) == 8
    assert train(tmp_path / "stopped", 3, 2) == pytest.approx(whole[:3], abs=1e-7)
    shards = sorted(
        path.name for path in (tmp_path / "stopped/checkpoints/checkpoint-3").glob("pytorch_model_fsdp_0/*")
    )
    assert shards == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert train(tmp_path / "stopped", 0, number) == pytest.approx(whole, abs=2e-5)


@slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_adds_up_the_gradients_of_one_process(tmp_path, one_process, sizes, stage):
    """Over several updates, since AdamW's first step does not depend on the scale of the gradients."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({**DEEPSPEED, "zero_optimization": {"stage": stage}}))
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    results = launch(2, tmp_path, "dpo", sizes, DS_ACCELERATOR="cpu", **variables)
    for size, expected in one_process["dpo"].items():
        assert results[size]["losses"] == pytest.approx(expected["losses"], abs=2e-5), f"{size} pairs"
        assert results[size]["eval"] == pytest.approx(expected["eval"], abs=2e-5), f"{size} pairs"
        assert results[size]["wrapper"] == "DeepSpeedEngine"
        whole, _ = expected["own_bytes"]
        assert results[size]["own_bytes"][0] == pytest.approx(whole / (2 if stage == 3 else 1), rel=0.03)
        assert results[size]["weights"] == pytest.approx(expected["weights"], rel=1e-5), f"{size} pairs"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "gpt2"])
def test_gradients_come_in_one_order_whatever_a_row_holds(architecture):
    """DeepSpeed matches the gradients of several rows by their order, not by their weight."""
    model = tiny_model(architecture)
    prepare_model(model)
    model.train()
    pairs = table_pairs(some_pairs(12))
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: order.append(name) and None)
    orders = set()
    for number in (1, 2, 5, 12):
        order.clear()
        token_logps(model, pack(pairs[:number])).sum().backward()
        orders.add(tuple(order))
    assert len(orders) == 1


@pytest.mark.parametrize("by", ["stage", "file"])
def test_zero_3_of_the_launcher_has_frozen_models_read_sharded(by, tmp_path, monkeypatch):
    """A model too large to train unsharded is too large to score unsharded."""
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    file = tmp_path / "zero.json"
    for stage in (2, 3):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        if by == "stage":
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        else:
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        assert processes.read_sharded() == (stage == 3)
    if by == "file":
        file.write_text("{")
        with pytest.raises(UserError, match=r"zero.json' cannot be read"):
            processes.read_sharded()
