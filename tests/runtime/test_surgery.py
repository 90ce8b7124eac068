"""Rows that share pages equal rows that were fed on their own; sharing costs what it must."""

import pytest
import torch
from books import assert_pages_add_up, incomplete_pages, packed_values
from caches import assert_same_contents, assert_unchanged, snapshot
from configurations import FEW, config_id, with_window
from families import LAYERS, Family, extend, spread_queries
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import SMALL, WIDE

R, P = SMALL.R, SMALL.P
MODES = [
    {},
    {"window": "exact", "sink_tokens": 5},
    {"rollback": 9},
    {"rollback": 9, "window": "exact"},
    {"rollback": 9, "sink_tokens": 5},
]


@settings(max_examples=10)
@given(st.data(), st.sampled_from(MODES))
def test_any_surgery_equals_deep_copies(data, mode):
    family = Family(SMALL, 3, **mode)
    lengths = st.lists(st.integers(1, 2 * P + R), min_size=3, max_size=3)
    family.extend(data.draw(lengths, "prompts"))
    for _ in range(data.draw(st.integers(1, 4), "rounds")):
        count = len(family.told)
        index = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5), "index")
        family.select(index)
        family.extend(data.draw(st.lists(st.integers(1, R), min_size=5, max_size=5))[: len(index)])
    family.check()


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_every_kind_of_kernel(cfg):
    family = Family(with_window(cfg, cfg.G_k), 2, rollback=5)
    family.extend([3 * cfg.P + 7, cfg.R + 1])
    family.select([0, 1, 0])
    family.extend([1, 9, 30])
    family.check()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_fork_and_original_go_on(mode):
    family = Family(SMALL, 2, **mode)
    family.extend([4 * P + 3, 40])
    family.told += [family.told[0]]
    assert family.cache.fork(0) == 2
    family.extend([5, 1, P])
    family.told += [family.told[2]]
    assert family.cache.fork(2) == 3
    family.check()


def test_beams():
    """Reordered after every token, across flushes."""
    family, generator = Family(SMALL, 4), torch.Generator().manual_seed(1)
    family.extend([70, 20, 35, 90])
    for _ in range(3 * R):
        index = torch.randint(0, 4, (4,), generator=generator).tolist()
        family.cache.reorder(index)
        family.told = [family.told[row] for row in index]
        family.extend([1] * 4)
    family.check()


def test_repeat_is_interleaved():
    family = Family(SMALL, 2)
    family.extend([100, 33])
    family.cache.repeat(3)
    assert family.cache.lengths == [100] * 3 + [33] * 3
    family.told = [told for told in family.told for _ in range(3)]
    family.extend([1, 2, 3, 4, 5, 6])
    family.check()


@pytest.mark.parametrize("index", [torch.tensor([1, 0, 1]), (1, 0, 1)], ids=["tensor", "tuple"])
def test_indices_of_other_types(index):
    family = Family(SMALL, 2)
    family.extend([50, 20])
    family.cache.select(index)
    assert family.cache.lengths == [20, 50, 20]
    family.told = [family.told[row] for row in (1, 0, 1)]
    family.check()


@pytest.mark.parametrize("cut", [3, 9, 10, R, P + R, 3 * P, 4 * P + 3])
@pytest.mark.parametrize("rollback", [0, 9])
def test_a_crop_leaves_the_copy_alone(cut, rollback):
    """Taken back into shared pages: what is written again is the row's own copy."""
    family = Family(SMALL, 1, rollback=rollback)
    family.extend([4 * P + 3])
    family.told += [family.told[0]]
    family.cache.fork(0)
    family.cache.crop([cut, 0])
    assert_pages_add_up(family.cache)
    tokens = family.draw(2, 2 * P)
    extend(family.cache, tokens, [2 * P, 0])
    copy = family.alone(1)
    for i in range(LAYERS):
        assert_same_contents(family.cache, 1, copy, 0, i)


@pytest.mark.parametrize("cfg", [SMALL, WIDE], ids=["small", "wide"])
def test_a_fork_copies_incomplete_pages_only(cfg):
    for length in range(0, 4 * cfg.P, cfg.R // 2 + 3):
        family = Family(cfg, 1)
        if length:
            family.extend([length])
        before = family.cache.report()["pages"]["used"]
        family.cache.fork(0)
        pages = family.cache.report()["pages"]
        copied = pages["used"] - before
        assert copied == incomplete_pages(family.cache, 0) <= cfg.R / cfg.P + 2
        assert pages["shared"] == packed_values(family.cache, 0) // cfg.P


def test_forks_of_a_long_prompt_take_no_memory():
    family = Family(SMALL, 1)
    family.extend([20 * P])
    alone = family.cache.nbytes["packed"]
    for _ in range(7):
        family.cache.fork(0)
    assert family.cache.report()["pages"]["shared"] == 20 - 1
    # Seven copies of the page that is still written, beside 20 pages.
    assert family.cache.nbytes["packed"] <= alone * 28 / 20


def test_pages_return_with_their_last_owner():
    family = Family(SMALL, 2)
    family.extend([5 * P, 3 * P])
    cache = family.cache
    used = [cache.report()["pages"]["used"]]
    cache.fork(0)
    cache.free(0)
    used.append(cache.report()["pages"]["used"])
    assert used[0] == used[1] and cache.lengths == [0, 3 * P, 5 * P]
    assert cache.report()["pages"]["shared"] == 0
    assert cache.fork(2) == 0  # the lowest inactive row
    for row in range(3):
        cache.free(row)
    assert cache.report()["pages"]["used"] == 0 and cache.active == [False] * 3
    assert_pages_add_up(cache)


def test_inactive_rows_are_copied_as_such():
    family = Family(SMALL, 3)
    family.extend([50, 60, 70])
    family.cache.free(1)
    family.cache.select([1, 0, 1, 2])
    assert family.cache.active == [False, True, False, True]
    assert family.cache.lengths == [0, 50, 0, 70]
    family.told = [family.told[row] for row in (1, 0, 1, 2)]
    family.check(rows=[1, 3])


BAD_CALLS = {
    "reorder: too few": (lambda c: c.reorder([0]), ["`index`", "2", "1"]),
    "reorder: too many": (lambda c: c.reorder([0, 1, 0]), ["`index`", "2", "3"]),
    "reorder: range": (lambda c: c.reorder([0, 2]), ["`index`", "0..1", "2"]),
    "reorder: negative": (lambda c: c.reorder([0, -1]), ["`index`", "0..1", "-1"]),
    "reorder: bool": (lambda c: c.reorder([0, True]), ["`index`", "True"]),
    "reorder: float": (lambda c: c.reorder(torch.tensor([0.0, 1.0])), ["`index`", "float32"]),
    "select: nothing": (lambda c: c.select([]), ["`index`"]),
    "select: range": (lambda c: c.select([2]), ["`index`", "0..1", "2"]),
    "select: None": (lambda c: c.select(None), ["`index`", "None"]),
    "select: int": (lambda c: c.select(1), ["`index`", "1"]),
    "repeat: 0": (lambda c: c.repeat(0), ["`n`", "0"]),
    "repeat: bool": (lambda c: c.repeat(True), ["`n`", "True"]),
    "repeat: float": (lambda c: c.repeat(2.0), ["`n`", "2.0"]),
    "fork: range": (lambda c: c.fork(2), ["`row`", "[0, 1]", "2"]),
    "fork: negative": (lambda c: c.fork(-1), ["`row`", "[0, 1]", "-1"]),
    "fork: bool": (lambda c: c.fork(True), ["`row`", "True"]),
    "free: range": (lambda c: c.free(2), ["`row`", "[0, 1]", "2"]),
    "free: a string": (lambda c: c.free("0"), ["`row`", "'0'"]),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_refused_calls_change_nothing(what):
    call, words = BAD_CALLS[what]
    family = Family(SMALL, 2)
    family.extend([50, 20])
    before, report = snapshot(family.cache), family.cache.report()
    with pytest.raises((TypeError, ValueError, IndexError)) as error:
        call(family.cache)
    assert all(word in str(error.value) for word in words), error.value
    assert_unchanged(family.cache, before, [50, 20])
    assert family.cache.report() == report


@pytest.mark.parametrize("call", ["fork", "free"])
def test_an_inactive_row_cannot_be(call):
    family = Family(SMALL, 2)
    family.extend([50, 20])
    family.cache.free(1)
    before, report = snapshot(family.cache), family.cache.report()
    with pytest.raises(ValueError) as error:
        getattr(family.cache, call)(1)
    assert "`row` must be one of the active rows [0], got 1" in str(error.value)
    assert_unchanged(family.cache, before, [50, 0])
    assert family.cache.report() == report


SURGERY = {
    "reorder": lambda c: c.reorder([1, 0]),
    "select": lambda c: c.select([1]),
    "repeat": lambda c: c.repeat(2),
    "fork": lambda c: c.fork(0),
    "free": lambda c: c.free(0),
    "enable_rollback": lambda c: c.enable_rollback(3),
}


@pytest.mark.parametrize("what", SURGERY)
def test_refused_in_an_open_step(what):
    family = Family(SMALL, 2)
    family.extend([50, 20])
    tokens = family.draw(2, 1)
    q, k, v = tokens[:, 0, :, :, 0].unbind(1)
    family.cache.layer(0).decode(spread_queries(SMALL, q), k, v)
    before = snapshot(family.cache)
    with pytest.raises(RuntimeError, match="step"):
        SURGERY[what](family.cache)
    assert_unchanged(family.cache, before, [51, 21])
