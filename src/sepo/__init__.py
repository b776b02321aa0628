"""Selective preference optimization: align a language model on the tokens that carry the preference.

The public names, imported from their rooms when they are first used (so that `import sepo` costs nothing):

>>> import sepo
>>> sepo.select_key_tokens.__module__
'sepo.selection'
"""

from importlib import import_module

_ROOMS = {
    "errors": ["UserError"],
    "loading": ["load_preferences"],
    "data": ["sample_pairs", "split_pairs", "tokenize_pairs"],
    "models": ["LoraSettings", "load_model", "load_tokenizer", "save_model"],
    "packing": ["Pair", "PackedBatch", "pack"],
    "logps": ["dataset_logps", "prepare_model", "token_logps"],
    "rewards": ["combine_scores", "token_rewards"],
    "selection": ["select_key_tokens"],
    "trainer": ["PreferenceConfig", "PreferenceTrainer"],
    "recipe": ["Recipe", "load_recipe"],
    "pipeline": ["run_recipe"],
    "report": ["build_report", "display", "save_figures"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'sepo' has no attribute '{name}'")
    return getattr(import_module(f"sepo.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
