"""Dry runs: the work that they count is the work that a run does, and what is not here can still be planned."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoConfig

from sepo.api import extension_of, run_recipe
from sepo.cli import main
from sepo.evaluate import generate
from sepo.forward import scoring as passes
from sepo.planning.cost import Cost, Estimate, FrozenMemory
from sepo.planning.memory import parts_of
from sepo.planning.plan import Planner, Target, _by_units, plan_stages, throughputs_of, warm_up_lines
from sepo.planning.sizes import load_shape, method_sizes, model_shape
from sepo.planning.stages import cost_of
from sepo.recipe.reading import load_recipe
from sepo.recipe.settings import TrainingSettings
from sepo.runs.method import Method
from sepo.targets.auto_rate import USUAL_PROBES, probe_steps
from sepo.targets.until import MEASUREMENTS
from sepo.training import trainer
from sepo.training.trainer import PreferenceConfig
from tiny_models import tiny_model, tiny_tokenizer

RECIPE = """
name: planned
device: cpu
data: {source: "embedded:sentiment", sample: 0.15, held_out: 24, max_length: 160}
reference: {model: MODEL}
oracle: {training: {learning_rate: 1.0e-3, batch_size: 8, num_train_epochs: 2}}
policy: {training: {learning_rate: 1.0e-3, batch_size: 8, tokens_per_row: 400}}
eval: {gold: vader, prompts: 6, samples: 2, max_new_tokens: 9}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_model("llama", initializer_range=0.02).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folder / "model")))
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Counts, while it lasts, what passes, trainings and generation really do."""
    done: Counter = Counter()
    score, losses, step = passes.read_logps, trainer.PreferenceTrainer._batch_loss, generate._Draw.__call__

    def scored(model, batch):
        done["score", "tokens"] += batch.num_tokens
        done["score", "targets"] += len(batch.target_ids)
        return score(model, batch)

    def trained(self, model, batch, reference, mode):
        done["train", "tokens"] += batch.num_tokens
        done["train", "targets"] += len(batch.target_ids)
        return losses(self, model, batch, reference, mode)

    def drawn(self, ids, scores):
        done["generate", "steps"] += 1
        return step(self, ids, scores)

    monkeypatch.setattr(passes, "read_logps", scored)
    monkeypatch.setattr(trainer.PreferenceTrainer, "_batch_loss", trained)
    monkeypatch.setattr(generate._Draw, "__call__", drawn)
    return done


def planned(recipe, folder) -> tuple[Method, dict[str, Cost]]:
    """The method of a recipe, and what each of its stages costs, without training."""
    planner = Planner(folder)
    method = Method(recipe, planner, extension=extension_of(recipe))
    plan_stages(method)
    sizes = method_sizes(method, "cpu")
    return method, {role: cost_of(stage, sizes) for role, stage in planner.stages.items()}


def planned_work(costs: dict[str, Cost]) -> Counter:
    total: Counter = Counter()
    for cost in costs.values():
        for part in cost.estimates or ():
            for name in ("tokens", "targets", "updates", "steps"):
                total[part.kind, name] += getattr(part, name)
    return total


def test_the_work_that_is_counted_is_the_work_of_the_run(workplace, tmp_path, counted):
    """Tokens read and sent through the LM head, optimizer steps, decoding steps."""
    recipe = load_recipe(workplace / "recipe.yaml", [f"output_dir={tmp_path / 'run'}", "data.sample=0.08"])
    _, costs = planned(recipe, tmp_path / "planned")
    counted.clear()
    expected = planned_work(costs)
    run_recipe(recipe)
    steps = [json.loads((tmp_path / "run" / name / "trainer_state.json").read_text())["global_step"]
             for name in ("oracle", "policy")]  # fmt: skip
    assert expected["train", "updates"] == sum(steps)
    # A pair's last tokens are not read, and a share of tokens is rounded in every response. Prompts are read by
    # generation itself, but a plan counts them as a pass.
    for name in ("tokens", "targets"):
        assert counted["train", name] == pytest.approx(expected["train", name], rel=0.05)
    assert counted["score", "targets"] == pytest.approx(expected["score", "targets"], rel=0.1)
    assert counted["score", "tokens"] == pytest.approx(expected["score", "tokens"], rel=0.15)
    # A response may end before it must.
    assert 0.5 * expected["generate", "steps"] <= counted["generate", "steps"] <= expected["generate", "steps"]


def test_measurements_on_the_way_to_a_target_are_counted(workplace, tmp_path, counted):
    """No held-out accuracy exceeds 1, and none of these labels is perfect: the training lasts its whole length."""
    small = ["data.sample=0.05", "eval.prompts=4", "oracle.training.num_train_epochs=1"]
    plain = load_recipe(workplace / "recipe.yaml", small)
    aimed = load_recipe(workplace / "recipe.yaml", [*small, "oracle.target_accuracy=1", f"output_dir={tmp_path / 'a'}"])
    costs, plain_costs = planned(aimed, tmp_path / "planned")[1], planned(plain, tmp_path / "plain")[1]
    expected = planned_work({role: costs[role] for role in ("reference_logps", "oracle")})
    before = planned_work(plain_costs)
    assert planned_work(costs)["score", "targets"] > before["score", "targets"]
    counted.clear()
    run_recipe(aimed, until="oracle")
    assert counted["score", "targets"] == pytest.approx(expected["score", "targets"], rel=0.1)

    to_kl = ("policy.target_kl=1", "policy.training.learning_rate=auto")
    auto_costs = planned(load_recipe(workplace / "recipe.yaml", [*small, *to_kl]), tmp_path / "auto")[1]
    auto = planned_work(auto_costs)
    assert len(warm_up_lines(auto_costs)) == 2  # of the oracle and the policy; a probe has no warm-up
    steps = round(before["train", "updates"] / 2)  # oracle and policy pass over the pairs once
    assert auto["train", "updates"] == before["train", "updates"] + USUAL_PROBES * probe_steps(steps)
    # The evaluation samples as often for the start and the policy as a measurement does once.
    assert auto["generate", "steps"] > before["generate", "steps"] + MEASUREMENTS * 9 - 1


@pytest.mark.parametrize(("ratio", "updates"), [(0.03, 16), (0.5, 2), (0.0, 16), (0.9, 1)])
def test_a_first_update_without_effect_is_named(ratio, updates, tmp_path):
    training = TrainingSettings(warmup_ratio=ratio)
    steps = PreferenceConfig(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True).get_warmup_steps(updates)
    cost = Cost("DPO", estimates=(Estimate("train", None, updates=updates, training=training),))
    assert [line.split(":")[0] for line in warm_up_lines({"oracle": cost})] == ["oracle"] * (steps > 0)


def test_times_are_measured_where_the_model_is_here_and_say_where_not(workplace, tmp_path, capsys):
    recipe = str(workplace / "recipe.yaml")
    assert main(["run", recipe, f"output_dir={tmp_path / 'new'}", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "by FLOPs" not in shown.out
    for words in ("loading", "a scored row", "a training row", "decoding steps"):
        assert f"measuring {words} of model" in shown.err
    loaded = load_recipe(recipe, [f"output_dir={tmp_path / 'new'}"])
    method, costs = planned(loaded, tmp_path / "planned")
    throughputs = throughputs_of(method)
    throughputs.measure = False
    assert all(not throughputs.of(part).measured for part in costs["oracle"].estimates)


@pytest.fixture
def outline(tmp_path):
    """A folder with the config of a model of 70 billion weights, and nothing else."""
    folder = tmp_path / "large"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
              "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
              "vocab_size": 128256, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_policy_of_which_only_the_config_is_here_is_planned_and_not_run(workplace, tmp_path, outline, capsys):
    assert load_shape(outline).parameters == pytest.approx(70.55e9, rel=1e-3)
    common = ["run", str(workplace / "recipe.yaml"), f"policy.model={outline}", f"output_dir={tmp_path / 'new'}",
              "device=auto"]  # fmt: skip
    assert main([*common, "--dry-run", "--processes", "8", "--device-memory", "80"]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown[shown.index("memory of each device") :].splitlines() if line.startswith("train ")]
    assert len(rows) == 2
    assert all(" no " in row for row in rows)
    assert "FSDP over 32, activation_checkpointing" in rows[1]
    advice = [line.rsplit("│", 1)[1].strip() for line in shown[shown.index(rows[0]) :].splitlines()[:2]]
    assert "lora, quantization=4bit" in " ".join(advice)  # it may go on in the next line
    assert main(common) == 2
    assert "holds no *.safetensors file" in capsys.readouterr().err
    assert main([*common, "--dry-run"]) == 2  # no device is named that would make it a plan for elsewhere
    assert not (tmp_path / "new").exists()


def test_several_machines_are_planned_with_replicas_of_shards_and_with_passes_as_units(
    workplace, tmp_path, outline, capsys
):
    """The oracle of 70 billion weights is held by the eight devices of a machine; there are four such groups."""
    common = ["run", str(workplace / "recipe.yaml"), f"policy.model={outline}", f"output_dir={tmp_path / 'new'}",
              "device=auto", "policy.objective=dpo", "policy.training.checkpoints=sharded", "engine=files@8",
              "--dry-run", "--device-memory", "80"]  # fmt: skip
    assert main([*common, "--processes", "4x8", "--device-tflops", "400"]) == 0
    shown = capsys.readouterr().out
    memory, units = shown[shown.index("memory of each device") :].split("passes as units of 1,000 pairs")
    rows = [line for line in memory.splitlines() if line.startswith("train ")]
    assert all(how in row for how, row in zip(("whole weights", "HSDP, 4 x 8", "FSDP over 32"), rows, strict=True))
    small = next(line for line in units.splitlines() if line.startswith("reference_logps "))
    assert "32 of 1 device" in small
    assert "~" in small
    assert small.rstrip(" │").endswith("files")
    assert re.search(r"train: a checkpoint has 846\.\d GB; each process copies 26\.5 GB to the host's memory", units)
    assert "(by FLOPs)" in shown


def test_units_of_a_pass_are_for_the_smallest_group_of_devices_that_holds_the_model():
    shape = model_shape(AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256))  # fmt: skip
    need = FrozenMemory(shape, "cuda", 2, 16384, 14000, processes=32)
    cost = Cost("a pass", pairs=1_000_000, memory=need)
    found = _by_units(cost, 32_000.0, Target(32, 80e9, nodes=4))
    assert (found.number, found.devices, found.groups) == (1000, 8, 4)
    assert found.simulated.seconds == pytest.approx(1000)
    assert found.simulated.busy == pytest.approx(1)
    assert _by_units(cost, 32_000.0, Target(32, 300e9, nodes=4)).devices == 1
    hybrid, full = (replace(need, sharded=True, replicas=replicas) for replicas in (4, 1))
    assert parts_of(hybrid)["weights"] - parts_of(full)["weights"] == pytest.approx(2 * shape.parameters * 3 / 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "are for a --dry-run"),
        (["--device-memory", "80"], "are for a --dry-run"),
        (["--device-tflops", "400"], "are for a --dry-run"),
        (["--dry-run", "--processes", "4x"], "or NODESxDEVICES such as 4x8"),
        (["--dry-run", "--processes", "0x8"], "or NODESxDEVICES such as 4x8"),
        (["--dry-run", "--device-tflops", "0"], "FLOPs a second"),
        (["--dry-run", "--processes", "0"], "expected the number of devices"),
        (["--dry-run", "engine=fils"], "did you mean 'files'"),
        (["--dry-run", "--device-memory", "-1"], "expected gigabytes"),
        (["--dry-run", "--device-memory", "nan"], "expected gigabytes"),
        (["--dry-run", "--device-memory", "8e10"], "expected gigabytes"),
    ],
)
def test_devices_that_cannot_be_are_refused(workplace, options, message, capsys):
    assert main(["run", str(workplace / "recipe.yaml"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_small_run_fits_and_is_told_so(workplace, tmp_path, capsys):
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    command = ["run", str(workplace / "recipe.yaml"), f"output_dir={tmp_path / 'new'}", "--dry-run"]
    assert main([*command, "--device-memory", "8"]) == 0
    shown = capsys.readouterr().out
    memory = shown[shown.index("memory of each device") :]
    for stage in ("reference_logps", "oracle", "oracle_logps", "train", "eval"):
        (row,) = [line for line in memory.splitlines() if line.startswith(f"{stage} ")]
        assert " yes " in row, row
