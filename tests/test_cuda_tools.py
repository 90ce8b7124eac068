"""CUDA's tools found, and machine code found in files."""

import shutil
import struct
import subprocess

import pytest
from artifacts import elf_bytes

from kivi_tvm import cuda_tools
from kivi_tvm.errors import UserError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_tools = pytest.mark.skipif(
    not all(map(cuda_tools.find_program, cuda_tools.PROGRAMS)), reason="needs cuobjdump"
)
SOURCE = """
extern "C" __global__ void __launch_bounds__(64) copy_kernel(
    float4* to, const float4* from, int turns) {
  __shared__ float4 tile[64];
  for (int i = 0; i < turns; ++i) {
    tile[threadIdx.x] = from[i * 64 + threadIdx.x];
    __syncthreads();
    to[i * 64 + threadIdx.x] = tile[63 - threadIdx.x];
  }
}
"""


def cubin(size=500):
    header = bytearray(size)
    header[:7] = b"\x7fELF\x02\x01\x01"
    struct.pack_into("<HH", header, 16, 2, 190)
    struct.pack_into("<QQ4xHHHHH", header, 32, 0, size - 128, 64, 56, 0, 64, 2)
    return bytes(header)


def fatbin(body):
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_images_are_found():
    images = [fatbin(cubin() + cubin()), cubin(700), fatbin(b"")]
    library = elf_bytes() + images[0] + b"\0\x50\xed\x55\xba..." + images[1] + images[2] + b"\x7fE"
    assert list(cuda_tools.cuda_images(library)) == images
    assert list(cuda_tools.cuda_images(elf_bytes())) == []


def test_source_is_found():
    text = SOURCE.encode()
    library = elf_bytes() + struct.pack("<Q", len(text)) + text + b"\0tail"
    assert cuda_tools.cuda_source(library) == SOURCE
    assert cuda_tools.cuda_source(elf_bytes()) is None


def without_tools(monkeypatch, folder):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cuda_tools.importlib.util, "find_spec", lambda name: None)


def test_programs_are_searched(monkeypatch, tmp_path):
    without_tools(monkeypatch, tmp_path)
    assert cuda_tools.find_program("cuobjdump") is None
    with pytest.raises(UserError, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        cuda_tools.cuda_code(cubin(), "sm_90")
    tool = tmp_path / "bin" / "cuobjdump"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_tools.find_program("cuobjdump") == tool


def test_programs_of_packages_may_not_be_executable(monkeypatch, tmp_path):
    without_tools(monkeypatch, tmp_path)
    for name in cuda_tools.PROGRAMS:
        tool = tmp_path / "nvidia" / "cu13" / "bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text("#!/bin/sh\necho not code >&2; exit 3\n")
        tool.chmod(0o644)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(cuda_tools.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="cuobjdump failed: not code"):
        cuda_tools.cuda_code(cubin(), "sm_90")


@needs_tools
def test_a_library_without_cuda():
    with pytest.raises(UserError, match="holds no CUDA code"):
        cuda_tools.cuda_code(elf_bytes(), "sm_90")


@needs_nvcc
@needs_tools
def test_source_is_compiled_and_machine_code_is_preferred(tmp_path):
    text = SOURCE.encode()
    library = elf_bytes() + struct.pack("<Q", len(text)) + text
    code = cuda_tools.cuda_code(library, "sm_80")
    [kernel] = code.kernels
    assert (code.origin, kernel.name, kernel.architecture) == ("source", "copy", "sm_80")
    assert (kernel.shared_bytes, kernel.local_bytes, kernel.threads) == (1024, 0, 64)
    assert kernel.main_loop.counts.wide_load_bytes == kernel.main_loop.counts.global_load_bytes > 0

    path = tmp_path / "copy.cu"
    path.write_text(SOURCE)
    codes = [f"arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    command = ["nvcc", "-fatbin", "-gencode", codes[0], "-gencode", codes[1], "-o"]
    subprocess.run([*command, tmp_path / "copy.fatbin", path], check=True)
    library += b"\0" * 5 + (tmp_path / "copy.fatbin").read_bytes()
    library += cuda_tools.compiled(SOURCE, "sm_90")
    code = cuda_tools.cuda_code(library, "sm_80")
    assert code.origin == "library"
    found = [(kernel.architecture, kernel.shared_bytes) for kernel in code.kernels]
    assert found == [("sm_80", 1024), ("sm_90", 1024), ("sm_90", 1024)]


@needs_nvcc
@needs_tools
def test_a_compiler_that_fails_is_one_line():
    with pytest.raises(UserError, match=r"nvcc failed: .*undefined"):
        cuda_tools.kernels_of_source(SOURCE.replace("tile[63", "rug[63"), "sm_80")
