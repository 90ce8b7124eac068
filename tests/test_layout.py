"""Shapes, sizes and bit positions, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
from configurations import CONFIGS, HALF, config_id

from kivi_tvm import KiviConfig
from kivi_tvm.config import BITS, PACK_ORDERS, TILE_TOKENS
from kivi_tvm.layout import (
    num_pages,
    pack_order,
    packed_keys,
    packed_values,
    page_buffers,
    ring_buffers,
    split_tokens,
    tokens_of_splits,
    value_order,
)
from kivi_tvm.ops.fragments import TOKENS

CFG = KiviConfig(128, 32, 8, key_bits=2, value_bits=4, residual_length=128, page_size=64)


def test_page_buffers_of_the_design():
    found = {name: (buffer.shape, buffer.dtype) for name, buffer in page_buffers(CFG, 10).items()}
    assert found == {
        "k_code": ((10, 8, 8, 64), "uint32"),
        "k_scale": ((10, 8, 2, 128), "float16"),
        "k_zero": ((10, 8, 2, 128), "float16"),
        "v_code": ((10, 8, 8, 128), "uint32"),
        "v_scale": ((10, 8, 4, 64), "float16"),
        "v_zero": ((10, 8, 4, 64), "float16"),
    }


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.kernel_key().slug)
def test_bits_per_element(cfg):
    """`b + 32 / G` bits per key and value element."""
    found = 8 * sum(buffer.nbytes for buffer in page_buffers(cfg, 3).values())
    elements = 3 * cfg.P * cfg.H_kv * cfg.D
    expected = cfg.key_bits + 32 / cfg.G_k + cfg.value_bits + 32 / cfg.G_v
    assert math.isclose(found / elements, expected)


def test_ring_buffers():
    rings = ring_buffers(CFG, 5, rollback=3)
    assert {b.shape for b in rings.values()} == {(5, 8, 132, 128)}
    assert rings["k_ring"].nbytes == 5 * 8 * 132 * 128 * 2


@pytest.mark.parametrize(
    ("rollback", "window", "sink_tokens", "names"),
    [
        (0, "kivi", 0, "k_ring v_ring"),
        (3, "kivi", 0, "k_ring v_ring k_exact"),
        (3, "exact", 0, "k_ring v_ring"),
        (0, "kivi", 4, "k_ring v_ring k_sink v_sink"),
    ],
)
def test_full_precision_buffers(rollback, window, sink_tokens, names):
    found = ring_buffers(CFG, 1, rollback, window, sink_tokens)
    assert list(found) == names.split()
    assert all(found[name].shape[2] == 4 for name in found if name.endswith("sink"))


@pytest.mark.parametrize(
    ("length", "keys", "values"),
    [(0, 0, 0), (1, 0, 0), (127, 0, 0), (128, 128, 0), (129, 128, 1), (300, 256, 172)],
)
def test_packed_counts(length, keys, values):
    assert (packed_keys(CFG, length), packed_values(CFG, length)) == (keys, values)


def test_of_what_a_step_attends_to_it_packs_the_last_value_alone():
    """By which `attend` begins while `append` runs (`ops/attend_half.py`)."""
    for length in range(1, 5 * CFG.R):
        attended = packed_values(CFG, length)
        assert packed_keys(CFG, length - 1) >= attended, length
        assert packed_values(CFG, length - 1) >= attended - 1, length


@pytest.mark.parametrize("cfg", HALF, ids=config_id)
def test_values_of_two_tiles_share_no_word(cfg):
    order = value_order(cfg.kernel_key())
    tiles = [{order.word(t) for t in range(i * TOKENS, (i + 1) * TOKENS)} for i in range(2)]
    assert not tiles[0] & tiles[1]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2), (256, 4)])
def test_num_pages(tokens, pages):
    assert num_pages(CFG, tokens) == pages


@pytest.mark.parametrize("span", [32, 80, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", PACK_ORDERS)
def test_pack_order_is_a_bijection(name, bits, span):
    order = pack_order(name, bits, span)
    places = {(order.word(i), order.shift(order.slot(i))) for i in range(2 * span)}
    assert places == {(w, s) for w in range(2 * span * bits // 32) for s in range(0, 32, bits)}
    for i in range(2 * span):
        assert order.element(order.word(i), order.slot(i)) == i


def test_order_by_bytes():
    """Bytes of a word are a quarter of the span apart; places within a byte are neighbours."""
    order = pack_order("bytes", 2, 128)
    assert [order.element(0, slot) for slot in range(16)] == [
        0, 1, 2, 3, 32, 33, 34, 35, 64, 65, 66, 67, 96, 97, 98, 99,
    ]  # fmt: skip
    assert order.element(7, 15) == 127 and order.element(8, 0) == 128


def test_order_by_fragments():
    """Runs of 8 are dealt out to four words; half of each run is in a word's low half."""
    order = pack_order("fragment", 2, 128, run=8)
    assert [order.element(1, slot) for slot in range(16)] == [
        8, 9, 10, 11, 40, 41, 42, 43, 12, 13, 14, 15, 44, 45, 46, 47,
    ]  # fmt: skip
    assert order.element(4, 0) == 64
    plain = pack_order("plain", 2, 128)
    whole = pack_order("fragment", 2, 128)  # runs as long as words
    for i in range(128):
        assert (whole.word(i), whole.slot(i)) == (plain.word(i), plain.slot(i))


def test_order_by_fragments_of_half_a_tile():
    """Two words share 32 tokens: each has two of every four runs, byte by byte of its halves."""
    order = pack_order("fragment", 2, 32, run=8)
    assert [order.element(1, slot) for slot in range(16)] == [
        16, 17, 18, 19, 24, 25, 26, 27, 20, 21, 22, 23, 28, 29, 30, 31,
    ]  # fmt: skip
    assert order.element(2, 0) == 32
    shorter = pack_order("fragment", 2, 96, run=4)
    assert [shorter.element(0, slot) for slot in range(8)] == [0, 1, 16, 17, 4, 5, 20, 21]


@pytest.mark.parametrize("span", [32, 96, 128])
@pytest.mark.parametrize("run", [2, 4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_fragments_are_a_bijection(bits, run, span):
    if run > 32 // bits:
        run = 32 // bits
    order = pack_order("fragment", bits, span, run)
    places = {(order.word(i), order.slot(i)) for i in range(2 * span)}
    assert len(places) == 2 * span and max(places)[0] == 2 * span * bits // 32 - 1
    for i in range(2 * span):
        assert order.element(order.word(i), order.slot(i)) == i


@pytest.mark.parametrize("span", [32, 64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", PACK_ORDERS)
def test_the_first_token_of_a_word_is_in_its_first_slot(name, bits, span):
    """`append` clears a word when that one comes."""
    order = pack_order(name, bits, span, 4 if name == "fragment" else 0)
    for word in range(span * bits // 32):
        tokens = [order.element(word, slot) for slot in range(order.codes_per_word)]
        assert min(tokens) == tokens[0]


def test_pack_order_errors():
    with pytest.raises(ValueError, match=r"`pack_order` must be one of .*, got 'mma'"):
        pack_order("mma", 2, 128)
    with pytest.raises(ValueError, match="`span` must be a multiple of 16, got 24"):
        pack_order("bytes", 2, 24)


@pytest.mark.parametrize(
    ("page_size", "sizes"),
    [(128, (256, 512, 1024)), (192, (192, 448, 960)), (320, (192, 448, 960))],
)
def test_short_rows_have_short_parts_in_mode_half(page_size, sizes):
    key = KiviConfig(128, 8, 2, compute="half", page_size=page_size).kernel_key()
    parts = [split_tokens(key, n, key.split_tokens) for n in range(3 * 8192)]
    alone = key.split_tokens // 2
    assert set(parts[: alone + 1]) == {key.split_tokens}
    longer = parts[alone + 1 :]
    assert sorted(set(longer)) == list(sizes) and longer == sorted(longer)
    assert all(part % TILE_TOKENS == 0 for part in sizes)
    plain = replace(key, compute="float")
    assert split_tokens(plain, 5, plain.split_tokens) == plain.split_tokens


@pytest.mark.parametrize("compute", ["float", "half"])
@pytest.mark.parametrize("page_size", [64, 128, 192, 320])
@pytest.mark.parametrize("rows", [1, 32])
def test_tokens_of_splits(page_size, compute, rows):
    """With one token more it has more splits: so a workspace knows when it is outgrown."""
    cfg = KiviConfig(128, 8, 2, compute=compute, page_size=page_size)
    key = replace(cfg.kernel_key(), rows_per_query=rows)
    most = key.split_tokens
    counts = [-(-n // split_tokens(key, n, most)) for n in range(14 * most)]
    for splits in range(1, 13):
        expected = None
        for packed in reversed(range(13 * most)):
            if counts[packed + 1] > splits:
                expected = packed
            if counts[packed] <= splits:
                assert tokens_of_splits(key, splits, packed) == expected, (splits, packed)
