"""Settings that every test runs under, and an account of the tests that were skipped."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import settings

# Before transformers is imported anywhere: no test reads from the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: on small tensors its threads mostly wait for each other (92 s became 7 s). Tests
# that are about threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels may compile inside an example, so a deadline would measure the compiler.
settings.register_profile("kivi", deadline=None, derandomize=True)
settings.load_profile("kivi")


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        choices=["cpu", "opencl", "cuda"],
        default="cpu",
        help="what tests/ops runs: kernels for this CPU, or GPU schedules on PoCL or a CUDA device",
    )


def pytest_configure(config):
    """Keep artifacts, converted weights and tuning records of the tests inside the checkout."""
    cache = Path(config.rootpath) / ".cache"
    os.environ.setdefault("KIVI_TVM_CACHE_DIR", str(cache / "kivi-tvm"))
    # Not the user's: what a developer has tuned must not change what the tests build.
    os.environ.setdefault("KIVI_TVM_TUNING_DIR", str(cache / "tuning_logs"))
    if (kernels := config.getoption("--kernels")) != "cpu":
        import configurations
        import gpu_kernels

        configurations.library = getattr(gpu_kernels, f"{kernels}_library")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--kernels") != "cpu":
        left_out = [item for item in items if item.get_closest_marker("cpu")]
        items[:] = [item for item in items if not item.get_closest_marker("cpu")]
        config.hook.pytest_deselected(items=left_out)
    # nvidia-smi stands for a driver: asking torch would import it even for tests without torch.
    if shutil.which("nvidia-smi"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def skipped(terminalreporter):
    """Return (test, reason) of every skip."""
    reports = terminalreporter.stats.get("skipped", [])
    found = []
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return found


def unexpected_skips(terminalreporter):
    """Return the skips that the file $KIVI_TVM_EXPECTED_SKIPS does not list, if it is set."""
    path = os.environ.get("KIVI_TVM_EXPECTED_SKIPS")
    if not path:
        return []
    lines = [x.strip() for x in Path(path).read_text().splitlines()]
    patterns = [x for x in lines if x and not x.startswith("#")]
    texts = [f"{test}: {reason}" for test, reason in skipped(terminalreporter)]
    return [t for t in texts if not any(fnmatchcase(t, p) for p in patterns)]


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and unexpected_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    counts = Counter(reason for _, reason in skipped(terminalreporter))
    deselected = len(terminalreporter.stats.get("deselected", []))
    if counts or deselected:
        terminalreporter.section("not run")
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    if deselected:
        terminalreporter.write_line(f"{deselected} left out by -m or -k (`make slow` runs more)")
    for text in unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"UNEXPECTED SKIP {text}", red=True)
