"""Selective preference optimization: align a language model on the tokens that carry the preference.

The folders are the method, in the order in which data goes through it:

    recipe  data  models  credit  forward  training  evaluate  report  analyse  stages  runs  cli

The public names, imported from their modules when they are first used (so that `import sepo` costs nothing):

>>> import sepo
>>> sepo.select_key_tokens.__module__
'sepo.credit.selection'
"""

import os
import sys

from sepo.lazy import lazy_names

_NAMES = {
    "errors": ["UserError"],
    "recipe.settings": ["LoraSettings", "Recipe"],
    "recipe.reading": ["load_recipe"],
    "data.loading": ["load_preferences"],
    "data.encoding": ["tokenize_pairs"],
    "data.splits": ["sample_pairs", "split_pairs"],
    "models.tokenizer": ["load_tokenizer"],
    "models.weights": ["load_model"],
    "models.saving": ["save_model"],
    "credit.rewards": ["combine_scores", "pair_rewards"],
    "credit.selection": ["select_key_tokens"],
    "forward.packing": ["Pair", "PackedBatch", "pack"],
    "forward.logps": ["token_logps"],
    "forward.prepare": ["prepare_model"],
    "forward.scoring": ["dataset_logps"],
    "training.trainer": ["PreferenceConfig", "PreferenceTrainer"],
    "report.build": ["build_report"],
    "report.figures": ["save_figures"],
    "report.notebook": ["display"],
    "rewards.function": ["token_rewards"],
    "api": ["plan_run", "run_recipe"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)

# OpenMP reads its variables when PyTorch starts. Left to itself, a thread without work spins, which gains little on a
# machine of one's own and takes the cores from everybody else's work on a shared one (docs/performance.md).
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


__getattr__ = lazy_names(__name__, {name: f"sepo.{module}" for name, module in _MODULE_OF.items()})


def __dir__() -> list[str]:
    return __all__
