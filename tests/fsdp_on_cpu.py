"""FSDP2 on CPUs: Accelerate offers it for GPUs only and silently uses plain DDP otherwise.

PyTorch's `fully_shard` works over gloo. So Accelerate is told that the launch runs on GPUs, with the CPU as the device;
all further code is the same as on GPUs.
"""

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def enable() -> None:
    """Set up FSDP in this process of a launch; call it before anything else asks Accelerate for the device."""
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

    def set_device(self) -> None:
        self.device = torch.device("cpu")

    PartialState.set_device = set_device
