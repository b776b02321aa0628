"""Statistics that TRL logs, read from the blocks of logits of the loss, against float64."""

import pytest
import torch
from torch import nn

from sepo.kernels import lm_head
from sepo.kernels.lm_head import HeadLimits, LogitTransform, target_logps
from sepo.trl.statistics import TokenStatistics

NAMES = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class Scaled(nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, hidden):
        return super().forward(hidden) * 1.5


@pytest.mark.parametrize("head_class", [nn.Linear, Scaled])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_blocks_are_those_of_all_logits(monkeypatch, head_class, transform, dtype):
    monkeypatch.setattr(lm_head, "CPU_LIMITS", HeadLimits(block_bytes=4 * 64 * 8, block_targets=8, keep_bytes=2**20))
    torch.manual_seed(0)
    head = head_class(16, 300, bias=head_class is Scaled).to(dtype)
    with torch.no_grad():
        head.weight[7] = head.weight[205]  # two equal logits in different blocks
    hidden = torch.randn(21, 16, dtype=dtype) * 3
    logits = transform.apply(head(hidden).double())
    ids = logits.argmax(1)
    ids[::3] = torch.randint(300, ids[::3].shape)
    hidden[1] = 40 * head.weight[7]
    hidden[2] = 40 * head.weight[7]
    ids[1], ids[2] = 7, 205
    logits = transform.apply(head(hidden).double())
    reader = TokenStatistics(ids, NAMES)
    logps = target_logps(hidden, head, ids, transform, reader)
    found = reader.values()
    log_p = logits.log_softmax(1)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(logps.double(), log_p.gather(1, ids[:, None])[:, 0], **close)
    torch.testing.assert_close(found["entropy"].double(), -(log_p.exp() * log_p).sum(1), **close)
    torch.testing.assert_close(found["mean_logits"].double(), logits.mean(1), **close)
    torch.testing.assert_close(found["log_sum_sq_probs"].double(), (2 * log_p).logsumexp(1), **close)
    assert torch.equal(found["is_top1"], logits.argmax(1) == ids)
    assert found["is_top1"].sum() > 5
    assert not found["is_top1"].all()


def test_an_impossible_token_adds_nothing():
    head = nn.Linear(4, 70, bias=True)
    with torch.no_grad():
        head.bias[:64] = float("-inf")
    hidden, ids = torch.randn(3, 4), torch.tensor([64, 66, 69])
    reader = TokenStatistics(ids, NAMES)
    target_logps(hidden, head, ids, LogitTransform(), reader)
    log_p = head(hidden)[:, 64:].log_softmax(1)
    torch.testing.assert_close(reader.values()["entropy"], -(log_p.exp() * log_p).sum(1))
