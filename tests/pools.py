"""Page pools and rings as the reference fills them, compared bit for bit."""

from __future__ import annotations

from kivi_tvm.tune import pools
from kivi_tvm.tune.measure import POISON_WORD, bits, poisoned

__all__ = ["POISON_WORD", "Pool", "assert_same_bits", "bits", "poison_", "poisoned"]


def poison_(x):
    """Fill a tensor with poison, in place."""
    return x.copy_(poisoned((), x.dtype)) if x.numel() else x


def assert_same_bits(found, expected, what=""):
    """Fail unless two tensors are equal bit for bit, poison included."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    wrong = bits(found) != bits(expected)
    where = [w.item() for w in wrong.nonzero()[0]] if wrong.any() else None
    assert where is None, f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}"


class Pool(pools.Pool):
    """A pool that can be compared with another."""

    def assert_equals(self, expected):
        """Fail unless every buffer, table and the state equal another pool's."""
        for name, buffer in expected.buffers.items():
            assert_same_bits(self.buffers[name], buffer, name)
        assert_same_bits(self.state, expected.state, "state")
        assert_same_bits(self.table, expected.table, "page_table")
