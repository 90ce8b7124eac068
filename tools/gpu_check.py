"""Check and measure the package on an NVIDIA GPU: everything in one call.

    python tools/gpu_check.py FOLDER --commit $(git rev-parse --short HEAD)

needs torch with CUDA, transformers, pytest, nvcc, compute-sanitizer and no network. Stages are
processes of their own with time limits; what they printed is in STAGE.log:

    build      compiles what the others run, on all processors (gpu_build.py)
    tests      tests of operators and caches on the GPU, against the reference     checks.jsonl
    memcheck, racecheck, synccheck
               compute-sanitizer on steps of some configurations, at once          checks.jsonl
    steps      a layer's decode step beside 16-bit attention (gpu_steps.py)        steps.jsonl
    models     decoding with whole models at equal memory (gpu_decode.py)          models.jsonl

On an H100 beside 16 processors that takes 7.3 minutes: `build` 2.5, tests 1.5, the sanitizers 0.9,
steps 1.4, models 0.9. `--only` runs some of the stages.
Exits with 1 if a check failed or a stage did not end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from gpu_steps import environment_of

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/ops", "tests/runtime/test_cuda.py",
    "tests/cli/test_tune.py::test_tune_on_a_gpu",
    "tests/tune/test_measure.py::test_a_gpu_is_timed_by_graphs",
)  # fmt: skip
SANITIZERS = "memcheck", "racecheck", "synccheck"
# Both ways to attend, with tiles in one page and in two, graphs and a row that is finished; kernels
# that `build` compiled.
SANITIZED = (
    "Hkv1-D128-M4-k2v8-g32x16-P64-float16-half-R96 or Hkv2-D64-M8-k2v2-g32x64-P96-float16-half-R96 "
    "or Hkv2-D128-M8-k4v8-g16x128-P96-float32-R48 or test_a_finished or graph"
)
CHECKS = "tests", *SANITIZERS
COUNTED = "tests", "failures", "errors", "skipped"
FOUND = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
SCRIPTS = {"steps": "gpu_steps.py", "models": "gpu_decode.py"}
LIMITS_S = {
    "build": 280, "tests": 330, **dict.fromkeys(SANITIZERS, 120), "steps": 400, "models": 280,
}  # fmt: skip
GROUPS = ("build",), ("tests",), SANITIZERS, ("steps",), ("models",)  # of stages at once


def pytest(*arguments: str) -> list[str]:
    """The command that runs tests on the GPU."""
    plain = "-p", "no:cacheprovider", "-p", "no:benchmark", "-q", "--kernels", "cuda"
    return [sys.executable, "-m", "pytest", *plain, *arguments]


def in_parallel() -> list[str]:
    """Tests compile most of the time: on all processors, where pytest-xdist is installed."""
    found = importlib.util.find_spec("xdist")
    count = min(16, os.cpu_count() or 1)
    return ["-n", str(count), "--dist", "worksteal"] if found else []


def command_of(stage: str, folder: Path, commit: str) -> list[str]:
    """What a stage runs."""
    if stage == "tests":
        junit = f"--junitxml={folder / 'tests.xml'}"
        return pytest(*TESTS, *in_parallel(), "--durations=10", junit)
    if stage in SANITIZERS:
        tool = ["compute-sanitizer", "--tool", stage, "--error-exitcode", "9"]
        return [*tool, *pytest("tests/runtime/test_cuda.py", "-x", "-k", SANITIZED)]
    if stage == "build":
        return [sys.executable, str(ROOT / "tools" / "gpu_build.py")]
    script = str(ROOT / "tools" / SCRIPTS[stage])
    return [sys.executable, script, str(folder / f"{stage}.jsonl"), "--commit", commit]


def result_of(stage: str, folder: Path) -> dict[str, object]:
    """What a check found."""
    if stage == "tests":
        if not (folder / "tests.xml").exists():
            return {"passed": False}
        [suite] = ElementTree.parse(folder / "tests.xml").getroot().iter("testsuite")
        counts = {name: int(suite.attrib[name]) for name in COUNTED}
        failed = counts["failures"] + counts["errors"]
        return {**counts, "passed": failed == 0 and counts["tests"] > counts["skipped"]}
    said = FOUND.findall((folder / f"{stage}.log").read_text(encoding="utf-8"))
    if not said:
        return {"passed": False}
    errors = int(said[-1][0] or said[-1][1])
    return {"errors": errors, "passed": errors == 0}


def run(stage: str, folder: Path, commit: str) -> dict[str, object]:
    """Run a stage; how it ended."""
    start = time.monotonic()
    with (folder / f"{stage}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command_of(stage, folder, commit), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                timeout=LIMITS_S[stage], check=False,
            )  # fmt: skip
            found: dict[str, object] = {"exit_status": done.returncode}
        except subprocess.TimeoutExpired:
            found = {"exit_status": None}
        except FileNotFoundError as error:
            log.write(f"{error}\n")
            found = {"exit_status": None}
    return {"check": stage, "seconds": round(time.monotonic() - start, 1), **found}


def results(stages: Collection[str], folder: Path, commit: str) -> Iterator[dict[str, object]]:
    """Run stages, those of a group at once; how each ended."""
    for group in GROUPS:
        asked = [stage for stage in group if stage in stages]
        with ThreadPoolExecutor(len(SANITIZERS)) as pool:
            yield from pool.map(lambda stage: run(stage, folder, commit), asked)


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results are written")
    parser.add_argument("--commit", required=True, help="what is measured")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = environment_of(args.commit, "kivi-tvm", "apache-tvm", "apache-tvm-ffi", "torch")
    failed = []
    if "tests" in args.only:
        (folder / "tests.xml").unlink(missing_ok=True)  # of an earlier run
    with (folder / "checks.jsonl").open("a", encoding="utf-8") as file:
        for found in results(args.only, folder, args.commit):
            stage = str(found["check"])
            if stage in CHECKS and found["exit_status"] is not None:
                found |= result_of(stage, folder)
                print(json.dumps(found | environment), file=file, flush=True)
            print(json.dumps(found), flush=True)
            if found["exit_status"] != 0 or not found.get("passed", True):
                failed.append(stage)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see the logs in {folder}")


if __name__ == "__main__":
    main()
