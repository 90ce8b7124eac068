"""Add up the tests of several JUnit files and print one line, as `N passed, N failed`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def count(paths: list[Path]) -> tuple[int, int, int]:
    """Return the tests passed, failed and skipped."""
    tests = failed = skipped = 0
    for path in paths:
        for suite in ElementTree.parse(path).iter("testsuite"):
            tests += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    return tests - failed - skipped, failed, skipped


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    passed, failed, skipped = count([p for p in files if p.exists()])
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
