"""Process groups and folders that must not outlive this process, however it ends.

A compile process that was stopped while its parent is killed would stay for ever, and so would the
compilers it started. A small process of its own waits for this one to end and kills what is left.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

# Its standard input ends when this process does. No file: nothing on the import path is needed.
_SCRIPT = """
import os, shutil, signal, sys
groups, folders = set(), []
for line in sys.stdin:
    if line.startswith("/"):
        folders.append(line[:-1])
        continue
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
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""


class Guard:
    """Kills the groups given to it when this process ends without taking them back.

    Folders given to it are removed then.
    """

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
        self._tell(str(group))

    def add_folder(self, folder: Path) -> None:
        """Remove this folder at the end, after the groups."""
        self._tell(str(folder.absolute()))

    def remove(self, group: int) -> None:
        """The group is gone; its number may be used again."""
        self._tell(str(-group))

    def close(self) -> None:
        """Kill the groups that are left and remove the folders, now."""
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()
