"""`kivi-tvm inspect` from outside."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from artifacts import CFG, ELF_MACHINES, elf_bytes, export_elf, manifest

from kivi_tvm import KiviConfig
from kivi_tvm.artifact import write_artifact
from kivi_tvm.cuda_tools import PROGRAMS, find_program
from kivi_tvm.host import Platform

TUNED = {"device": "cpu", "date": "2026-01-02", "default_us": 20.0, "tuned_us": 10.5}


def inspect(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "kivi_tvm", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
    )


def facts(*arguments, status=0):
    done = inspect("--json", *arguments)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def artifact(tmp_path):
    write_artifact(tmp_path / "kivi.so", manifest(), export_elf)
    return tmp_path / "kivi.so"


def test_json(artifact):
    found = facts(artifact)
    assert found["kernels"] == CFG.kernel_key().slug
    assert found["kernel_key"] == CFG.kernel_key().to_dict() and found["config"] == CFG.to_dict()
    assert found["target"] == {"kind": "llvm", "mcpu": "x86-64-v3"}
    assert found["versions"]["tvm"] == "0.27.0.post1"
    assert found["sources"] == {"attend": "default"} and found["tuning"] == {}
    assert (found["size_bytes"], found["architecture"]) == (400, None)
    assert found["damage"] == found["not_for_this_machine"] == []


def test_text(artifact):
    said = {"attend": "tuned"}, {"attend": {**TUNED, "origin": "package"}}
    made = manifest(sources=said[0], tuning=said[1], cpu_flags=("avx2", "fma"))
    made = write_artifact(artifact, made, export_elf)
    text = inspect(artifact).stdout
    for line in (
        f"kernels           {CFG.kernel_key().slug}",
        "target            llvm x86-64-v3",
        "needs             avx2 fma",
        f"sha256            {made.sha256}",
        "attend            tuned by package on cpu, 2026-01-02: 20 to 10.5 us",
    ):
        assert line in text.splitlines()


def test_another_machine(tmp_path):
    machine = next(name for name in ELF_MACHINES if name != Platform.here().machine)
    platform = replace(Platform.here(), machine=machine)
    made = manifest(platform=platform, cpu_flags=("nonsense",))
    path = tmp_path / "far.so"
    write_artifact(path, made, lambda at: at.write_bytes(elf_bytes(machine)))
    found = facts(path)
    assert found["damage"] == [] and found["cpu_flags"] == ["nonsense"]
    assert len(found["not_for_this_machine"]) == 1
    assert machine in found["not_for_this_machine"][0]


def test_a_changed_library(artifact):
    artifact.write_bytes(elf_bytes(size=399) + b"x")
    [problem] = facts(artifact, status=1)["damage"]
    assert "sha256" in problem
    text = inspect(artifact).stdout
    assert "sha256            NOT that of the file" in text and problem in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("kivi.txt", b"", ["must end in .so"]),
        ("kivi.so", b"no library", ["must be a 64-bit little-endian ELF file"]),
        ("kivi.so", None, ["cannot be read"]),
        ("kivi.so", elf_bytes(kind=2), ["must be an ELF shared object"]),
        ("kivi.so", elf_bytes(), ["its manifest kivi.json cannot be read"]),
    ],
)
def test_not_an_artifact(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = inspect(path)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "not an artifact" in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_changed_manifest(artifact):
    path = artifact.with_suffix(".json")
    path.write_text(path.read_text().replace("x86-64-v3", "x86-64-v2"))
    done = inspect(artifact)
    assert done.returncode == 2 and "`checksum` must be" in done.stderr


def test_no_cuda_kernels(artifact):
    done = inspect("--cuda", artifact)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "`--cuda` is for artifacts of CUDA kernels" in done.stderr and "llvm" in done.stderr


def cuda_artifact(path, cfg, architecture):
    """Write kernels for a GPU that need not be here."""
    from kivi_tvm import targets
    from kivi_tvm.compile import compile_kernels

    target = targets.resolve({"kind": "cuda", "arch": architecture})
    kernels = compile_kernels(targets.kernel_key(cfg, target), target)
    write_artifact(path, replace(kernels.manifest(), config=cfg.to_dict()), kernels.export)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(not all(map(find_program, PROGRAMS)), reason="needs cuobjdump and nvdisasm")
def test_attention_for_tensor_cores(tmp_path):
    path = tmp_path / "kivi.so"
    cuda_artifact(path, KiviConfig(128, 32, 8), "sm_90")
    found = facts("--cuda", path)
    assert found["architecture"] == "sm_90"
    kernels = {each["kernel"]: each for each in found["cuda"]["kernels"]}
    assert kernels.keys() == found["sources"].keys()
    attend = kernels["attend"]
    assert found["cuda"]["code_from"] == "library"
    assert attend["architecture"] == "sm_90" and attend["occupancy"]["groups"] >= 3
    assert attend["shared_bytes"] > 48 << 10  # with what it asks for at launch
    assert attend["spilled_bytes"] == attend["local_bytes"] == 0
    assert any(loop["mma"] for loop in attend["loops"])
    loads = [each for loop in attend["loops"] for each in loop["global_loads"].items()]
    load_bytes = [(bits, int(bits) // 8 * count) for bits, count in loads]
    wide_bytes = sum(size for bits, size in load_bytes if bits == "128")
    assert wide_bytes >= 0.9 * sum(size for _, size in load_bytes) > 0
    assert not any(loop["int_to_float"] for loop in attend["loops"])  # codes: halves by their bits
    text = inspect("--cuda", path).stdout
    assert "limited by" in text and "loop of" in text
