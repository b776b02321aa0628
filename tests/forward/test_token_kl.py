"""The KL at every target for a vocabulary with tokens of probability 0 (logits of -inf)."""

import pytest
import torch
from torch import nn

from pairs import awkward_pairs
from sepo.forward.logps import target_hidden, token_logps
from sepo.forward.packing import pack
from sepo.forward.prepare import prepare_model
from sepo.forward.token_kl import token_logps_and_kl
from sepo.kernels.lm_head import head_logits
from tiny_models import VOCAB_SIZE, tiny_model

GIVEN = 90  # tokens of positive probability; the others have probability 0


def model_with_a_short_vocabulary(seed):
    model = tiny_model("llama", torch.float64, seed=seed)
    head = nn.Linear(48, VOCAB_SIZE, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(torch.linspace(-1, 1, VOCAB_SIZE))
        head.bias[GIVEN:] = -torch.inf
    model.lm_head = head
    return model


def plain(model, reference, pair, side, direction):
    """The formula, over the tokens of positive probability."""
    ids = pair.side(side)[0]
    tokens = torch.tensor([[*pair.prompt_ids, *ids]])
    one, other = (
        m(tokens).logits[0, len(pair.prompt_ids) - 1 : -1, :GIVEN].log_softmax(-1) for m in (model, reference)
    )
    first, second = (other, one) if direction == "forward" else (one, other)
    return (first.exp() * (first - second)).sum(1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tokens_that_are_never_given_add_nothing(direction):
    model, reference = model_with_a_short_vocabulary(0), model_with_a_short_vocabulary(1)
    pairs = [pair for pair in awkward_pairs() if pair.chosen_positions is None and pair.rejected_positions is None]
    expected = torch.cat([plain(model, reference, pair, side, direction) for pair in pairs for side in (0, 1)])
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert prepare_model(model) == prepare_model(reference) == "packed"
    _, kl = token_logps_and_kl(model, reference, pack(pairs), direction)
    torch.testing.assert_close(kl, expected, atol=1e-8, rtol=0)
    kl.sum().backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().clamp(min=1e-3)  # the model's own norms compute in float32
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_token_that_only_the_other_model_gives_is_infinitely_far_or_adds_nothing(direction):
    model, reference = model_with_a_short_vocabulary(0), model_with_a_short_vocabulary(1)
    with torch.no_grad():
        reference.lm_head.bias[GIVEN:] = 0.0  # KL(reference || model) is infinite, KL(model || reference) is not
        for one in (model, reference):
            prepare_model(one)
        _, kl = token_logps_and_kl(model, reference, pack(awkward_pairs()[:1]), direction)
    assert bool(kl.isinf().all() if direction == "forward" else kl.isfinite().all())


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@pytest.mark.parametrize("grad", [True, False])
def test_log_probabilities_beside_a_kl_are_rounded_as_those_of_the_stored_reference(kind, grad):
    """In bfloat16 both sum float32 logits: equal models have log-ratios of 0, and no logit is rounded."""
    model, frozen = (tiny_model("llama", torch.bfloat16 if kind == "bfloat16" else torch.float32) for _ in range(2))
    with torch.no_grad():
        for one in (model, frozen):
            one.lm_head.weight.mul_(8)  # logits of up to 40, which bfloat16 rounds by 0.1
    prepare_model(model)
    prepare_model(frozen)
    batch = pack(awkward_pairs())
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        stored = token_logps(frozen, batch)
        logps, kl = token_logps_and_kl(model, frozen, batch, "forward")
        exact = target_hidden(model, batch).to(torch.bfloat16).float() @ model.lm_head.weight.bfloat16().float().t()
    assert logps.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(logps, stored, atol=1e-4, rtol=0)
    if kind == "bfloat16":
        expected = exact.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
        torch.testing.assert_close(logps, expected, atol=1e-3, rtol=0)
    if grad:
        logps.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_of_half_precision_logits_are_those_of_float32_ones():
    torch.manual_seed(0)
    hidden = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(48, VOCAB_SIZE, dtype=torch.bfloat16)
    weights = torch.randn(7, VOCAB_SIZE)
    (head_logits(head, hidden).log_softmax(-1) * weights).sum().backward()
    got = [hidden.grad.float(), head.weight.grad.float(), head.bias.grad.float()]
    wide, plain_head = hidden.detach().float().requires_grad_(), nn.Linear(48, VOCAB_SIZE)
    plain_head.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    (plain_head(wide).log_softmax(-1) * weights).sum().backward()
    for ours, expected in zip(got, [wide.grad, plain_head.weight.grad, plain_head.bias.grad], strict=True):
        torch.testing.assert_close(ours, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
