"""What a dry run says of the memory that evaluation needs, and of whose tokens a pass reads."""

from dataclasses import replace

import pytest

from sepo.forward.scoring import Types
from sepo.planning.cost import ModelSize, PairSizes, Sizes
from sepo.planning.memory import parts_of
from sepo.planning.sizes import model_shape
from sepo.planning.stages import evaluation, logps
from sepo.recipe.reading import parse_recipe
from tiny_models import CONFIGS


def test_the_memory_of_generation_is_one_model_and_the_cache_of_one_batch():
    shape = model_shape(CONFIGS["llama"]())
    assert 2 * shape.layers * shape.keys == 2 * 2 * 2 * 12  # keys and values, layers, heads of keys, their width
    model = ModelSize("tiny", None, shape)
    pairs = PairSizes(pairs=100, tokens=10_000, scored=8_000, chosen=2_000, rejected=2_000, longest=300)
    sizes = Sizes(
        pairs, pairs, prompts=50, prompt_tokens=5_000, longest_prompt=100, small=model, large=model, device="cpu"
    )

    def parts(**settings):
        recipe = parse_recipe({"eval": {"prompts": 40, "max_new_tokens": 156, **settings}}, "test")
        return parts_of(evaluation(sizes, recipe, start_scored=True).memory)

    def cached(**settings):
        return parts(**settings)["cache"] / (4 * 2 * shape.layers * shape.keys)

    assert parts()["weights"] == 4 * shape.parameters  # policy and base come one after the other
    assert cached() == 40 * 256  # all of them at once
    assert cached(samples=2) == 64 * 256  # 16,384 tokens
    assert cached(samples=2, batch_size=3) == 3 * 256
    assert cached(prompts=0) == 0


@pytest.mark.parametrize("role", ["policy_start", "policy_reference"])
def test_a_pass_for_the_policy_reads_the_policys_tokens_with_a_model_of_its_size(role):
    small, large = (ModelSize(name, None, model_shape(CONFIGS[name]())) for name in ("gpt2", "llama"))
    pairs = PairSizes(pairs=100, tokens=10_000, scored=8_000, chosen=2_000, rejected=2_000, longest=300)
    sizes = Sizes(pairs, PairSizes(), 50, 5_000, 100, small=small, large=large, device="cpu")
    sizes = replace(sizes, policy=replace(sizes, train=replace(pairs, scored=9_000)))
    cost = logps(sizes, parse_recipe({}, "test"), role, Types("float32"))
    assert {estimate.model for estimate in cost.estimates} == {large}
    assert cost.tokens == 9_000
    assert logps(sizes, parse_recipe({}, "test"), "reference", Types("float32")).tokens == 8_000
