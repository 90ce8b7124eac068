"""The committed tuning records are what the tuner wrote, and still lead to the same schedules."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from artifacts import CFG
from records import FILE, SLUG, TARGET, record

import kivi_tvm
from kivi_tvm import database, database_files, targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.database import publish
from kivi_tvm.tune.records import stale
from kivi_tvm.tuning_record import checksum

LOGS = Path(kivi_tvm.__file__).parent / "tuning_logs"
NOT_FOLDERS = ("README.md", "__init__.py", "__pycache__")
KEY = CFG.kernel_key()
# Of this machine, or of the one that wrote the records: nothing of either may be committed.
PRIVATE = re.compile(r"/(home|root|tmp|work)\b")


def problems(root, check_schedules=True):
    """Everything that is wrong with a directory of records."""
    found = []
    for folder in sorted(path for path in root.iterdir() if path.name not in NOT_FOLDERS):
        if not folder.is_dir():
            found.append(f"{folder.name}: is not a target's directory")
            continue
        files = sorted(path for path in folder.iterdir() if path.name != ".lock")
        databases = []
        for path in files:
            if path.name.startswith("database_") and path.suffix == ".json":
                try:
                    databases.append(database_files.read_records(path))
                except ValueError as error:
                    found.append(f"{path.name}: {error}")
            elif path.name != database_files.MANIFEST:
                found.append(f"{path.name}: is not a file of the database")
            if PRIVATE.search(path.read_text(errors="replace")):
                found.append(f"{path.name}: names a path of the machine")
        found += manifest_problems(folder, databases)
        for each in databases:
            found += record_problems(each, check_schedules)
    return found


def manifest_problems(folder, databases):
    if not databases:
        return [f"{folder.name}: has no records"]
    path = folder / database_files.MANIFEST
    text = path.read_text() if path.exists() else "missing"
    if text != database_files.manifest_text(folder, databases):
        return [f"{folder.name}: its manifest is not what its files give"]
    return []


def record_problems(found, check_schedules):
    said = []
    if targets.identity(targets.from_identity(found.target)) != found.target:
        said.append(f"{found.path}: its target is not spelled as `targets.identity` does")
    for name, each in found.records.items():
        if check_schedules and (why := stale(found, each)):
            said.append(f"{name}: {why}")
        if each.kind == "measured" and each.read_gb_per_s is None:
            said.append(f"{name}: its bandwidth is missing")
        if each.tuned_us > each.default_us:
            said.append(f"{name}: {each.tuned_us} us is slower than the default")
    return said


def test_committed_records():
    assert problems(LOGS, check_schedules=False) == []


def files():
    """Every file of records; the fast tests schedule the most records of a target and mode."""
    found = [database_files.read_records(path) for path in sorted(LOGS.glob("*/database_*.json"))]
    largest = {}
    for each in found:
        mode = each.path.parent, each.key.compute
        largest[mode] = max(largest.get(mode, each), each, key=lambda file: len(file.records))
    for each in found:
        marks = [] if each is largest[each.path.parent, each.key.compute] else [pytest.mark.slow]
        yield pytest.param(each, id=str(each.path.with_suffix("")), marks=marks)


@pytest.mark.parametrize("found", list(files()))
def test_committed_schedules(found):
    assert [why for each in found.records.values() if (why := stale(found, each))] == []


@cache
def good():
    """A record that holds on `TARGET`."""
    digest = schedule_hash(
        "combine", scheduled_function("combine", KEY, targets.from_identity(TARGET))
    )
    return record("combine", decisions={}, schedule_hash=digest)


@pytest.fixture
def root(tmp_path):
    publish(tmp_path, TARGET, KEY, {"combine": good()})
    return tmp_path


def edit(path, **changes):
    """Change the one record of a file; the checksum and the manifest hold again."""
    content = json.loads(path.read_text())
    content["records"]["combine"].update(changes)
    content.pop("checksum")
    path.write_text(json.dumps({**content, "checksum": checksum(content)}))
    try:
        found = [database_files.read_records(path)]
    except ValueError:
        return
    database_files.write_manifest(path.parent, found)


def test_sound_records_pass(root):
    assert problems(root) == []


def move(root):
    shutil.move(root / SLUG, root / "llvm-x86_64-znver5")


PLANTED = {
    "slower": (lambda root: edit(root / FILE, tuned_us=101.0), "slower than the default"),
    "failed trial": (lambda root: edit(root / FILE, tuned_us=float("inf")), "`tuned_us` must be"),
    "not a number": (lambda root: edit(root / FILE, default_us=float("nan")), "`default_us`"),
    "wrong result": (lambda root: edit(root / FILE, max_error=1.0), "`max_error` must be at most"),
    "no bandwidth": (lambda root: edit(root / FILE, read_gb_per_s=None), "bandwidth is missing"),
    "other hash": (lambda root: edit(root / FILE, schedule_hash="0" * 16), "when measured"),
    "other choice": (lambda root: edit(root / FILE, decisions={"gone": 1}), "got ('gone',)"),
    "other function": (lambda root: edit(root / FILE, function="attend"), "`function` must be"),
    "private path": (lambda root: edit(root / FILE, device="/home/me"), "a path of the machine"),
    "other directory": (move, f"it belongs into {SLUG}"),
    "edited": (
        lambda root: (root / FILE).write_text((root / FILE).read_text().replace("80.0", "8.0")),
        "checksum does not hold",
    ),
    "no manifest": (lambda root: (root / SLUG / "manifest.json").unlink(), "its manifest"),
    "old manifest": (
        lambda root: (root / SLUG / "manifest.json").write_text("{}"),
        "its manifest is not what its files give",
    ),
    "set aside": (
        lambda root: (root / SLUG / "x.corrupt").write_text(""),
        "x.corrupt: is not a file of the database",
    ),
    "empty directory": (lambda root: (root / "cuda-sm_90a").mkdir(), "has no records"),
    "stray file": (lambda root: (root / "notes").write_text(""), "is not a target's directory"),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_the_check_finds_planted_faults(root, plant):
    change, word = PLANTED[plant]
    change(root)
    assert any(word in problem for problem in problems(root)), problems(root)


def test_an_unusual_spelling_of_the_target_is_found(tmp_path):
    publish(tmp_path, {**TARGET, "keys": ["cpu"]}, KEY, {"combine": good()})
    assert any("is not spelled" in problem for problem in problems(tmp_path))


def test_entries_of_the_package_are_those_files():
    files = sorted(LOGS.glob("*/database_*.json"))
    assert [LOGS / found.path for found in database.entries(LOGS)] == files
