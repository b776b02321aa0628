"""What a dry run says of the memory that evaluation needs."""

import torch

from sepo.models.config import describe_model
from sepo.recipe.reading import parse_recipe
from sepo.stages.evaluate import generating_memory
from sepo.stages.stage import Sizes
from tiny_models import CONFIGS


def test_the_memory_of_generation_is_one_model_and_the_cache_of_one_batch():
    figures = describe_model(CONFIGS["llama"]())
    assert figures["cached"] == 2 * 2 * 2 * 12  # keys and values, layers, heads of keys, their width
    assert describe_model(CONFIGS["qwen3"]())["cached"] == 2 * 2 * 2 * 16
    assert describe_model(CONFIGS["gpt2"]())["cached"] == 2 * 2 * 48
    sizes = Sizes(100, 50, 10_000, 5_000, 50, figures, figures, torch.device("cpu"))

    def cache(**settings):
        recipe = parse_recipe({"eval": {"prompts": 40, "max_new_tokens": 156, **settings}}, "test")
        return (generating_memory(recipe, sizes) / 4 - figures["parameters"]) / figures["cached"]

    assert cache() == 40 * 256  # all of them at once
    assert cache(samples=2) == 64 * 256  # 16,384 tokens
    assert cache(samples=2, batch_size=3) == 3 * 256
    assert cache(prompts=0) == 0
