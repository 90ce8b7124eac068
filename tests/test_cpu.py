"""LLVM's feature names become the flags that Linux shows."""

import platform

import pytest

from kivi_tvm import cpu


def test_requirements_use_linux_names_and_drop_hints():
    features = ["+sse4.2", "avx512vnni", "bmi", "slow-3ops-lea", "prefer-256-bit", "-avx2", "sse3"]
    assert cpu.cpu_requirements(features, "x86_64") == ("avx512_vnni", "bmi1", "pni", "sse4_2")
    assert cpu.cpu_requirements(["neon", "dotprod"], "aarch64") == ("asimd", "asimddp")
    assert cpu.cpu_requirements(["v"], "riscv64") == ()


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (
            "processor\t: 0\nmodel name\t: Zen 9\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n",
            "Zen 9",
            {"fpu", "avx2"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None, {"fp", "asimd"}),
        (None, None, None),
    ],
    ids=["x86", "arm", "no file"],
)
def test_cpuinfo(tmp_path, monkeypatch, text, name, flags):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", path)
    assert cpu.cpu_flags() == flags
    assert cpu.cpu_name() == (name or platform.processor() or platform.machine())
    assert cpu.missing_cpu_flags(["avx2", "zzz"]) == (
        () if flags is None else tuple(sorted({"avx2", "zzz"} - flags))
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 flags")
def test_the_baseline_is_present_here():
    baseline = ("cmov", "cx8", "mmx", "sse", "sse2")
    assert cpu.missing_cpu_flags(cpu.cpu_requirements(baseline)) == ()
