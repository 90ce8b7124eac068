"""Process groups that must not outlive this process, however it ends.

A compile process that was stopped while its parent is killed would stay for ever, and so would the
compilers it started. A small process of its own waits for this one to end and kills what is left.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

# Its standard input ends when this process does. No file: nothing on the import path is needed.
_SCRIPT = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    number = int(line)
    if number > 0:
        groups.add(number)
    else:
        groups.discard(-number)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """Kills the groups given to it when this process ends without taking them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def add(self, group: int) -> None:
        """Kill this process group at the end."""
        self._tell(group)

    def remove(self, group: int) -> None:
        """The group is gone; its number may be used again."""
        self._tell(-group)

    def close(self) -> None:
        """Kill the groups that are left, now."""
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()

    def _tell(self, number: int) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.write(f"{number}\n")
                self._process.stdin.flush()
