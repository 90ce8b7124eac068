"""Kernels compiled by NVRTC, as where there is no nvcc.

KIVI_TVM_NVRTC is a directory with the packages of the extra `nvrtc`, such as

    pip install --target nvrtc -c constraints.txt cuda-bindings nvidia-cuda-cccl \\
        nvidia-cuda-nvrtc nvidia-cuda-runtime
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kivi_tvm import cuda_tools

ROOT = Path(__file__).parents[1]
PACKAGES = os.environ.get("KIVI_TVM_NVRTC")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGES, reason="needs NVRTC in KIVI_TVM_NVRTC"),
]
# In a process of its own, whose compiler is no other's.
COMPILE = """
import sys
from pathlib import Path
from kivi_tvm import cuda, targets
from kivi_tvm.compile import scheduled_module
from kivi_tvm.config import KiviConfig
from kivi_tvm.lowering import compile_module
target = targets.resolve({"kind": "cuda", "arch": sys.argv[1]})
key = targets.kernel_key(KiviConfig(128, 32, 8, dtype=sys.argv[2]), target)
module = compile_module(scheduled_module(key, target), target, for_elsewhere=True)
code = cuda.machine_code_of(module.mod.imports[0].inspect_source("cuda"))
Path(sys.argv[3]).write_bytes(code)
print(cuda.find_compiler(), *sorted(cuda.known_architectures()))
"""


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_75", "float16"), ("sm_90", "bfloat16"), ("sm_120", "float16")]
)
def test_every_kernel_becomes_machine_code(architecture, dtype, tmp_path):
    (tmp_path / "which").symlink_to(shutil.which("which"))  # by which TVM looks for nvcc
    found = {
        **os.environ,
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([PACKAGES, str(ROOT)]),
        "CUDA_HOME": str(Path(PACKAGES) / "nvidia" / "cu13"),
    }
    image = tmp_path / "kernels.cubin"
    command = [sys.executable, "-c", COMPILE, architecture, dtype, image]
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiler, *known = done.stdout.split()
    assert compiler == "nvrtc" and architecture in known
    code = image.read_bytes()
    assert list(map(len, cuda_tools.cuda_images(code))) == [len(code)]
    for kernel in (b"attend_kernel", b"append_kernel", b"combine_window_kernel"):
        assert kernel in code
