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
def one_thread():
    """Tests that want more say so: on small tensors torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
