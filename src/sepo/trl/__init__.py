"""Wing: this package inside TRL's own trainers.

    prompt_once(trainer)    DPOTrainer and CPOTrainer read each prompt once, without padding

TRL is imported when a function is called, never before: `pip install 'sepo[sft]'` installs it.
"""

from sepo.lazy import lazy_names

_MODULES = {"prompt_once": "forward"}

__all__ = sorted(_MODULES)

__getattr__ = lazy_names(__name__, {name: f"sepo.trl.{module}" for name, module in _MODULES.items()})


def __dir__() -> list[str]:
    return __all__
