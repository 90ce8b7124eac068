"""`advance` counts tokens and what of them is packed, and leaves other slots alone."""

import torch
from configurations import FEW, library
from hypothesis import given
from hypothesis import strategies as st
from pools import Pool, assert_same_bits


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 700), st.integers(0, 300)), min_size=1),
    st.sampled_from([32, 96, 128]),
)
def test_state_of_every_slot(rows, R):
    cfg = FEW[0].__class__(**{**FEW[0].to_dict(), "residual_length": R})
    before = [n for n, _ in rows]
    after = [None if n is None else n + new for n, new in rows]
    pool, expected = Pool(cfg, before), Pool(cfg, after)
    tokens = torch.tensor([new for _, new in rows], dtype=torch.int32)
    library(FEW[0])["advance"](pool.state, pool.slots, tokens, R)
    assert_same_bits(pool.state, expected.state, "state")
