"""What names a target: exact records, readable directories, and errors with the nearest names."""

from dataclasses import replace

import pytest
from tvm.target import Target

from kivi_tvm import target_names, targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.config import KiviConfig
from kivi_tvm.errors import UserError

CFG = KiviConfig(head_dim=128, num_heads=32, num_kv_heads=8)
ZNVER4 = {"kind": "llvm", "mtriple": "x86_64-conda-linux-gnu", "mcpu": "znver4"}


@pytest.mark.parametrize(
    ("fields", "slug"),
    [
        (ZNVER4, "llvm-x86_64-znver4"),
        ({**ZNVER4, "mcpu": "x86-64-v3"}, "llvm-x86_64-x86-64-v3"),
        ({**ZNVER4, "mattr": ["-avx512fp16"]}, "llvm-x86_64-znver4-ea8bf515"),
        ({"kind": "llvm", "mtriple": "riscv64-unknown-linux-gnu"}, "llvm-riscv64-generic"),
        (
            {"kind": "llvm", "mtriple": "arm64-apple-darwin22.1.0", "mcpu": "apple-m1"},
            "llvm-aarch64-darwin-apple-m1",
        ),
        ({"kind": "cuda", "arch": "sm_90a"}, "cuda-sm_90a"),
        ("nvidia/nvidia-h100", "cuda-sm_90a"),
        ("raspberry-pi/4b-aarch64", "llvm-aarch64-cortex-a72-6af5b46a"),
    ],
    ids=str,
)
def test_slugs(fields, slug):
    assert targets.slug(Target(fields)) == slug


@pytest.mark.parametrize(
    "triple", ["x86_64-pc-linux-gnu", "x86_64-linux-gnu", "x86_64-unknown-linux-musl"]
)
def test_vendor_and_environment_do_not_matter(triple):
    other = targets.identity(Target({**ZNVER4, "mtriple": triple, "tag": "", "num-cores": 4}))
    assert other == targets.identity(Target(ZNVER4))


def test_what_changes_code_matters():
    changes = [
        {},
        {"mcpu": "znver5"},
        {"mattr": ["+a"]},
        {"mattr": ["-a"]},
        {"mtriple": "x86_64-pc-windows-msvc"},
        {"mtriple": "i386-pc-linux-gnu"},
        {"opt-level": 2},
    ]
    found = [target_names.identity({**ZNVER4, **change}) for change in changes]
    assert len({target_names.slug(each) for each in found}) == len(changes)
    order = [target_names.identity({**ZNVER4, "mattr": m}) for m in (["+a", "-b"], ["-b", "+a"])]
    assert order[0] == order[1]


def test_native_is_named_like_its_fields():
    native = targets.resolve("native")
    fields = {name: targets.as_dict(native)[name] for name in ("kind", "mcpu")}
    fields["mattr"] = targets.as_dict(native).get("mattr", [])
    assert targets.identity(targets.resolve(fields)) == targets.identity(native)


def test_features_are_kept_without_a_named_processor():
    native = targets.resolve("native")
    assert targets.as_dict(targets.resolve("llvm")) == targets.as_dict(native)
    found = targets.resolve({"kind": "llvm", "mattr": ["-avx512f"]})
    assert found.attrs["mcpu"] == native.attrs["mcpu"]
    assert list(found.attrs["mattr"]) == [*native.attrs.get("mattr", []), "-avx512f"]
    assert targets.identity(found) != targets.identity(native)


def test_a_target_without_a_triple_is_of_this_machine():
    native = targets.resolve("native")
    found = targets.resolve({"kind": "llvm", "mcpu": native.attrs["mcpu"]})
    assert "mtriple" not in found.attrs
    assert targets.hardware(found).vector_bits == targets.hardware(native).vector_bits


def test_a_target_from_its_identity_gives_the_same_schedule():
    from artifacts import CFG

    native = targets.resolve("native")
    again = targets.from_identity(targets.identity(native))
    assert targets.identity(again) == targets.identity(native)
    hashes = {
        schedule_hash("combine", scheduled_function("combine", CFG.kernel_key(), target))
        for target in (native, again)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "fields", [{"kind": "toaster"}, {"kind": "llvm", "machine": "vax", "system": "linux"}, {}]
)
def test_an_identity_that_is_no_target(fields):
    with pytest.raises(ValueError, match="`target` must be"):
        targets.from_identity(fields)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nvidia/h100", ["'nvidia/h100'", "nearest: nvidia/nvidia-h100"]),
        ("lvm", ["'lvm'", "nearest: llvm"]),
        ("natve", ["nearest: native"]),
        ({"kind": "cuca"}, ["nearest: cuda"]),
        ("{broken", ["'{broken'"]),
        (5, ["got 5"]),
        (None, ["got None"]),
        ({"kind": "llvm", "mcpu": "znver44"}, ["`mcpu`", "'znver44'", "nearest: znver4"]),
        ("vulkan", ["TVM can generate code for here", "'vulkan'"]),
        ("opencl", ["'native' or of kind 'llvm' or 'cuda'", "'opencl'"]),
    ],
    ids=str,
)
def test_targets_that_are_refused(target, words):
    with pytest.raises(UserError) as error:
        targets.resolve(target)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "known", "words"),
    [
        ({"kind": "cuda", "arch": "sm_90"}, (), ["needs a CUDA compiler", "nvcc", "cuda-bindings"]),
        ({"kind": "cuda", "arch": "sm_50"}, ("sm_80",), ["must name an architecture", "'sm_90'"]),
        ({"kind": "cuda", "arch": "sm_91"}, ("sm_80", "sm_90"), ["`arch`", "'sm_91'", "sm_90"]),
        ("nvidia/nvidia-h100", ("sm_80",), ["`arch`", "'sm_90a'", "knows (sm_80)"]),
    ],
    ids=str,
)
def test_cuda_targets_that_are_refused(target, known, words, monkeypatch):
    monkeypatch.setattr(targets.cuda, "known_architectures", lambda: known)
    with pytest.raises(UserError) as error:
        targets.resolve(target)
    for word in words:
        assert word in str(error.value)


def test_cuda_targets_have_any_processor_of_this_architecture_as_host(monkeypatch):
    monkeypatch.setattr(targets.cuda, "known_architectures", lambda: ("sm_90",))
    found = targets.resolve("nvidia/nvidia-h100")
    assert targets.slug(found) == "cuda-sm_90"  # whose code it runs
    host, native = (targets.as_dict(x) for x in (found.host, targets.resolve("native")))
    assert host["mtriple"] == native["mtriple"] and host["mcpu"] == "generic"
    assert not {"avx", "avx2", "sse4_2"}.intersection(targets.required_cpu_flags(found))
    assert targets.hardware(found).model == "gpu"
    assert targets.kernel_key(CFG, found).compute == "half"


@pytest.mark.parametrize(
    ("cfg", "arch", "words"),
    [
        (replace(CFG, compute="int8"), "sm_90", ["`compute`", "'int8'", "CPUs"]),
        (replace(CFG, dtype="bfloat16"), "sm_75", ["`dtype`", "'bfloat16'", "sm_80"]),
        (replace(CFG, compute="half"), "sm_75", ["`compute`", "'half'", "tensor cores", "sm_80"]),
    ],
    ids=["integers", "dtype", "tensor-cores"],
)
def test_what_a_gpu_has_not(cfg, arch, words):
    with pytest.raises(UserError) as error:
        targets.kernel_key(cfg, Target({"kind": "cuda", "arch": arch}))
    for word in words:
        assert word in str(error.value)
