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


SOURCE = """\
__device__ int helper() { return 1; }
extern "C" __global__ void __launch_bounds__(128) append_kernel(int* __restrict__ k, int n);
extern "C" __global__ void __launch_bounds__(128) append_kernel(int* __restrict__ k, int n) {
  k[0] = n;
}
extern "C" __global__ void __launch_bounds__(64) attend_kernel(int* __restrict__ k) {
  k[0] = 1;
}
extern "C" __global__ void __launch_bounds__(64) combine_window_kernel(int* __restrict__ k) {
  k[0] = kivi_tvm_wait();
}
"""
END = 'extern "C"'  # what comes behind a kernel


def test_machine_code_behind_a_source():
    image = bytes(range(256)) * 5
    carrying = cuda.with_machine_code(SOURCE, image)
    assert carrying.startswith(SOURCE)
    assert cuda.machine_code_of(carrying) == image
    assert cuda.machine_code_of(SOURCE) is None


def test_launch_bounds_by_function():
    found = cuda.with_launch_bounds(SOURCE, {"attend": 2})
    assert f"__launch_bounds__(128, {cuda.MIN_BLOCKS}) append_kernel" in found
    assert "__launch_bounds__(64, 2) attend_kernel" in found


def test_asked_bytes_are_read_from_symbols():
    found = cuda.with_asked_bytes(SOURCE, {"attend_kernel": 63360, "extend_attend_kernel": 35840})
    assert cuda.asked_bytes(found) == {"attend_kernel": 63360, "extend_attend_kernel": 35840}
    assert cuda.with_asked_bytes(SOURCE, {}) == SOURCE and cuda.asked_bytes(SOURCE) == {}


def test_kernels_begin_as_they_say():
    found = cuda.with_early_launch(SOURCE, {"attend": "release", "combine_window": "later"})
    bodies = [each.partition("{")[2].strip() for each in found.split("__global__")[2:]]
    assert bodies[0].startswith("kivi_tvm_wait();\n  k[0] = n;")
    assert bodies[1].startswith("kivi_tvm_wait(); kivi_tvm_release();\n")
    assert bodies[2].startswith("k[0] = kivi_tvm_wait();")
    assert found.count("append_kernel(int* __restrict__ k, int n);") == 1  # a declaration as it was
    assert found.index("kivi_tvm_release()") < found.index("__global__")
    found = cuda.with_early_launch(SOURCE, {"append": "within", "attend": "later"})
    append, attend, _ = [each.partition("{")[2] for each in found.split("__global__")[2:]]
    assert append.split() == f"k[0] = n; kivi_tvm_wait(); kivi_tvm_release(); }} {END}".split()
    assert attend.split() == f"k[0] = 1; }} {END}".split()


@pytest.mark.parametrize(
    ("architecture", "number"), [("sm_90", 90), ("sm_90a", 90), ("sm_120f", 120), ("", 0)]
)
def test_number_of_an_architecture(architecture, number):
    assert cuda.number_of(architecture) == number
