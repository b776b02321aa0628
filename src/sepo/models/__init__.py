"""Models: any name a user may type -> one local folder -> weights in memory, and back to a folder.

names  hub  gguf  folders   name -> folder, config
tokenizer  weights          folder -> tokenizer, weights in memory
devices  adapters           devices and dtypes; LoRA through PEFT
checkpoint                  are all weights present, and all read?
sharding                    models sharded over the processes of a launch
saving  shrink              weights -> folder; models with fewer layers
fingerprint                 hashes of models
limits                      vocabulary and positions of a model
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
