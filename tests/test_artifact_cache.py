"""One process builds, the others wait; damage is set aside; nowhere to write is said so."""

import os
import subprocess
import sys
import textwrap

import pytest
from artifacts import CFG, export_elf, manifest

from kivi_tvm import artifact_cache, cache_key
from kivi_tvm.artifact import manifest_path, write_artifact
from kivi_tvm.artifact_cache import CacheUnavailable, cached, clear_cache

NAME = f"{CFG.kernel_key().slug}-0123456789abcdef"
BUILDER = """
    import sys, time
    from pathlib import Path
    from artifacts import export_elf, manifest
    from kivi_tvm.artifact import write_artifact
    from kivi_tvm.artifact_cache import cached

    def make(path):
        with open(sys.argv[2], "a") as log:
            log.write("built\\n")
        time.sleep(float(sys.argv[3]))
        write_artifact(path, manifest(config=None), export_elf)

    print(cached(sys.argv[1], make).hit)
"""


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(path):
    write_artifact(path, manifest(config=None), export_elf)


def never(path):
    raise AssertionError("must not be built")


def start(tmp_path, log, seconds, name=NAME):
    script = tmp_path / "builder.py"
    script.write_text(textwrap.dedent(BUILDER))
    return subprocess.Popen(
        [sys.executable, script, name, log, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_built_once_then_found(cache_root):
    first = cached(NAME, make)
    again = cached(NAME, never)
    assert not first.hit and again.hit
    assert first.path == again.path == cache_root / "kernels" / f"{NAME}.so"
    assert first.manifest == again.manifest and again.manifest.config is None


def test_concurrent_processes_build_once(tmp_path):
    log = tmp_path / "log"
    processes = [start(tmp_path, log, 1.5) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert sorted(out.strip() for out, _ in answers) == ["False", "True", "True", "True"]
    assert log.read_text() == "built\n"
    assert sum("waiting for another process" in err for _, err in answers) >= 1


def test_a_killed_builder_blocks_nobody(tmp_path, cache_root):
    log = tmp_path / "log"
    victim = start(tmp_path, log, 600)
    while not log.exists():
        assert victim.poll() is None
    victim.kill()
    victim.communicate()
    (cache_root / "kernels" / f".{NAME}-left").mkdir()
    assert not cached(NAME, make).hit
    assert not list((cache_root / "kernels").glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "no library"])
def test_damage_is_set_aside_and_rebuilt(damage):
    path = cached(NAME, make).path
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + b"\x01")
    elif damage == "truncate":
        path.write_bytes(content[:10])
    else:
        (path if damage == "no library" else manifest_path(path)).unlink()
    said = []
    rebuilt = cached(NAME, make, said.append)
    assert not rebuilt.hit and path.read_bytes() == content
    assert len(said) == 1 and "damaged" in said[0] and ".so.corrupt" in said[0]
    assert list(path.parent.glob("*.corrupt"))
    assert cached(NAME, never).hit


def test_a_failed_build_leaves_nothing(cache_root):
    def fail(path):
        raise RuntimeError("no such schedule")

    with pytest.raises(RuntimeError, match="no such schedule"):
        cached(NAME, fail)
    assert not artifact_cache.cache_entries()
    assert not cached(NAME, make).hit


def test_unwritable_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheUnavailable, match=r"cannot be written \(Not a directory\)") as caught:
        cached(NAME, never)
    assert "KIVI_TVM_CACHE_DIR" in str(caught.value)
    assert clear_cache() == (0, 0, 0) and artifact_cache.cache_entries() == []


def test_full_disk():
    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheUnavailable, match="No space left"):
        cached(NAME, fail)


def test_other_os_errors_are_not_hidden():
    def fail(path):
        raise FileNotFoundError(2, "no such program", "g++")

    with pytest.raises(FileNotFoundError):
        cached(NAME, fail)


def test_entries_and_clearing(cache_root):
    path = cached(NAME, make).path
    cached(f"{NAME}x", make)
    path.with_name(f"{path.name}.corrupt").write_bytes(b"old")
    entries = artifact_cache.cache_entries()
    assert [entry.slug for entry in entries] == [CFG.kernel_key().slug] * 2
    assert all(entry.size_bytes == 400 and entry.built_at > 1e9 for entry in entries)
    cleared = clear_cache()
    assert cleared.removed == 2 and cleared.freed_bytes > 800 and cleared.busy == 0
    assert not list((cache_root / "kernels").iterdir())
    assert clear_cache() == (0, 0, 0)


def test_a_build_in_progress_is_not_cleared(tmp_path):
    log = tmp_path / "log"
    builder = start(tmp_path, log, 1.0)
    while not log.exists():
        assert builder.poll() is None
    assert clear_cache() == (0, 0, 1)
    assert builder.communicate(timeout=60)[0].strip() == "False"
    assert cached(NAME, never).hit


def test_an_unreadable_entry_is_listed():
    path = cached(NAME, make).path
    manifest_path(path).write_text("{")
    assert [entry.slug for entry in artifact_cache.cache_entries()] == ["unreadable"]


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("KIVI_TVM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert artifact_cache.cache_dir() == tmp_path / "kivi-tvm"


def test_name_changes_with_everything_that_changes_the_code(monkeypatch):
    key = CFG.kernel_key()
    target = {"kind": "llvm", "mcpu": "znver4"}
    names = {
        cache_key.cache_name(key, target),
        cache_key.cache_name(CFG.kernel_key("other"), target),
        cache_key.cache_name(key, {**target, "mcpu": "znver5"}),
        cache_key.cache_name(key, target, ("avx2",)),
    }
    versions = {"kivi_tvm": "1", "tvm": "0.27.0", "tvm_ffi": "0.1.15"}
    monkeypatch.setattr(cache_key, "current_versions", lambda: versions)
    names.add(cache_key.cache_name(key, target))
    monkeypatch.setattr(cache_key, "sources_digest", lambda: "changed")
    names.add(cache_key.cache_name(key, target))
    assert len(names) == 6
    assert all(name.startswith(CFG.kernel_key().slug.split("-plain")[0]) for name in names)


def test_name_does_not_depend_on_order():
    key = CFG.kernel_key()
    one = cache_key.cache_name(key, {"kind": "llvm", "mcpu": "znver4"}, ("avx2", "fma"))
    assert one == cache_key.cache_name(key, {"mcpu": "znver4", "kind": "llvm"}, ("fma", "avx2"))


def test_sources_digest_covers_ops_and_schedules_through_links_but_no_records(tmp_path):
    package, schedules = tmp_path / "package", tmp_path / "schedules"
    (package / "ops").mkdir(parents=True)
    (schedules / "cpu").mkdir(parents=True)
    (package / "schedules").symlink_to("../schedules")
    (package / "tuning_logs" / "target").mkdir(parents=True)
    files = [
        package / "layout.py",
        package / "ops" / "attend.py",
        schedules / "cpu" / "attend.py",
        package / "tuning_logs" / "target" / "database_x.json",
    ]
    seen = set()
    for path in files:
        path.write_text("1")
        cache_key.sources_digest.cache_clear()
        seen.add(cache_key.sources_digest(package))
    files[2].write_text("2")
    cache_key.sources_digest.cache_clear()
    seen.add(cache_key.sources_digest(package))
    (package / "reference.py").write_text("no code is generated from this")
    cache_key.sources_digest.cache_clear()
    seen.add(cache_key.sources_digest(package))
    assert len(seen) == 4
