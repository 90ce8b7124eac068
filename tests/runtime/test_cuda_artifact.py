"""An artifact for a GPU that is not here: built, saved, loaded, and opened without a compiler.

A driver and a CUDA runtime that only fail stand in for real ones: TVM's runtime asks them nothing
until a kernel is launched.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from kivi_tvm import KiviConfig, build, load
from kivi_tvm.cuda import find_nvcc, machine_code_of
from kivi_tvm.cuda_tools import cuda_images, cuda_source
from kivi_tvm.errors import UserError
from kivi_tvm.host import CUDA_RUNTIME_LIBRARY, find_cxx, find_runtime_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
]
CFG = KiviConfig(128, 8, 2)
OPEN = """
import sys
{first}
from pathlib import Path
from kivi_tvm.runtime.library import open_library
library = open_library(Path({path!r}), "cuda")
library["attend"]
print(library.module.imports[0].kind, "tvm" in sys.modules)
import tvm.support.nvcc
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "kivi.so"
    build(CFG, {"kind": "cuda", "arch": "sm_90"}).save(path)
    return path


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with libcuda and libcudart: whatever TVM's runtime needs, and all of it fails."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    folder = tmp_path_factory.mktemp("stand_ins")
    runtime = find_runtime_library().with_name(CUDA_RUNTIME_LIBRARY)
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", runtime], capture_output=True, text=True, check=True
    ).stdout
    # the driver's functions are cuModuleLoad and the like, the runtime's cudaMalloc@libcudart.so.13
    symbols = re.findall(r" (cu[A-Z]\w+|cuda[A-Z]\w+)(?:@+(\S+))?$", listed, re.M)
    versions = {version for _, version in symbols if version}
    for library in ("libcuda.so.1", *versions):
        driver = library == "libcuda.so.1"
        names = [name for name, version in symbols if driver != bool(version)]
        source, script = folder / f"{library}.cc", folder / f"{library}.map"
        source.write_text("".join(f'extern "C" int {name}() {{ return 999; }}\n' for name in names))
        script.write_text(f"{library} {{ *; }};" if not driver else "{ global: *; };")
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        subprocess.run([find_cxx(), *flags, "-o", folder / library, source], check=True)
    return folder


def test_it_says_what_it_is_and_what_is_missing(artifact):
    loaded = load(artifact)
    assert loaded.cfg == CFG and loaded.target["arch"] == "sm_90"
    assert loaded.manifest["compute"] == "half"
    code = machine_code_of(cuda_source(artifact.read_bytes()))
    assert list(map(len, cuda_images(code))) == [len(code)] and len(code) > 10_000
    with pytest.raises(UserError, match="finds no NVIDIA driver"):
        loaded.new_cache(device="cuda")
    with pytest.raises(UserError, match="cannot open TVM's CUDA runtime"):
        loaded.library["attend"]


@pytest.mark.parametrize("first", ["", "import tvm.support.nvcc"])
def test_it_opens_without_a_compiler(artifact, stand_ins, first):
    """And `import tvm` works before and after."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_ins), "PATH": "/nonexistent"}
    script = OPEN.format(first=first, path=str(artifact))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cuda", str(bool(first))]
