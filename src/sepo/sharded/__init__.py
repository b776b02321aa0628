"""Wing: checkpoints of shards, written while training goes on, which any launch continues from.

`shards`       a file a process with its shards of named tensors, readable by any number of processes
`checkpoints`  checkpoints of such files, written while training goes on (`training.checkpoints: sharded`)
"""

from __future__ import annotations

from sepo import processes
from sepo.errors import UserError
from sepo.recipe.settings import Recipe


def check(recipe: Recipe) -> None:
    """Raise a UserError if a training asks for sharded checkpoints under DeepSpeed, which writes its own."""
    for name, section in (
        ("reference.sft", recipe.reference.sft),
        ("oracle", recipe.oracle),
        ("policy", recipe.policy),
    ):
        if section is None or section.training.checkpoints != "sharded":
            continue
        enable()  # for commands that ask for no extension of their own
        if processes.sharding() == "deepspeed" or "deepspeed" in section.training.arguments:
            raise UserError(f"{name}.training.checkpoints: DeepSpeed writes checkpoints of its own, so set it to whole")


def enable() -> None:
    """Let trainings write sharded checkpoints."""
    from sepo.sharded.checkpoints import SaveInBackground
    from sepo.training.checkpoints import SAVING

    SAVING["sharded"] = SaveInBackground
