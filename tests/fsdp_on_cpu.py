"""FSDP2 between processes on CPUs: Accelerate offers it for GPUs alone, and takes plain DDP without a word otherwise.

PyTorch's own `fully_shard` works over gloo. So the launch is presented to Accelerate as one of GPUs whose device is the
CPU; what is tested beyond that line is what runs on GPUs.
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
    """Let this process of a launch take part; before anything else asks Accelerate where it runs."""
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

    def set_device(self) -> None:
        self.device = torch.device("cpu")

    PartialState.set_device = set_device
