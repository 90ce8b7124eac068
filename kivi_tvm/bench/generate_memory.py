"""Peak memory of one cache in a process of its own: what it takes above the model's weights.

The kernel keeps a process's highest resident size (VmHWM in /proc/self/status) and forgets it when
5 is written to /proc/self/clear_refs. A first short prompt on a cache that is thrown away brings
in the weights and all code; what is resident after it is subtracted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kivi_tvm.bench.generate_cases import Options, Setting, Subject, Text
from kivi_tvm.errors import UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
DECODED = 8  # steps; each takes as much as the next
TUPLES = ("context", "caches", "dtypes", "bits")


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest resident bytes above those of the loaded model; None where they cannot be read."""

    peak_prefill_bytes: int | None
    peak_decode_bytes: int | None


def measure(text: Text, setting: Setting, context: int) -> Peak:
    """Peaks of a prompt and of decode steps in this process."""
    if not _forget_peak():
        return Peak(None, None)
    first = Subject(text, setting, context)
    first.warm()
    del first
    _give_back()
    resident = _status_bytes("VmRSS")
    subject = Subject(text, setting, context)
    _forget_peak()
    subject.prefill()
    prefill = _status_bytes("VmHWM")
    _give_back()  # what the prompt freed is not part of decoding
    _forget_peak()
    for _ in range(DECODED):
        subject.step()
    return Peak(prefill - resident, _status_bytes("VmHWM") - resident)


def measured_apart(folder: Path, options: Options, setting: Setting) -> list[Peak]:
    """`measure` at every context, in a fresh process with the same threads.

    Raises
    ------
    UserError
        The process failed.
    """
    import torch

    asked = {
        "folder": str(folder),
        "options": asdict(options),
        "setting": asdict(setting),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise UserError(f"the process that measures memory of {setting.name} failed: {words[0]}")
    return [Peak(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _forget_peak() -> bool:
    """Start a new peak; whether this system can."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) << 10  # in kB


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _answer(asked: dict[str, Any]) -> list[Peak]:
    import torch

    torch.set_num_threads(asked["threads"])
    plain = asked["options"]
    options = Options(**plain | {name: tuple(plain[name]) for name in TUPLES})
    text = Text(Path(asked["folder"]), options)
    setting = Setting(**asked["setting"])
    return [measure(text, setting, context) for context in options.context]


if __name__ == "__main__":
    from kivi_tvm.hf import models

    models.quiet()
    print(json.dumps([asdict(peak) for peak in _answer(json.load(sys.stdin))]))
