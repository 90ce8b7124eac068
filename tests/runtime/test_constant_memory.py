"""A cache that is used for long and holds as much as before takes as much memory as before."""

import gc
import resource
import tracemalloc

import pytest
from books import assert_pages_add_up
from caches import new_cache
from inputs import draw
from twins import SMALL

R, P, E = SMALL.R, SMALL.P, 9
# Free lists of tuples and ints fill up over some hundred turns; RSS moves by whole arenas.
PYTHON_BYTES, RSS_BYTES = 40_000, 16 << 20
MODES = [{"rollback": E}, {"rollback": E, "window": "exact", "sink_tokens": 4}, {"rollback": 0}]


def rss_bytes():
    """Peak of this process: it does not move when nothing more is taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def python_bytes():
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def assert_constant(cache, turn, turns):
    """Fail if the second half of the turns leaves anything behind that the first had not."""
    tracemalloc.start()  # before the first turn: what replaces traced objects must not count
    for i in range(turns // 2):
        turn(i)
    books = cache.nbytes, cache.report()["pages"], cache.lengths
    python, rss = python_bytes(), rss_bytes()
    for i in range(turns // 2, turns):
        turn(i)
    python, rss = python_bytes() - python, rss_bytes() - rss
    tracemalloc.stop()
    assert (cache.nbytes, cache.report()["pages"], cache.lengths) == books
    assert_pages_add_up(cache)
    assert python < PYTHON_BYTES and rss < RSS_BYTES


def filled(lengths, steps=4 * E, **options):
    inputs = draw(SMALL, max(lengths), lengths, steps=steps)
    cache = new_cache(SMALL, len(lengths), **options)
    cache.prefill(inputs.k, inputs.v, lengths)
    return cache, inputs


def decode(cache, inputs, step):
    cache.decode(inputs.q[step], inputs.k_new[step], inputs.v_new[step])


SIZES = [
    pytest.param(400, id="400"),
    pytest.param(10_000, id="10000", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("steps", SIZES)
def test_decode_and_crop(steps, mode):
    """Across a flush and a new page, forth and back."""
    cache, inputs = filled([3 * R - 4, 2 * R - 2, 5, P + R - 1], **mode)

    def turn(_):
        for step in range(8):
            decode(cache, inputs, step)
        cache.crop(8)

    assert_constant(cache, turn, steps // 8)


@pytest.mark.parametrize("steps", SIZES)
def test_reset_rounds(steps):
    cache, inputs = filled([60, 20], steps=50, rollback=E)

    def turn(_):
        cache.reset()
        cache.prefill(inputs.k, inputs.v, [60, 20])
        for step in range(50):
            decode(cache, inputs, step)

    assert_constant(cache, turn, steps // 50)


@pytest.mark.parametrize("rounds", [40, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_fork_and_free(rounds, mode):
    """Copies of one row live for some steps each; the row itself is taken back."""
    cache, inputs = filled([4 * P + 3, 10, 70], **mode)
    cache.free(1)

    def turn(_):
        rows = [cache.fork(0), cache.fork(2)]
        for step in range(3):
            decode_all(cache, inputs, step)
        for row in rows:
            cache.free(row)
        cache.crop(3)

    def decode_all(cache, inputs, step):
        rows = [0] * cache.batch_size
        args = inputs.q[step], inputs.k_new[step], inputs.v_new[step]
        cache.decode(*(x[rows] for x in args))

    assert_constant(cache, turn, rounds)


@pytest.mark.parametrize("rounds", [40, pytest.param(1_000, marks=pytest.mark.slow)])
def test_beams(rounds):
    """Reordered at every token, taken back at the end of each round."""
    cache, inputs = filled([4 * P + 3] * 4, rollback=E)

    def turn(i):
        for step in range(E):
            cache.reorder([(i + step) % 4, 0, 2, 2])
            decode(cache, inputs, step)
        cache.crop(E)

    assert_constant(cache, turn, rounds)


@pytest.mark.parametrize("rounds", [40, pytest.param(1_000, marks=pytest.mark.slow)])
def test_sequences_come_and_go(rounds):
    """A row ends and another begins, of other lengths, within the same memory."""
    cache, inputs = filled([200, 200, 30])
    lengths = [200, 7, 150, 32]

    def turn(i):
        for n in (lengths[i % 4], 200):
            cache.free(i % 2)
            cache.prefill(inputs.k[:1, :, :n], inputs.v[:1, :, :n], rows=[i % 2])

    assert_constant(cache, turn, rounds)
