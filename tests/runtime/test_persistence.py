"""A cache that was saved or copied holds, and answers, the same bits; nothing else is loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from caches import assert_same_contents, assert_same_outputs, feed, new_cache
from configurations import FEW, module, with_window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import draw
from pools import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kivi_tvm.errors import UserError
from kivi_tvm.runtime import persistence
from kivi_tvm.runtime.persistence import CacheFileError

CFG = with_window(FEW[2], 32)
INTEGERS = replace(FEW[0], compute="int8")  # its kernels have their codes in another order


def tokens(cfg, batch_size, n, seed):
    """Queries, keys and values of one call to `extend`."""
    inputs = draw(cfg, n, batch_size=batch_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch_size, cfg.H, n, cfg.D, generator=generator).to(inputs.k.dtype)
    return q, inputs.k, inputs.v


def filled(cfg, lengths, free=(), steps=3, crop=0, **options):
    """A cache with a history: ragged rows, some steps, some taken back, some rows freed."""
    cache = new_cache(cfg, len(lengths), **options)
    inputs = draw(cfg, max(1, *lengths), lengths, steps=max(1, steps))
    cache.prefill(inputs.k, inputs.v, inputs.lengths)
    feed(cache, inputs, steps)
    cache.crop([min(crop, length) for length in cache.lengths])
    for row in free:
        cache.free(row)
    return cache


def saved(cache, path):
    cache.save(path)
    return module(cache.cfg).load_cache(path)


def assert_same(one, other):
    """Fail unless two caches hold the same."""
    for name in ("lengths", "active", "window", "sink_tokens"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.report()["refilled"] == other.report()["refilled"]
    for row, active in enumerate(one.active):
        if active:
            assert_same_contents(one, row, other, row)
    for a, b in zip(one.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)


def go_on(cache, counts, seed=5):
    """Everything that a cache can do next, and what it answers."""
    B = cache.batch_size
    found = feed(cache, draw(cache.cfg, 1, batch_size=B, steps=2, seed=seed), 2)
    counts = [min(c, n) for c, n in zip(counts, cache.lengths, strict=True)]
    refilled = cache.crop(counts).refilled
    lengths = [5 * active for active in cache.active]
    out = cache.extend(*tokens(cache.cfg, B, 5, seed), lengths=lengths)
    active = [row for row, each in enumerate(cache.active) if each]
    found.append((out[active], torch.tensor(refilled)))
    return found + feed(cache, draw(cache.cfg, 1, batch_size=B, steps=2, seed=seed + 1), 2)


HISTORIES = st.fixed_dictionaries(
    {
        "cfg": st.sampled_from([with_window(cfg, cfg.G_k) for cfg in (*FEW, INTEGERS)]),
        "lengths": st.lists(st.integers(0, 330), min_size=1, max_size=4),
        "window": st.sampled_from(["kivi", "exact"]),
        "rollback": st.sampled_from([0, 3, 40]),
        "sink_tokens": st.sampled_from([0, 4]),
        "steps": st.integers(0, 5),
        "crop": st.sampled_from([0, 2, 90]),
    }
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("caches") / "cache.safetensors"


@pytest.mark.parametrize("how", ["save", "copy"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HISTORIES, st.sets(st.integers(0, 3), max_size=2), st.integers(0, 90))
def test_goes_on_with_the_same_bits(path, how, history, free, count):
    free = [row for row in free if row < len(history["lengths"])]
    cache = filled(**history, free=free)
    other = cache.copy() if how == "copy" else saved(cache, path)
    assert other.rollback == cache.rollback
    assert_same(cache, other)
    counts = [count] * cache.batch_size
    assert_same_outputs(go_on(cache, counts), go_on(other, counts))
    assert_same(cache, other)


@pytest.mark.parametrize("rollback", [0, 2, 70])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HISTORIES, st.integers(0, 90))
def test_another_rollback(path, rollback, history, count):
    """Raised, it is what `enable_rollback` gives; lowered, less is taken back exactly."""
    cache = filled(**history)
    cache.save(path)
    other = module(cache.cfg).load_cache(path, rollback=rollback)
    assert other.rollback == rollback
    assert_same(cache, other)
    cache.enable_rollback(rollback)
    refilled = []
    for each in (cache, other):
        # a flush, of keys that came before the file and after it
        each.extend(*tokens(cache.cfg, cache.batch_size, cache.cfg.R, 3))
        refilled.append(each.crop([min(count, n) for n in each.lengths]).refilled)
    pairs = list(zip(*refilled, strict=True))
    if rollback >= history["rollback"]:
        assert refilled[0] == refilled[1]
        assert_same_outputs(*(go_on(each, [0] * each.batch_size) for each in (cache, other)))
    else:
        assert all(kept <= lost for kept, lost in pairs)


def test_shared_pages_are_written_once(tmp_path):
    """A prefix for many sequences: its complete pages count once, in memory and in the file."""
    prefix = filled(CFG, [300], steps=0)
    path = tmp_path / "prefix.safetensors"
    cache = saved(prefix, path)
    whole = (300 - CFG.R) // CFG.P
    written = -(-(300 - 300 % CFG.R) // CFG.P) - whole
    assert cache.report()["pages"]["used"] == whole + written
    cache.repeat(16)
    expected = {"used": whole + 16 * written, "shared": whole}
    pages = cache.report()["pages"]
    assert expected.items() <= pages.items()
    again = saved(cache, tmp_path / "many.safetensors")
    assert expected.items() <= again.report()["pages"].items()
    assert load_file(tmp_path / "many.safetensors")["layers.0.k_code"].shape[0] == pages["used"]
    assert_same(cache, again)
    counts = [0, 40] * 8
    assert_same_outputs(go_on(cache, counts), go_on(again, counts))


def test_layers_and_options(tmp_path):
    cache = new_cache(CFG, 2, num_layers=2, rollback=8, sink_tokens=3)
    inputs = draw(CFG, 100, [100, 41])
    cache.begin(100, inputs.lengths)
    cache.layer(0).prefill(inputs.k, inputs.v, inputs.lengths)
    cache.layer(1).prefill(inputs.v, inputs.k, inputs.lengths)
    cache.save(tmp_path / "cache")
    loaded = module(CFG).load_cache(tmp_path / "cache", max_tokens=200)
    assert (loaded.num_layers, loaded.rollback, loaded.sink_tokens) == (2, 8, 3)
    assert (loaded.max_tokens, cache.copy().max_tokens) == (200, None)
    for other in (loaded, cache.copy()):
        for layer in range(2):
            for row in range(2):
                assert_same_contents(cache, row, other, row, layer)


def test_a_copy_is_independent():
    cache = filled(CFG, [200, 70])
    other = cache.copy()
    before = [x.clone() for x in cache.dequantize()]
    feed(other, draw(CFG, 1, batch_size=2, steps=40), 40)
    other.free(0)
    assert cache.active == [True, True]
    for a, b in zip(cache.dequantize(), before, strict=True):
        assert_same_bits(a, b)


def test_nothing_is_written_but_what_rows_hold(tmp_path):
    """Pages and rings keep what rows wrote that were freed or cropped; a file does not."""
    cache = filled(CFG, [150, 150], crop=20, free=[1], rollback=8)
    fresh = new_cache(CFG, 2, rollback=8)
    fresh.free(1)
    inputs = draw(CFG, 150, [150, 150], steps=3)
    k, v = (
        torch.cat([x, new[:, :, None]], 2)
        for x, new in ((inputs.k, inputs.k_new[0]), (inputs.v, inputs.v_new[0]))
    )
    fresh.prefill(k[:1, :, :133], v[:1, :, :133], rows=[0])
    fresh.crop(0)
    for name, each in (("one", cache), ("two", cache.copy())):
        each.save(tmp_path / name)
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert_same_bits(one[name], two[name], name)
    # 40 tokens too many: keys from 96 on are exact once more, nothing is known of those before
    beyond = filled(CFG, [150], crop=40, rollback=8)
    beyond.save(tmp_path / "beyond")
    assert load_file(tmp_path / "beyond")["layers.0.k_exact"].shape[1] == 113 - 96
    fresh.save(tmp_path / "fresh")
    for name, tensor in load_file(tmp_path / "fresh").items():
        if "ring" not in name and "exact" not in name:
            assert_same_bits(one[name], tensor, name)


def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch):
    cache, path = filled(CFG, [70]), tmp_path / "cache.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_bad_path(tmp_path):
    cache = filled(CFG, [3])
    with pytest.raises(CacheFileError, match="`path` must be a file in an existing directory"):
        cache.save(tmp_path / "no" / "cache")
    with pytest.raises(FileNotFoundError):
        module(CFG).load_cache(tmp_path / "absent")
    with pytest.raises(CacheFileError, match="it is a directory"):
        module(CFG).load_cache(tmp_path)


def test_not_while_a_step_is_open(tmp_path):
    cache = new_cache(CFG, num_layers=2)
    cache.begin(1)
    for call in (cache.copy, lambda: cache.save(tmp_path / "cache")):
        with pytest.raises(RuntimeError, match="not finished"):
            call()
    assert not list(tmp_path.iterdir())


def refusal(path, cfg=CFG, **options):
    with pytest.raises(UserError) as caught:
        module(cfg).load_cache(path, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "cache.safetensors"
    filled(CFG, [150, 40], rollback=8).save(path)
    return path


@pytest.mark.parametrize("kept", [0, 5, 100, 1000, -1])
def test_truncated(original, tmp_path, kept):
    (tmp_path / "cache").write_bytes(original.read_bytes()[:kept])
    assert "it is no complete safetensors file" in refusal(tmp_path / "cache")


def test_another_kind_of_file(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model")
    assert "its `format` must be 'kivi-tvm cache', got None" in refusal(tmp_path / "model")
    (tmp_path / "text").write_text("hello " * 99)
    assert "it is no complete safetensors file" in refusal(tmp_path / "text")


def rewrite(original, to, tensors=None, metadata=None, contents=None, row=None):
    """The file with some entries changed; None removes one."""
    with safe_open(original, "pt") as file:
        held = file.metadata()
    plain = json.loads(held["contents"]) | (contents or {})
    plain["rows"][0] |= row or {}
    held = held | {"contents": json.dumps(plain)} | (metadata or {})
    found = load_file(original) | (tensors or {})
    kept = {name: x for name, x in found.items() if x is not None}
    save_file(kept, to, metadata={name: x for name, x in held.items() if x is not None})
    return to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"format_version": "2", "kivi_tvm": "9.1"}},
         ["its `format_version` must be '1', got '2' (written by kivi-tvm 9.1)"]),
        ({"metadata": {"pack_order": "woven"}}, ["its `pack_order` must be 'plain', got 'woven'"]),
        ({"metadata": {"contents": "{"}}, ["its metadata is damaged (JSONDecodeError"]),
        ({"metadata": {"config": None}}, ["its metadata is damaged (KeyError: 'config')"]),
        ({"contents": {"num_layers": True}}, ["its metadata is damaged (ValueError: counts"]),
        ({"contents": {"window": "open"}}, ["its metadata is damaged (ValueError: `window`"]),
        ({"contents": {"num_layers": 10**15}}, ["it must hold 1000000000000000 layers, got 9"]),
        ({"contents": {"num_layers": 2}}, ["`layers.1.k_code` is missing", "`layers.1.v_ring` is"]),
        ({"row": {"length": -3}}, ["its metadata is damaged (ValueError: counts"]),
        ({"row": {"length": 10**12}}, ["row 0 must have 10416666667 pages"]),
        ({"row": {"pages": [0, 7]}}, ["row 0 must have 2 pages below 3, got (0, 7)"]),
        ({"row": {"active": False}}, ["row 0 must have no tokens while it is inactive"]),
        ({"row": {"values_from": 130}},
         ["row 0 must have values of full precision from 121 on, got 130"]),
        ({"row": {"keys_from": 150}},
         ["row 0 must have keys of full precision from 128 on, got 150"]),
        ({"tensors": {"layers.0.k_code": None, "extra": torch.zeros(1)}},
         ["`layers.0.k_code` is missing", "`extra` is unknown"]),
        ({"tensors": {"layers.0.v_zero": torch.zeros(2, 3), "layers.0.k_ring": torch.zeros(1)}},
         ["`layers.0.v_zero` must be F16 [3, 2, 1, 96], got F32 [2, 3]", "`layers.0.k_ring` must"]),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.values())))) if isinstance(value, dict)
    else "",
)  # fmt: skip
def test_damage_is_found_before_anything_is_built(original, tmp_path, monkeypatch, change, words):
    path = rewrite(original, tmp_path / "cache", **change)
    monkeypatch.setattr(type(module(CFG)), "new_cache", None)
    message = refusal(path)
    assert str(path) in message
    for word in words:
        assert word in message


def test_an_incomplete_page_belongs_to_one_row(original, tmp_path):
    with safe_open(original, "pt") as file:
        rows = json.loads(file.metadata()["contents"])["rows"]
    rows[1] = rows[0]
    path = rewrite(original, tmp_path / "cache", contents={"rows": rows})
    assert "row 1 must share complete pages only" in refusal(path)


def test_another_configuration_lists_every_difference(original):
    assert refusal(original, with_window(FEW[0], 64)) == (
        f"cannot load {original}: its `head_dim` is 128, the module's 64; "
        "its `key_bits` is 4, the module's 2; its `value_bits` is 8, the module's 2; "
        "its `key_group_size` is 16, the module's 32; "
        "its `value_group_size` is 128, the module's 64; "
        "its `residual_length` is 32, the module's 64; "
        "its `dtype` is 'float32', the module's 'float16'"
    )


def test_files_do_not_depend_on_the_compute_mode(tmp_path):
    """Codes are in pack order "plain" in every file, and in their own in every cache."""
    held, words = [], []
    for cfg in (FEW[0], INTEGERS):
        cache = filled(cfg, [500, 137, 0])
        words.append(cache.layer(0).pages["k_code"].clone())
        cache.save(tmp_path / "cache")
        held.append(load_file(tmp_path / "cache"))
        for other in (FEW[0], INTEGERS):
            assert_same(cache, module(other).load_cache(tmp_path / "cache"))
    assert not torch.equal(*words) and held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        assert_same_bits(tensor, held[1][name], name)


def test_too_long_for_the_limit(original):
    assert "`max_tokens` must be at least 153" in refusal(original, max_tokens=152)
    assert module(CFG).load_cache(original, max_tokens=153).lengths == [153, 43]


def test_wrong_arguments_build_nothing(original):
    for options, word in (({"rollback": -1}, "`rollback`"), ({"device": "cuda"}, "`device`")):
        assert word in refusal(original, **options)


def test_metadata_says_what_the_file_is(original):
    with safe_open(original, "pt") as file:
        found = file.metadata()
    assert found["format"] == persistence.FORMAT
    assert json.loads(found["config"])["page_size"] == CFG.P
    assert found.keys() == {
        "format", "format_version", "kivi_tvm", "pack_order", "config", "contents"
    }  # fmt: skip


def test_a_file_has_the_mode_of_other_files(tmp_path):
    (tmp_path / "plain").touch()
    cache = new_cache(FEW[0])
    cache.save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    cache.save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    with pytest.raises(CacheFileError, match="`path` must be a file"):
        cache.save(tmp_path)
