"""The most memory that a process held, as the system counts it."""

import gc

import pytest
import torch

from sepo.forward.memory import PeakMemory, keep_freed_memory

MILLION = 1_000_000  # float32 numbers are 4 MB


def test_a_peak_is_what_was_held_at_a_time_and_is_forgotten_at_a_restart():
    keep_freed_memory()  # as trainings do: what is freed stays with the process
    whole = PeakMemory()
    before = whole.gb()
    if before is None:
        pytest.skip("this system does not reset a process's peak")
    large = torch.ones(100 * MILLION)
    del large
    gc.collect()
    assert whole.gb() > before + 0.35
    part = PeakMemory()  # of what follows alone
    small = torch.ones(25 * MILLION)
    assert before + 0.08 < part.gb() < before + 0.25
    assert whole.gb() > before + 0.35  # goes on meanwhile
    part.restart()
    del small
    assert whole.gb() > before + 0.35
    assert part.gb() < whole.gb() - 0.2


def test_a_process_that_turns_to_a_gpu_on_its_way_counts_what_it_held_there(monkeypatch):
    whole = PeakMemory()
    if whole.gb() is None:
        pytest.skip("this system does not reset a process's peak")
    PeakMemory()  # the host's mark is noted
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert whole.gb() == 0.012
    PeakMemory()
    assert whole.gb() == 0.012
