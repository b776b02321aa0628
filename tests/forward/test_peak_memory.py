"""The peak memory of a process, as the system counts it."""

import gc

import pytest
import torch

from sepo.forward.memory import PeakMemory, keep_freed_memory

MILLION = 1_000_000  # float32 numbers are 4 MB


def test_a_peak_includes_freed_memory_until_a_restart():
    keep_freed_memory()  # as in training: the process keeps freed memory
    whole = PeakMemory()
    before = whole.gb()
    if before is None:
        pytest.skip("this system does not reset a process's peak")
    large = torch.ones(100 * MILLION)
    del large
    gc.collect()
    assert whole.gb() > before + 0.35
    part = PeakMemory()  # measures from here on
    small = torch.ones(25 * MILLION)
    assert before + 0.08 < part.gb() < before + 0.25
    assert whole.gb() > before + 0.35  # still measures
    part.restart()
    del small
    assert whole.gb() > before + 0.35
    assert part.gb() < whole.gb() - 0.2


def test_a_process_that_starts_to_use_a_gpu_reports_its_gpu_memory(monkeypatch):
    whole = PeakMemory()
    if whole.gb() is None:
        pytest.skip("this system does not reset a process's peak")
    PeakMemory()  # makes `whole` store the host's mark
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert whole.gb() == 0.012
    PeakMemory()
    assert whole.gb() == 0.012
