"""Which records no longer hold, and what pruning removes."""

from dataclasses import replace

import pytest
from artifacts import CFG
from records import FILE, KEY, SLUG, TARGET, record

from kivi_tvm import database, targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.database import entries, publish
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.publish import seeds
from kivi_tvm.tune.records import remove_scratch, stale, surely_stale
from kivi_tvm.workloads import Workload

OTHER_KEY = replace(CFG, key_bits=4).kernel_key()


@pytest.fixture(scope="module")
def good():
    schedule = scheduled_function("combine", KEY, targets.from_identity(TARGET))
    return record("combine", decisions={}, schedule_hash=schedule_hash("combine", schedule))


@pytest.fixture
def root(tmp_path, good):
    """A record that holds, a stale one of the same kernel and one of another kernel."""
    publish(tmp_path, TARGET, KEY, {"combine": good, "gone": record("gone")})
    publish(tmp_path, TARGET, OTHER_KEY, {"combine": good})
    return tmp_path


def test_stale(root):
    said = {
        (found.key, n): stale(found, r) for found in entries(root) for n, r in found.records.items()
    }
    assert said.pop((KEY, "gone")) == "there is no function of this name"
    assert said == {(KEY, "combine"): None, (OTHER_KEY, "combine"): None}


@pytest.mark.parametrize(
    "target",
    [{"kind": "toaster"}, {"kind": "opencl"}, {**TARGET, "mcpu": "znver99"}],
    ids=lambda target: target.get("mcpu", target["kind"]),
)
def test_what_cannot_be_checked_here_is_kept(tmp_path, good, target):
    publish(tmp_path, target, KEY, {"combine": good})
    (found,) = entries(tmp_path)
    with pytest.raises(ValueError, match="must be"):
        stale(found, good)
    assert database.prune(tmp_path, surely_stale) == ([], [])
    assert entries(tmp_path) == [found]


def test_pruning_removes_what_is_stale(root):
    removed, leftovers = database.prune(root, surely_stale)
    assert [item[:3] for item in removed] == [(SLUG, KEY.slug, "gone")] and not leftovers
    assert [set(found.records) for found in entries(root)] == [{"combine"}, {"combine"}]
    assert database.prune(root, surely_stale) == ([], [])


def test_leftovers(root):
    (root / FILE).write_text("{")
    assert database.prune(root, surely_stale).leftovers == []
    assert [path.name for path in database.prune(root, surely_stale, leftovers=True).leftovers] == [
        f"{(root / FILE).name}.corrupt"
    ]


def test_scratch_of_a_target_that_is_being_tuned_stays(tmp_path):
    from filelock import FileLock

    built = tmp_path / ".scratch" / SLUG / "built-1" / "candidate.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"12345")
    journal = built.parent.parent / "attend.jsonl"
    journal.write_text("")
    with FileLock(built.parent.parent / "session.lock"):
        assert remove_scratch(tmp_path) == 0 and built.exists()
    assert remove_scratch(tmp_path) == 5 and not built.exists() and journal.exists()


def test_the_search_starts_from_the_record_of_its_own_kernels(root, good, monkeypatch):
    """A record is replaced by what the next run finds: that run must have tried it."""
    mine, other = (replace(good, decisions={"elementwise_width": n}) for n in (8, 32))
    publish(root, TARGET, OTHER_KEY, {"combine": other})
    publish(root, TARGET, KEY, {"combine": mine})
    monkeypatch.setattr(database, "roots", lambda: {"user": root, "package": root / "absent"})
    target = targets.from_identity(TARGET)
    for key, first in ((KEY, mine), (OTHER_KEY, other)):
        found = list(
            seeds(root, target, Task("combine", Workload(8, 2, 64, 300, key_bits=key.key_bits)))
        )
        assert found[0] == first.decisions and len(found) == 2
