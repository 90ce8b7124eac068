"""Machine code taken out of compiled libraries by CUDA's tools, without opening the libraries."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kivi_tvm.cuda import PTXAS_LEVEL, find_nvcc, machine_code_of
from kivi_tvm.errors import UserError
from kivi_tvm.machine_code import KernelCode, kernels

PROGRAMS = ("cuobjdump", "nvdisasm")  # the first runs the second
MISSING = (
    "needs cuobjdump and nvdisasm: on the PATH, below CUDA_HOME, or "
    "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
)
# As TVM compiles kernels.
NVCC_OPTIONS = ["-cubin", "-O3", "-w", f"--ptxas-options=--register-usage-level={PTXAS_LEVEL}"]
SOURCE_MARK = b'extern "C" __global__ '

# Magic number, version, bytes of the header, bytes after it.
_FATBIN = struct.Struct("<IHHQ")
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_ELF_MAGIC = b"\x7fELF\x02\x01"
_ELF_CUDA = 190  # `e_machine`
# `e_phoff`, `e_shoff`, flags, then sizes and numbers of the entries of both tables.
_ELF_TABLES = struct.Struct("<QQ4xHHHHH")


@dataclass(frozen=True, slots=True)
class CudaCode:
    """The kernels of a library, and where their machine code is from.

    `origin` is "library", or "source": the library holds CUDA source, which TVM's runtime compiles
    where it is opened, and the machine code is what nvcc of this machine makes of it.
    """

    origin: str
    kernels: tuple[KernelCode, ...]


def cuda_code(library: bytes, architecture: str) -> CudaCode:
    """The kernels of a compiled library.

    Parameters
    ----------
    library : bytes
        The file.
    architecture : str
        What its source is compiled for, if it has no machine code.

    Raises
    ------
    UserError
        The library holds no CUDA code, or a tool is missing or fails.
    """
    with _programs() as programs:
        source = cuda_source(library)
        carried = source and machine_code_of(source)
        if images := [carried] if carried else list(cuda_images(library)):
            found = [kernel for image in images for kernel in _kernels(image, programs)]
            return CudaCode("library", tuple(found))
        if source is None:
            raise UserError("the library holds no CUDA code")
        return CudaCode("source", tuple(_kernels(compiled(source, architecture), programs)))


def kernels_of_source(source: str, architecture: str) -> tuple[KernelCode, ...]:
    """The kernels of a CUDA source, compiled by nvcc for one architecture.

    Raises
    ------
    UserError
        A tool is missing or fails.
    """
    with _programs() as programs:
        return tuple(_kernels(compiled(source, architecture), programs))


def disassembled(image: bytes) -> str:
    """What `cuobjdump -sass` prints of a cubin.

    Raises
    ------
    UserError
        A tool is missing or fails.
    """
    with _programs() as programs, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.cubin")
        path.write_bytes(image)
        return _output([str(programs / "cuobjdump"), "-sass", str(path)], _found_by(programs))


def find_program(name: str) -> Path | None:
    """A tool of CUDA: on the PATH, below CUDA_HOME or CUDA_PATH, or in a package from PyPI."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in homes if home]
    search = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    if path := shutil.which(name, path=search):
        return Path(path)
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        # The files may have lost their executable bit on the way.
        for path_found in sorted(Path(location).glob(f"*/bin/{name}")):
            return path_found
    return None


def cuda_images(library: bytes) -> Iterator[bytes]:
    """The fat binaries and single cubins inside a file."""
    at = 0
    while True:
        places = [library.find(magic, at) for magic in (_FATBIN_MAGIC, _ELF_MAGIC)]
        if not (found := [place for place in places if place >= 0]):
            return
        at = min(found)
        size = _fatbin_bytes(library, at) or _cubin_bytes(library, at)
        if size:
            yield library[at : at + size]
        at += size or 1


def _fatbin_bytes(library: bytes, at: int) -> int:
    """The size of the fat binary at an offset, 0 if there is none."""
    if not library.startswith(_FATBIN_MAGIC, at) or at + _FATBIN.size > len(library):
        return 0
    _, version, header, body = _FATBIN.unpack_from(library, at)
    inside = version == 1 and header >= _FATBIN.size and at + header + body <= len(library)
    return header + body if inside else 0


def _cubin_bytes(library: bytes, at: int) -> int:
    """The size of the machine code for GPUs at an offset, 0 if there is none."""
    if not library.startswith(_ELF_MAGIC, at) or at + 64 > len(library):
        return 0
    if struct.unpack_from("<H", library, at + 18)[0] != _ELF_CUDA:
        return 0
    programs, sections, _, each, count, width, number = _ELF_TABLES.unpack_from(library, at + 32)
    return int(max(programs + each * count, sections + width * number))


def cuda_source(library: bytes) -> str | None:
    """The CUDA source inside a file, which TVM writes after its length; None if there is none."""
    place = library.find(SOURCE_MARK)
    if place < 0:
        return None
    start = library.rfind(b"\0", 0, place) + 1
    (size,) = struct.unpack_from("<Q", library, start - 8)
    return library[start : start + size].decode(errors="replace")


def compiled(source: str, architecture: str) -> bytes:
    """A cubin that nvcc makes of a CUDA source.

    Raises
    ------
    UserError
        There is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError(
            "the library holds CUDA source, no machine code: needs nvcc to compile it "
            "(on the PATH or below CUDA_HOME)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        path.write_text(source, encoding="utf-8")
        _output([nvcc, f"-arch={architecture}", *NVCC_OPTIONS, "-o", str(cubin), str(path)])
        return cubin.read_bytes()


def _kernels(image: bytes, programs: Path) -> Iterator[KernelCode]:
    """The kernels of a fat binary or a cubin, for every architecture in it."""
    environment = _found_by(programs)
    with tempfile.TemporaryDirectory() as folder:
        # The tool goes by the name's ending.
        suffix = "fatbin" if image.startswith(_FATBIN_MAGIC) else "cubin"
        path = Path(folder, f"image.{suffix}")
        path.write_bytes(image)
        tool = str(programs / "cuobjdump")
        if suffix == "fatbin":
            _output([tool, "-xelf", "all", path.name], environment, folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            options = ("-sass", "-res-usage", "-elf")
            sass, usage, elf = (_output([tool, each, str(cubin)], environment) for each in options)
            yield from kernels(sass, usage, elf)


def _found_by(programs: Path) -> dict[str, str]:
    """The environment in which one tool finds the other."""
    search = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": search}


@contextmanager
def _programs() -> Iterator[Path]:
    """A folder with the tools, as files that can be run."""
    found = {name: find_program(name) for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in found.items():
            if path is None:
                raise UserError(MISSING)
            place = Path(folder, name)
            if os.access(path, os.X_OK):
                place.symlink_to(path)
            else:
                shutil.copyfile(path, place)
                place.chmod(0o755)
        yield Path(folder)


def _output(
    command: list[str], environment: Mapping[str, str] | None = None, folder: str | None = None
) -> str:
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        said = re.sub(r"\s+", " ", error.stderr)[-300:]
        raise UserError(f"{Path(command[0]).name} failed: {said}") from error
    return done.stdout
