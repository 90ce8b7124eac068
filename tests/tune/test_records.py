"""`kivi-tvm tune --list` and `--prune`: what there is, what still holds, and what goes."""

import json
from dataclasses import replace

import pytest
from artifacts import CFG
from records import FILE, KEY, SLUG, TARGET, record

from kivi_tvm import database, targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.database import entries, publish
from kivi_tvm.tune import records

OTHER_KEY = replace(CFG, key_bits=4).kernel_key()


@pytest.fixture(scope="module")
def good():
    schedule = scheduled_function("combine", KEY, targets.from_identity(TARGET))
    return record("combine", decisions={}, schedule_hash=schedule_hash("combine", schedule))


@pytest.fixture
def root(tmp_path, monkeypatch, good):
    """A record that holds, a stale one of the same kernel and one of another kernel."""
    monkeypatch.setenv("KIVI_TVM_TUNING_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(database, "package_dir", lambda: tmp_path / "package")
    publish(tmp_path / "user", TARGET, KEY, {"combine": good, "gone": record("gone")})
    publish(tmp_path / "user", TARGET, OTHER_KEY, {"combine": good})
    return tmp_path / "user"


def test_listing(root, good, tmp_path):
    publish(tmp_path / "package", TARGET, KEY, {"combine": good})
    rows = records.listing()
    assert [row["directory"] for row in rows] == ["user"] * 3 + ["package"]
    by_name = {(row["kernel"], row["function"]): row for row in rows[:3]}
    row = by_name[KEY.slug, "combine"]
    assert row == json.loads(json.dumps(row))
    assert row["target"] == SLUG and row["ratio"] == pytest.approx(1.25) and row["stale"] is None
    assert row["default_us"] == 100.0 and row["tuned_us"] == 80.0 and row["kind"] == "measured"
    assert by_name[KEY.slug, "gone"]["stale"] == "there is no function of this name"
    assert all(row["stale"] is None for row in records.listing(check=False))


def test_listing_of_one_directory(root, tmp_path):
    assert len(records.listing(root)) == 3
    assert records.listing(tmp_path / "nowhere") == []


def test_printed_listing(root, capsys):
    records.print_listing(records.listing(root))
    said = " ".join(capsys.readouterr().out.split())
    assert SLUG in said and "1.25x" in said and "gone: there is no function" in said
    records.print_listing([])
    assert capsys.readouterr().out == "no tuning records\n"


def test_a_target_that_tvm_does_not_know_is_stale(tmp_path, good):
    publish(tmp_path, {"kind": "toaster"}, KEY, {"combine": good})
    (row,) = records.listing(tmp_path)
    assert "`target` must be one TVM knows" in row["stale"]


def test_pruning_removes_what_is_stale(root):
    removed, leftovers = records.prune()
    assert [item[:3] for item in removed] == [(SLUG, KEY.slug, "gone")] and not leftovers
    assert [set(found.records) for found in entries(root)] == [{"combine"}, {"combine"}]
    assert records.prune() == ([], [])


def test_pruning_by_name(root):
    records.prune(root, kernel=OTHER_KEY.slug)
    (found,) = entries(root)
    assert found.key == KEY and set(found.records) == {"combine", "gone"}
    assert records.prune(root, target="cuda-sm_90a") == ([], [])
    assert len(records.prune(root, target=SLUG).records) == 2 and entries(root) == []


def test_leftovers(root):
    (root / FILE).write_text("{")
    assert records.prune(root).leftovers == []
    assert [path.name for path in records.prune(root, leftovers=True).leftovers] == [
        f"{(root / FILE).name}.corrupt"
    ]
