"""Models: any name a user may type -> one local folder -> weights in memory, and back to a folder.

names  hub  gguf  folders   a name -> a folder
tokenizer  weights          a folder -> tokenizer, weights
devices  adapters           where and in which types; LoRA through PEFT
checkpoint                  is every weight there, and every one read
saving  shrink              weights -> a folder; some of the layers
fingerprint  config         what a model computes; its size
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "DEFAULT_MODEL": "sepo.recipe.settings",
        "LoraSettings": "sepo.recipe.settings",
        "causal_lm": "sepo.models.adapters",
        "check_model": "sepo.models.names",
        "load_model": "sepo.models.weights",
        "load_tokenizer": "sepo.models.tokenizer",
        "resolve_model": "sepo.models.names",
        "save_model": "sepo.models.saving",
    },
)
