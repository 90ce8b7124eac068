"""Records are published whole by any number of processes, and damage is set aside."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from artifacts import CFG
from records import FILE, KEY, SLUG, TARGET, record

from kivi_tvm import database, database_files
from kivi_tvm.database import entries, find, prune, publish
from kivi_tvm.errors import UserError
from kivi_tvm.tuning_record import checksum

OTHER_KEY = replace(CFG, key_bits=4).kernel_key()
PUBLISHER = """
    import os, sys
    from pathlib import Path
    from records import KEY, TARGET, record
    from kivi_tvm import database_files
    from kivi_tvm.database import publish

    root, function, times, stop_at = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    count, real = 0, os.replace

    def stopping(*args):
        global count
        count += 1
        if count == stop_at:
            print("stopped", flush=True)
            sys.stdin.read()
        real(*args)

    database_files.os.replace = stopping
    for i in range(times):
        publish(root, TARGET, KEY, {f"{function}{i}": record(f"{function}{i}")})
    print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KIVI_TVM_TUNING_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(database, "package_dir", lambda: tmp_path / "package")
    return tmp_path / "user"


def start(tmp_path, function, times, stop_at=0):
    script = tmp_path / "publisher.py"
    script.write_text(textwrap.dedent(PUBLISHER))
    return subprocess.Popen(
        [sys.executable, script, tmp_path / "user", function, str(times), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def manifest(root):
    return json.loads((root / SLUG / "manifest.json").read_text())


def check_manifest(root):
    """Its text is what the files give."""
    folder = root / SLUG
    expected = database_files.manifest_text(folder, entries(root))
    assert (folder / "manifest.json").read_text() == expected


def edit(path, **changes):
    """Change a file and make its checksum hold again."""
    content = {**json.loads(path.read_text()), **changes}
    content.pop("checksum")
    path.write_text(json.dumps({**content, "checksum": checksum(content)}))


def test_published_records_are_found(root):
    assert publish(root, TARGET, KEY, {"attend": record()}) == root / FILE
    found = find(TARGET, KEY)
    assert found.records == {"attend": record()} and found.origins == {"attend": "user"}
    assert found.paths == (root / FILE,) and found.digest and found.target_known
    check_manifest(root)
    (kernel,) = manifest(root)["kernels"]
    assert kernel["records"][0]["tuned_us"] == 80.0 and "decisions" not in kernel["records"][0]
    assert {path.name for path in (root / SLUG).iterdir()} == {
        os.path.basename(FILE), "manifest.json", ".lock"
    }  # fmt: skip


def test_new_records_replace_old_ones_of_their_function(root):
    publish(root, TARGET, KEY, {"attend": record(), "combine": record("combine")})
    publish(root, TARGET, KEY, {"attend": record(tuned_us=70.0)})
    publish(root, TARGET, OTHER_KEY, {"attend": record()})
    found = find(TARGET, KEY).records
    assert found == {"attend": record(tuned_us=70.0), "combine": record("combine")}
    assert len(entries(root)) == 2
    check_manifest(root)


def test_nothing_is_found_for_another_target_or_key(root):
    publish(root, TARGET, KEY, {"attend": record()})
    other = find(TARGET, OTHER_KEY)
    assert not other.records and other.digest == "" and other.target_known
    for change in ({"mcpu": "znver5"}, {"mcpu": "x86-64"}, {"mattr": ["-avx512f"]}):
        found = find({**TARGET, **change}, KEY)
        assert not found.records and not found.target_known


def test_the_user_comes_first_one_function_at_a_time(root, tmp_path):
    package = {"attend": record(tuned_us=60.0), "combine": record("combine")}
    publish(tmp_path / "package", TARGET, KEY, package)
    alone = find(TARGET, KEY)
    publish(root, TARGET, KEY, {"attend": record()})
    found = find(TARGET, KEY)
    assert found.records == {"attend": record(), "combine": record("combine")}
    assert found.origins == {"attend": "user", "combine": "package"}
    assert len(found.paths) == 2 and found.digest != alone.digest


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tuned_us": float("inf")}, "`tuned_us` must be float, got inf"),
        ({"tuned_us": float("nan")}, "`tuned_us` must be float, got nan"),
        ({"tuned_us": 0.0}, "`tuned_us` must be positive"),
        ({"max_error": 1.0}, "`max_error` must be at most 0.0001, got 1.0"),
        ({"kind": "guessed"}, "`kind` must be one of ['measured', 'estimated']"),
        ({"function": "combine"}, "`function` must be 'attend', got 'combine'"),
        ({"decisions": {"tile": None}}, "`decisions` must be"),
        ({"trials": True}, "`trials` must be int"),
    ],
)
def test_records_that_break_a_rule_are_not_published(root, changes, rule):
    with pytest.raises(ValueError) as error:
        publish(root, TARGET, KEY, {"attend": record(**changes)})
    assert rule in str(error.value)
    assert not root.exists()


def test_concurrent_publishers_lose_nothing(root, tmp_path):
    publishers = [start(tmp_path, f"f{i}_", 25) for i in range(3)]
    while any(process.poll() is None for process in publishers):
        entries(root, notify=pytest.fail)
        find(TARGET, KEY, notify=pytest.fail)
    assert [process.communicate()[0] for process in publishers] == ["done\n"] * 3
    assert len(find(TARGET, KEY).records) == 75
    check_manifest(root)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_killed_publisher_leaves_a_readable_directory(root, tmp_path, stop_at):
    """`os.replace` runs twice for each of two publications: the records, then the manifest."""
    victim = start(tmp_path, "f", 2, stop_at)
    assert victim.stdout.readline() == "stopped\n"
    victim.kill()
    victim.communicate()
    assert set(find(TARGET, KEY, notify=pytest.fail).records) == {
        f"f{i}" for i in range(stop_at // 2)
    }
    assert len(list((root / SLUG).glob(".*.tmp"))) == 1
    publish(root, TARGET, KEY, {"attend": record()})
    assert not list((root / SLUG).glob(".*.tmp"))
    check_manifest(root)


def flip(path):
    text = path.read_text()
    path.write_text(text.replace("80.0", "10.0"))


DAMAGE = {
    "empty": lambda path: path.write_text(""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "edited": flip,
    "list": lambda path: path.write_text("[]"),
    "foreign": lambda path: path.write_text('{"workloads": []}'),
    "nested": lambda path: path.write_text("[" * 100_000),
    "no records": lambda path: edit(path, records=None),
    "unknown field": lambda path: edit(path, records={"attend": {"surprise": 1}}),
    "other target": lambda path: edit(path, target={**TARGET, "mcpu": "znver5"}),
    "other key": lambda path: edit(path, kernel_key=OTHER_KEY.to_dict()),
    "no key": lambda path: edit(path, kernel_key=1),
    "no target": lambda path: edit(path, target=None),
    "failed trial": lambda path: edit(path, records={"attend": record(tuned_us=1e999).to_dict()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("read", ["find", "publish"])
def test_damage_is_set_aside(root, damage, read):
    publish(root, TARGET, KEY, {"attend": record()})
    publish(root, TARGET, OTHER_KEY, {"attend": record()})
    DAMAGE[damage](root / FILE)
    content, said = (root / FILE).read_bytes(), []
    if read == "find":
        assert not find(TARGET, KEY, said.append).records
        assert not (root / FILE).exists()
    else:
        publish(root, TARGET, KEY, {"combine": record("combine")}, said.append)
        assert set(find(TARGET, KEY).records) == {"combine"}
    assert len(said) == 1 and f"{root / FILE}.corrupt was set aside: " in said[0]
    assert (root / f"{FILE}.corrupt").read_bytes() == content
    assert find(TARGET, OTHER_KEY, pytest.fail).records
    check_manifest(root)


def test_nothing_that_was_set_aside_is_overwritten(root):
    for content in ("1", "2", "3"):
        publish(root, TARGET, KEY, {"attend": record()})
        (root / FILE).write_text(content)
        find(TARGET, KEY, lambda message: None)
    aside = sorted((root / SLUG).glob("*.corrupt"))
    assert sorted(path.read_text() for path in aside) == ["1", "2", "3"]


def test_a_newer_file_is_left_to_newer_versions(root):
    publish(root, TARGET, KEY, {"attend": record()})
    edit(root / FILE, format_version=2)
    said = []
    assert not find(TARGET, KEY, said.append).records
    assert "`format_version` must be 1, got 2" in said[0] and (root / FILE).exists()
    publish(root, TARGET, OTHER_KEY, {"attend": record()}, said.append)
    database.prune(root, lambda found, record: None, leftovers=True, notify=said.append)
    assert all("left as they are" in line for line in said[1:3]) and (root / FILE).exists()
    publish(root, TARGET, KEY, {"attend": record()}, said.append)
    assert "set aside" in said[3] and find(TARGET, KEY).records


def test_pruning_keeps_what_it_sets_aside(root):
    publish(root, TARGET, KEY, {"attend": record()})
    (root / FILE).write_text("{")
    assert database.prune(root, lambda found, record: None, True, print).leftovers == []
    (aside,) = root.glob("*/*.corrupt")
    assert aside.read_text() == "{"


def test_listing_changes_nothing(root):
    publish(root, TARGET, KEY, {"attend": record()})
    publish(root, TARGET, OTHER_KEY, {"attend": record()})
    (root / FILE).write_text("{")
    said = []
    assert [found.key for found in entries(root, said.append)] == [OTHER_KEY]
    assert len(said) == 1 and (root / FILE).read_text() == "{"
    assert entries(root / "nowhere") == []


def test_package_records_are_never_touched(tmp_path):
    package = tmp_path / "package"
    publish(package, TARGET, KEY, {"attend": record()})
    (package / FILE).write_text("{")
    said = []
    find(TARGET, KEY, said.append)
    assert len(said) == 1 and "are not used: it is not JSON" in said[0]
    assert (package / FILE).read_text() == "{"


def test_a_directory_that_cannot_be_written(root, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    publish(root, TARGET, KEY, {"attend": record()})
    (root / FILE).write_text("{")
    monkeypatch.setattr(database_files.os, "replace", refuse)
    said = []
    assert not find(TARGET, KEY, said.append).records
    assert "are not used" in said[0] and (root / FILE).read_text() == "{"
    with pytest.raises(UserError) as error:
        publish(root, TARGET, OTHER_KEY, {"attend": record()})
    assert f"{root} cannot be written (Permission denied)" in str(error.value)
    assert "--log-dir" in str(error.value)


def test_a_file_where_the_directory_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written \(Not a directory|File exists"):
        publish(tmp_path / "file", TARGET, KEY, {"attend": record()})
    monkeypatch.setenv("KIVI_TVM_TUNING_DIR", str(tmp_path / "file"))
    assert not find(TARGET, KEY, pytest.fail).records


def test_pruning_removes_what_has_a_problem(root):
    publish(root, TARGET, KEY, {"attend": record(), "combine": record("combine")})
    publish(root, TARGET, OTHER_KEY, {"combine": record("combine")})
    removed, leftovers = prune(root, lambda f, r: "old" if r.function == "combine" else None)
    assert sorted(removed) == sorted((SLUG, key.slug, "combine", "old") for key in (KEY, OTHER_KEY))
    assert leftovers == [] and set(find(TARGET, KEY).records) == {"attend"}
    assert [found.key for found in entries(root)] == [KEY]
    check_manifest(root)
    prune(root, lambda f, r: "all")
    assert [path.name for path in (root / SLUG).iterdir()] == [".lock"]


def test_leftovers_are_removed_only_when_asked(root):
    publish(root, TARGET, KEY, {"attend": record()})
    (root / FILE).write_text("{")
    find(TARGET, KEY, lambda message: None)
    assert prune(root, lambda f, r: None) == ([], [])
    aside = root / f"{FILE}.corrupt"
    assert aside.exists()
    assert prune(root, lambda f, r: None, leftovers=True) == ([], [aside])
    assert not aside.exists()


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("KIVI_TVM_TUNING_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert database.user_dir() == tmp_path / "kivi-tvm" / "tuning_logs"
