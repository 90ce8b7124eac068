"""Fragments of `mma.m16n8k16` against the tables of the PTX manual (ISA 9.7.16.5.8)."""

from itertools import product

import numpy
import pytest
import torch
from configurations import HALF, config_id

from kivi_tvm import layout
from kivi_tvm.config import HEAD_DIMS
from kivi_tvm.ops import fragments
from kivi_tvm.ops.fragments import LANES, FullTile, HalfTile

# The manual's words: groupID = %laneid >> 2, threadID_in_group = %laneid % 4.
GROUPS = [(lane >> 2, lane % 4) for lane in range(LANES)]


def test_multiplicand_a():
    """A lane's four registers hold a0 .. a7, pairs of float16."""
    for lane, (group, thread) in enumerate(GROUPS):
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            assert fragments.a_lane(row, column) == lane
            assert fragments.a_register(row, column) == i // 2 and column % 2 == i % 2


def test_multiplicand_b():
    for lane, (group, thread) in enumerate(GROUPS):
        for i in range(4):
            row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
            assert fragments.b_lane(row, group) == lane
            assert fragments.b_register(row) == i // 2 and row % 2 == i % 2


def test_accumulator():
    for lane, (group, thread) in enumerate(GROUPS):
        for i in range(4):
            row, column = group if i < 2 else group + 8, thread * 2 + (i & 1)
            assert fragments.c_lane(row, column) == lane
            assert fragments.c_register(row, column) == i


@pytest.mark.parametrize("cfg", HALF, ids=config_id)
def test_every_lane_finds_its_codes_in_the_words_that_it_loads(cfg):
    """A pair of codes in a word is what the operand holds there: pack order and fragments agree."""
    key = cfg.kernel_key()
    tile, order = HalfTile(key), layout.value_order(key)
    unit = tile.unit_tokens // fragments.QUERIES  # matrices
    for matrix, c, half in product(range(tile.matrices), range(4), range(2)):
        token, number = int(tile.token(matrix, 2 * c + half)), matrix % unit
        found = order.word(token), order.slot(token)
        if order.words_together == 4:
            assert found == (matrix // unit * 4 + c, half * tile.value_pairs + number)
        else:  # a byte of the word is what `value_word_blocks` takes from one of a piece's two
            piece, place = divmod(number, 4)
            assert found == (piece * 2 + c // 2, half * tile.value_pairs + c % 2 * 4 + place)
    keys = layout.key_order(key)
    for word, pair, half in product(range(2), range(tile.key_pairs), range(2)):
        channel = word * key.key_codes_per_word + pair + half * tile.key_pairs
        assert (keys.word(channel), keys.slot(channel)) == (word, half * tile.key_pairs + pair)


@pytest.mark.parametrize("cfg", HALF, ids=config_id)
def test_tiles_hold_every_token_and_channel_once(cfg):
    tile = HalfTile(cfg.kernel_key())
    tokens = [tile.token(x, n) for x, n in product(range(tile.matrices), range(8))]
    assert sorted(tokens) == list(range(fragments.TOKENS))
    channels = [tile.channel(t, row) for t, row in product(range(tile.value_rows), range(16))]
    assert sorted(channels) == list(range(cfg.D))
    for product_number in range(tile.value_rows):  # one scale each
        groups = {tile.channel(product_number, row) // cfg.G_v for row in range(16)}
        assert len(groups) == 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lanes_load_what_they_multiply_of_tokens_in_16_bits(head_dim):
    """By `full_score_blocks` and `full_output_blocks`: every channel once, in the right lane."""
    tile = FullTile(head_dim)
    # the 8 channels of a lane `c` of a span are columns of A, and rows of B, of two `mma`
    loaded = [(span, c, o) for span, c, o in product(range(tile.key_spans), range(4), range(8))]
    assert sorted({32 * span + 8 * c + o for span, c, o in loaded})[:head_dim] == [*range(head_dim)]
    for r, half in product(range(2), range(2)):
        for c in range(4):  # register r of B of the first `mma` is rows 2 c + 8 r + half
            row = 2 * c + 8 * r + half
            assert fragments.b_lane(row, 0) == c and fragments.b_register(row) == r
            assert fragments.a_lane(0, row) == c and fragments.a_register(0, row) == 2 * r
    # lane `(g, c)` has of its channels those that are its rows `g` and `g + 8`
    apart = tile.channels_apart
    assert tile.value_blocks * fragments.QUERIES * apart == head_dim
    channels = []
    for t, row in product(range(tile.value_rows), range(16)):
        own = (tile.block(t) * fragments.QUERIES + row % 8) * apart + tile.place(t, row // 8)
        assert tile.channel(t, row) == own and fragments.a_lane(row, 0) // 4 == row % 8
        channels.append(own)
    assert sorted(channels) == list(range(head_dim))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_subnormal_float16_numbers(bits):
    """What `code_pair` masks out is the code times a power of two, exactly."""
    for pair in range(16 // bits):
        byte, at = fragments.position(bits, pair)
        for code in range(2**bits):
            word = code << (bits * pair)
            masked = (word >> (8 * byte)) & (((1 << bits) - 1) << at)
            half = torch.tensor(masked, dtype=torch.int16).view(torch.float16)
            assert float(half) == code * 2.0 ** (at - 24)
            assert numpy.log2(fragments.CODE_UNIT) == 24
