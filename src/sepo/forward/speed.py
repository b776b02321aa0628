"""How fast a device multiplies: what estimates of time are made of."""

from __future__ import annotations

import time

import torch

from sepo.forward.gradients import matmul_nt


def matmul_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Measure the matmul FLOP/s of a device in the type that training uses there, by the fastest library at hand."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(shape, device=device).to(kind) for shape in ((1024, 1024), (4096, 1024)))
    rates = []
    for multiply in (matmul_nt, lambda x, w: x @ w.t()):
        done, started = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - started < seconds / 2:
            product = multiply(left, right)
            if device.type != "cpu":
                product[0, 0].item()  # wait for it
            done += 1
        rates.append(done * 2 * 1024 * 1024 * 4096 / (time.perf_counter() - started))
    return max(rates)
