"""What CUDA's compiler and devices are asked, without any."""

import pytest

from kivi_tvm import cuda


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_120", (12, 1), True),
    ],
)
def test_machine_code_runs_on_its_major_version(architecture, capability, runs):
    assert cuda.runs_on(architecture, capability) is runs


def test_compiler(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert cuda.find_compiler() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.find_compiler() == "nvcc"
    assert cuda.find_nvcc() == str(tmp_path / "bin" / "nvcc")
