"""The command line from outside: `info`, the list of commands, and how errors appear."""

import json
import os
import resource
import subprocess
import sys

import pytest
from artifacts import CFG, export_elf, manifest
from records import KEY, SLUG, TARGET, record

from kivi_tvm.artifact import write_artifact
from kivi_tvm.artifact_cache import cached
from kivi_tvm.database import publish


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kivi_tvm(*arguments, program=("-m", "kivi_tvm"), **variables):
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
    )


def info(*arguments, **variables):
    done = kivi_tvm("info", "--json", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build():
    return cached("build", lambda path: write_artifact(path, manifest(config=None), export_elf))


def test_json_facts(cache_root):
    facts = info()
    assert facts["versions"]["apache-tvm"].startswith("0.27.")
    assert facts["versions"]["python"].startswith("3.")
    assert facts["paths"]["cache"] == str(cache_root)
    assert os.path.isfile(facts["paths"]["tvm_runtime"])
    assert facts["cpu"]["name"] and facts["cpu"]["available_threads"] >= 1
    assert facts["cache"] == {"builds": [], "size_bytes": 0}
    assert not cache_root.exists()


def test_builds_are_listed_and_cleared():
    path = build().path
    (listed,) = info()["cache"]["builds"]
    assert listed["kernels"] == CFG.kernel_key().slug
    assert (listed["size_bytes"], listed["path"]) == (400, str(path))
    text = kivi_tvm("info").stdout
    assert CFG.kernel_key().slug in text and "0.4 kB" in text
    after = info("--clear-cache")
    assert after["cleared"]["removed"] == 1 and after["cleared"]["busy"] == 0
    assert after["cache"] == {"builds": [], "size_bytes": 0}
    assert not path.exists()


def test_tuning_directories_are_listed(tmp_path):
    user = tmp_path / "user"
    publish(user, TARGET, KEY, {"attend": record(), "combine": record("combine")})
    facts = info(KIVI_TVM_TUNING_DIR=str(user))
    assert facts["paths"]["tuning"] == str(user)
    assert facts["tuned"][0] == {
        "target": SLUG,
        "origin": "user",
        "kernels": 1,
        "records": 2,
        "path": str(user / SLUG),
    }
    line = f"{SLUG}: 2 records of 1 kernels ({user / SLUG})"
    assert line in kivi_tvm("info", KIVI_TVM_TUNING_DIR=str(user)).stdout


def test_clearing_says_what_was_freed():
    build()
    assert "1 builds" in kivi_tvm("info", "--clear-cache").stdout


def test_no_compiler(tmp_path):
    facts = info(PATH=str(tmp_path), CXX="")
    assert facts["compiler"] is None
    assert "none: kernels are compiled anew" in kivi_tvm("info", PATH=str(tmp_path), CXX="").stdout


def test_compiler_follows_cxx(tmp_path):
    program = tmp_path / "my-c++"
    program.write_text("#!/bin/sh\necho 'my compiler 1.0'\n")
    program.chmod(0o755)
    assert info(CXX=str(program))["compiler"] == {
        "path": str(program),
        "version": "my compiler 1.0",
    }


def test_quick_and_without_heavy_imports():
    script = (
        "import sys; from kivi_tvm.cli import main; status = main(['info', '--json'])\n"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = kivi_tvm(program=("-c", script))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, for a busy machine: 0.15 s measured; torch and tvm alone would take 4 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_devices_ask_torch():
    pytest.importorskip("torch")
    assert info("--devices")["devices"][0] == "cpu"


def test_version_and_help():
    assert kivi_tvm("--version").stdout.startswith("kivi-tvm ")
    listing = kivi_tvm("--help").stdout
    for command in ("demo", "bench", "info"):
        assert f"    {command} " in listing
    assert "--clear-cache" in kivi_tvm("info", "--help").stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_wrong_usage(arguments):
    done = kivi_tvm(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert "usage: kivi-tvm" in done.stderr and "Traceback" not in done.stderr


def with_command(body):
    """Run `kivi-tvm info` with its `run` replaced by `body`."""
    script = (
        "import sys; from kivi_tvm.cli import info, main; from kivi_tvm.errors import UserError\n"
        f"def run(args): {body}\n"
        "info.run = run; sys.exit(main(['info']))"
    )
    return kivi_tvm(program=("-c", script))


def test_a_user_error_is_one_line():
    done = with_command("raise UserError('`bits` must be 2, 4 or 8,\\n  got 3')")
    assert done.returncode == 2
    assert done.stderr == "kivi-tvm: error: `bits` must be 2, 4 or 8, got 3\n"


def test_a_bug_keeps_its_traceback():
    done = with_command("raise ValueError('bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_reader_that_leaves_is_not_an_error():
    done = subprocess.run(
        f"{sys.executable} -m kivi_tvm info --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.stdout, done.stderr) == ("{", "")


def test_unreadable_cache_is_a_user_error(tmp_path, cache_root):
    build()
    lock = cache_root / "kernels" / "build.lock"
    lock.unlink()
    lock.mkdir()
    done = kivi_tvm("info", "--clear-cache")
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
