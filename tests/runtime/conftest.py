"""Every cache under test starts in poisoned memory, so that no result depends on what was there."""

import pytest
import torch
from pools import poison_

_EMPTY, _EMPTY_LIKE = torch.empty, torch.empty_like


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poison_(_EMPTY(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: poison_(_EMPTY_LIKE(*a, **kw)))


@pytest.fixture(autouse=True)
def thread_count():
    """Restore torch's threads after a test that changes them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
