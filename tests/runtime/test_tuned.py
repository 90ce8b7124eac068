"""Tuning records in builds: used for exactly their target, announced when stale or missing."""

import json
import shlex
from dataclasses import replace

import pytest
from artifacts import CFG as AUTO
from records import record
from tvm.target import Target

from kivi_tvm import KiviConfig, build, database, targets
from kivi_tvm import compile as compiling
from kivi_tvm.cache_key import cache_name
from kivi_tvm.compile import (
    StaleRecord,
    compile_kernels,
    functions,
    recorded_schedule,
    schedule_hash,
)
from kivi_tvm.database import Found, publish
from kivi_tvm.manifest import parse_manifest
from kivi_tvm.ops import FUNCTIONS
from kivi_tvm.runtime import tuned

CFG = replace(AUTO, compute="float")
KEY = CFG.kernel_key()
OTHER_KEY = CFG.kernel_key("other")
# Scheduling all functions takes seconds.
SOME = {name: FUNCTIONS[name] for name in ("advance", "combine")}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Empty directories of the user's and of the package's records."""
    monkeypatch.setenv("KIVI_TVM_TUNING_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(database, "package_dir", lambda: tmp_path / "package")
    monkeypatch.setattr("kivi_tvm.notices._said", set())
    return tmp_path / "user"


@pytest.fixture(scope="module")
def native():
    return targets.resolve("native")


@pytest.fixture(scope="module")
def good(native):
    """A record of `combine` that takes another option than the default where there is one."""
    default = compiling.scheduled_function("combine", KEY, native)
    name, choice = next(iter(default.choices.items()))
    other = next(option for option in choice.options if option != choice.default)
    decided = compiling.scheduled_function("combine", KEY, native, {name: other})
    digest = schedule_hash("combine", decided)
    return record("combine", decisions={name: other}, schedule_hash=digest)


@pytest.fixture
def uncompiled(monkeypatch):
    """What would have been compiled; the code generator does not run."""
    given = []
    monkeypatch.setattr(compiling, "FUNCTIONS", SOME)
    monkeypatch.setattr(compiling, "compile_module", lambda module, *_, **__: given.append(module))
    return given


def found(*records, origin="user"):
    return Found({r.function: r for r in records}, {r.function: origin for r in records})


def changed(base, **changes):
    return record(**{**base.to_dict(), **changes})


def test_a_record_is_made_again(good, native):
    schedule = recorded_schedule(good, KEY, native)
    assert schedule_hash("combine", schedule) == good.schedule_hash


def stale_records(good):
    (name,) = good.decisions
    return {
        "there is no function of this name": changed(good, function="combined"),
        "got ('gone',)": changed(good, decisions={**good.decisions, "gone": 1}),
        "must be one of": changed(good, decisions={name: 12345}),
        "when measured": changed(good, schedule_hash="0" * 16),
    }


@pytest.mark.parametrize("case", range(4))
def test_stale_records(good, native, case):
    why, stale = list(stale_records(good).items())[case]
    with pytest.raises(StaleRecord) as error:
        recorded_schedule(stale, KEY, native)
    assert why in str(error.value)


def test_compiled_kernels_say_where_their_schedules_come_from(good, native, uncompiled):
    said = []
    made = compile_kernels(KEY, native, found(good, origin="package"), said.append)
    assert not said
    assert made.sources == {n: "tuned" if n == "combine" else "default" for n in SOME}
    assert made.manifest().to_dict()["tuning"] == {
        "combine": {
            "device": "a processor",
            "date": "2026-01-02T03:04:05+00:00",
            "default_us": 100.0,
            "tuned_us": 80.0,
            "origin": "package",
        }
    }
    (module,) = uncompiled
    assert compiling.tvm_ffi.structural_equal(
        module["combine"], recorded_schedule(good, KEY, native).mod["combine"]
    )


def test_a_stale_record_is_announced_once_and_not_used(good, native, uncompiled, capsys):
    stale = changed(good, schedule_hash="0" * 16)
    for _ in range(2):
        made = compile_kernels(KEY, native, found(stale))
        assert set(made.sources.values()) == {"default"} and not made.tuning
    (line,) = capsys.readouterr().err.splitlines()
    assert "combine" in line and KEY.slug in line and "stale" in line and "0" * 16 in line


def test_build_uses_records_of_exactly_its_target(good, native, root, capfd, tmp_path, monkeypatch):
    """One function's record rebuilds its key; another target's record changes nothing."""
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "FUNCTIONS", SOME)
    identity = targets.identity(native)
    publish(root, {**identity, "mcpu": "generic"}, KEY, {"combine": good})
    first = build(CFG)
    assert first.manifest["sources"] == dict.fromkeys(SOME, "default")
    assert f"no tuning record on {targets.slug(native)} for" in capfd.readouterr().err
    publish(root, identity, KEY, {"combine": good})
    second = build(CFG)
    assert second.source == "compiled" and build(CFG).source == "cache"
    assert second.manifest["sources"] == {"advance": "default", "combine": "tuned"}
    assert second.manifest["tuning"]["combine"]["origin"] == "user"
    second.save(tmp_path / "saved.so")
    publish(root, identity, OTHER_KEY, {"combine": good})
    assert build(CFG).source == "cache"


def test_a_kernel_that_is_not_tuned_is_announced_once(good, native, root, capsys):
    identity = targets.identity(native)
    for _ in range(2):
        assert not tuned.find_records(CFG, KEY, identity).records
    (line,) = capsys.readouterr().err.splitlines()
    assert targets.slug(native) in line and KEY.slug in line
    assert line.endswith(
        "kivi-tvm tune --target native --head-dim 64 --num-heads 8 --num-kv-heads 2 --bits 2 2 "
        "--group-size 32 --dtype float16 --compute float"
    )


@pytest.mark.parametrize("change", [{"page_size": 64}, {"key_group_size": 64}], ids=str)
def test_no_command_is_given_for_what_it_cannot_express(change):
    assert tuned.tune_command(replace(CFG, **change), {}) is None


def test_no_command_is_given_for_a_gpu():
    assert tuned.tune_command(CFG, {"kind": "cuda", "arch": "sm_90"}) is None


def test_the_command_names_another_target(native):
    fields = {**targets.identity(native), "mcpu": "x86-64-v3"}
    command = shlex.split(tuned.tune_command(CFG, fields))
    given = command[command.index("--target") + 1]
    assert targets.identity(targets.resolve(given)) == fields


def test_a_stale_record_of_the_user_does_not_hide_the_package_s(
    good, native, root, uncompiled, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(database, "package_dir", lambda: tmp_path / "package")
    identity = targets.identity(native)
    publish(tmp_path / "package", identity, KEY, {"combine": good})
    publish(root, identity, KEY, {"combine": changed(good, schedule_hash="0" * 16)})
    made = compile_kernels(KEY, native, tuned.find_records(CFG, KEY, identity))
    assert made.sources["combine"] == "tuned" and made.tuning["combine"]["origin"] == "package"
    (line,) = capsys.readouterr().err.splitlines()
    assert "stale, the package's instead" in line


def test_the_cache_name_follows_the_records(good):
    target = {"kind": "llvm"}
    digests = [
        "",
        found(good).digest,
        found(good, origin="package").digest,
        found(changed(good, tuned_us=1.0)).digest,
        found(good, changed(good, function="attend")).digest,
    ]
    assert len({cache_name(KEY, target, (), digest) for digest in digests}) == len(digests)
    assert cache_name(KEY, target) == cache_name(KEY, target, (), Found().digest)


def test_other_sums_of_attend_leave_attend_batch_out(monkeypatch):
    """A record of its own, too, and it is said: with such sums it would give other bits."""
    key = KiviConfig(64, 2, 2, compute="half").kernel_key()
    target = Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
    names = {name: functions(key, target)[name] for name in ("attend", "attend_batch")}
    monkeypatch.setattr(compiling, "functions", lambda *_: names)
    monkeypatch.setattr(compiling, "compile_module", lambda *_, **__: None)
    given = [
        record(name, decisions=taken, schedule_hash=schedule_hash(name, schedule))
        for name, taken in (("attend", {"warps": 2}), ("attend_batch", {"at_once": 1}))
        for schedule in [compiling.scheduled_function(name, key, target, taken)]
    ]
    for records, says in ((given, 1), (given[:1], 1), (given[1:], 0)):
        said = []
        kernels = compile_kernels(key, target, found(*records), said.append)
        assert ["attend_batch" in line for line in said] == [True] * says
        assert ("attend_batch" in kernels.sources) == (not says)
        manifest, problems = parse_manifest(json.dumps(kernels.manifest().to_dict()))
        assert manifest is not None, problems
