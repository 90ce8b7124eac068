"""Tuning records for tests."""

from dataclasses import replace

from artifacts import CFG

from kivi_tvm.database import Record

KEY = CFG.kernel_key()
TARGET = {"kind": "llvm", "machine": "x86_64", "mcpu": "znver4", "system": "linux"}
SLUG = "llvm-x86_64-znver4"
FILE = f"{SLUG}/database_{KEY.slug}.json"


def record(function="attend", **changes):
    values = Record(
        function=function,
        decisions={"tile": 4},
        schedule_hash="0123456789abcdef",
        workload="B1-H8-Hkv2-T4096-D64-b2-G32",
        default_us=100.0,
        tuned_us=80.0,
        max_error=1e-6,
        error_limit=1e-4,
        trials=48,
        seed=0,
        date="2026-01-02T03:04:05+00:00",
        device="a processor",
        threads=2,
        runner="local",
        kind="measured",
        commit=None,
        versions={"tvm": "0.27.0"},
        bytes=1000,
        read_gb_per_s=10.0,
    )
    return replace(values, **changes)
