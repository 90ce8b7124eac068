"""An artifact is read back whole, or refused with every reason before anything opens it."""

import json
import platform
from dataclasses import replace

import pytest
from artifacts import CFG, elf_bytes, export_elf, manifest

from kivi_tvm import cpu
from kivi_tvm.artifact import ArtifactError, manifest_path, read_artifact, write_artifact
from kivi_tvm.host import Platform
from kivi_tvm.manifest import parse_manifest


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "kivi.so"
    write_artifact(path, manifest(), export_elf)
    return path


def refusal(path):
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit(path, **changes):
    """Change fields of NAME.json as someone with an editor would."""
    record = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**record, **changes}))


def save(path, **changes):
    """Write an artifact whose manifest is sound but says something else."""
    write_artifact(path, manifest(**changes), export_elf)
    return path


def test_written_artifact_is_read_back(saved):
    path, found = read_artifact(saved)
    assert path == saved and path.is_absolute()
    assert found == manifest(sha256=found.sha256, size_bytes=len(elf_bytes()))
    assert found.key == CFG.kernel_key() and found.compute == "float"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["kivi.json", "kivi.so"]


def test_manifest_survives_json():
    original = manifest(cpu_flags=("avx2", "fma"), config=None, sha256="ab", size_bytes=3)
    assert parse_manifest(original.to_json()) == (original, [])


def test_a_failed_export_leaves_the_previous_artifact(saved):
    before = saved.read_bytes(), manifest_path(saved).read_bytes()

    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError("the linker failed")

    with pytest.raises(RuntimeError, match="the linker failed"):
        write_artifact(saved, manifest(), fail)
    assert (saved.read_bytes(), manifest_path(saved).read_bytes()) == before
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "rule"), [("kivi.dll", "must end in .so"), ("no/kivi.so", "existing directory")]
)
def test_a_bad_path_is_refused_when_writing(tmp_path, name, rule):
    with pytest.raises(ArtifactError, match=rule):
        write_artifact(tmp_path / name, manifest(), export_elf)
    assert not list(tmp_path.iterdir())


def test_missing_files_are_both_named(tmp_path):
    message = refusal(tmp_path / "absent.so")
    assert "the library cannot be read: No such file" in message
    assert "absent.json cannot be read: No such file" in message


def test_missing_manifest(saved):
    manifest_path(saved).unlink()
    assert "kivi.json cannot be read: No such file" in refusal(saved)


def test_a_directory_is_not_a_library(tmp_path):
    (tmp_path / "kivi.so").mkdir()
    assert "Is a directory" in refusal(tmp_path / "kivi.so")


@pytest.mark.parametrize("kept", [0, 3, 19, 200, 399])
def test_truncated_library(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    message = refusal(saved)
    assert f"must have 400 bytes, got {kept}" in message or "ELF" in message


def test_one_changed_bit(saved):
    content = bytearray(saved.read_bytes())
    content[300] ^= 1
    saved.write_bytes(content)
    assert "its sha256 must be" in refusal(saved)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"MZ" + bytes(398), "must be a 64-bit little-endian ELF file, got b'MZ"),
        (elf_bytes(kind=2), "must be an ELF shared object (3), got type 2"),
        (
            elf_bytes("aarch64" if platform.machine() == "x86_64" else "x86_64"),
            "must be for ELF machine",
        ),
    ],
)
def test_foreign_library_under_a_matching_manifest(tmp_path, content, rule):
    path = tmp_path / "kivi.so"
    write_artifact(path, manifest(), lambda p: p.write_bytes(content))
    assert rule in refusal(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be JSON"),
        ('{"format_version": 1', "must be JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "`format_version` must be 4, got None"),
        ('{"format_version": 1}', "`format_version` must be 4, got 1"),
        ('{"format_version": 4}', "`kernel_key` is missing"),
        ("\x80", "JSON"),
    ],
)
def test_broken_manifest(saved, text, rule):
    manifest_path(saved).write_text(text, encoding="utf-8")
    assert rule in refusal(saved)


def test_manifest_that_is_not_text(saved):
    manifest_path(saved).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"target": {"kind": "llvm", "mcpu": "znver5"}},
        {"config": {**CFG.to_dict(), "key_bits": 4}},
        {"cpu_flags": ["mmx"]},
        {"sha256": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_edited_manifest(saved, change):
    edit(saved, **change)
    assert "the manifest was changed after it was written" in refusal(saved)


def test_unknown_field(saved):
    edit(saved, surprise=1)
    assert "`surprise` is not a field of the manifest" in refusal(saved)


@pytest.mark.parametrize(
    ("versions", "rule"),
    [
        ({"tvm": "0.26.1"}, "tvm must be >=0.27.0,<0.28.0, built with 0.26.1"),
        ({"tvm": "0.28.0"}, "tvm must be >=0.27.0,<0.28.0, built with 0.28.0"),
        ({"tvm_ffi": "0.1.13"}, "tvm_ffi must be >=0.1.14,<0.2.0, built with 0.1.13"),
        ({"tvm_ffi": "0.2.0"}, "tvm_ffi must be >=0.1.14,<0.2.0, built with 0.2.0"),
        ({"tvm": "unknown"}, "built with unknown"),
    ],
)
def test_incompatible_versions(tmp_path, versions, rule):
    merged = {**manifest().versions, **versions}
    assert rule in refusal(save(tmp_path / "kivi.so", versions=merged))


def test_foreign_platform(tmp_path):
    foreign = Platform("Darwin", "arm64", "unknown")
    message = refusal(save(tmp_path / "kivi.so", platform=foreign, cpu_flags=("neon",)))
    assert f"`platform` must be {Platform.here().name}, got Darwin arm64 unknown" in message
    assert "processor" not in message


def test_another_release_of_the_c_library_is_accepted(tmp_path):
    older = replace(Platform.here(), libc_version="2.17")
    read_artifact(save(tmp_path / "kivi.so", platform=older))


def test_missing_cpu_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    path = save(tmp_path / "kivi.so", cpu_flags=("avx2", "avx512_vnni", "avx512f"))
    assert "it needs a processor with avx512_vnni, avx512f, which this one lacks" in refusal(path)


def test_config_of_another_build(tmp_path):
    other = {**CFG.to_dict(), "key_bits": 4}
    message = refusal(save(tmp_path / "kivi.so", config=other))
    assert "`config` must have the kernel key D64-M4-k2v2" in message
    assert "got D64-M4-k4v2" in message


def test_impossible_config(tmp_path):
    message = refusal(save(tmp_path / "kivi.so", config={**CFG.to_dict(), "group_size": 33}))
    assert "`group_size` must be one of" in message


def test_every_reason_is_listed(tmp_path):
    path = save(
        tmp_path / "kivi.so",
        platform=Platform("Linux", "riscv64", "glibc"),
        versions={"kivi_tvm": "0.1.0", "tvm": "0.20.0", "tvm_ffi": "0.3.0"},
    )
    path.write_bytes(elf_bytes(size=100))
    message = refusal(path)
    for part in ("built with 0.20.0", "built with 0.3.0", "riscv64", "must have 400 bytes"):
        assert part in message
