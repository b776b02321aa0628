"""Which device a training uses: one in each process, and the one that the recipe names."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from sepo.errors import UserError
from sepo.models.devices import choose_device
from sepo.recipe.settings import SftSettings, TrainingSettings
from sepo.sft import sft_arguments
from sepo.training.fit import training_arguments
from sepo.training.trainer import PreferenceConfig


@pytest.fixture
def four_gpus(monkeypatch):
    """Four GPUs as PyTorch reports them; nothing can run on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=False: True)

    def devices(self):
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(devices))


@pytest.mark.parametrize("kind", ["preferences", "sft"])
def test_several_visible_gpus_do_not_multiply_the_batch(tmp_path, four_gpus, kind):
    settings = TrainingSettings(batch_size=32, bf16=False, arguments={"optim": "adamw_torch"})
    if kind == "sft":
        pytest.importorskip("trl")
        sft = SftSettings(source="data")
        args = sft_arguments(sft, settings, tmp_path, seed=0, device="cpu")
        assert args.train_batch_size * args.gradient_accumulation_steps == 32
    else:
        args = PreferenceConfig(**training_arguments(settings, tmp_path, seed=0, device="cpu"))
        assert args.train_batch_size == 32
    assert args.n_gpu == 1


@pytest.mark.parametrize("bf16", [None, True, False])
def test_a_gpu_that_a_training_cannot_use_is_refused(four_gpus, bf16):
    settings = TrainingSettings(bf16=bf16)
    assert not training_arguments(settings, Path("out"), seed=0, device="cuda:0")["use_cpu"]
    assert choose_device("cuda:1").index == 1
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1 and device=cuda"):
        training_arguments(settings, Path("out"), seed=0, device="cuda:1")
    with pytest.raises(UserError, match="this machine has 4 CUDA devices"):
        training_arguments(settings, Path("out"), seed=0, device="cuda:4")


def test_processes_of_a_launch_do_not_share_a_gpu_that_is_named(four_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cuda").index == choose_device("cuda:2").index == 2
    with pytest.raises(UserError, match="each process of a launch has its own GPU"):
        choose_device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("bf16", [None, True, False])
def test_a_device_that_is_not_there_is_refused_and_not_replaced_by_the_cpu(bf16):
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(UserError, match="is not there"):
            training_arguments(TrainingSettings(bf16=bf16), Path("out"), seed=0, device=device)
