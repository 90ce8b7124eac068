"""Building, saving and loading: the same bits from every origin, and clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from caches import assert_same_outputs, feed
from configurations import FEW, module
from inputs import draw

from kivi_tvm import KiviConfig, build, load, targets
from kivi_tvm.errors import UserError

CFG = FEW[0]
STEPS = 3


def outputs(made):
    """What a cache of a module answers on fixed inputs."""
    inputs = draw(CFG, 300, [300, 33], steps=STEPS)
    cache = made.new_cache(batch_size=2)
    cache.prefill(inputs.k, inputs.v, inputs.lengths)
    return feed(cache, inputs, STEPS)


def test_a_second_build_comes_from_the_cache(tmp_path, monkeypatch, capfd):
    module(CFG)
    capfd.readouterr()
    again = build(CFG)
    assert again.source == "cache"
    assert capfd.readouterr().err == ""
    assert again.cfg == CFG and "H=16" in repr(again)


def test_manifest_says_what_the_kernels_are():
    found = module(CFG).manifest
    key = targets.kernel_key(CFG, targets.resolve("native"))
    assert found["kernel_key"] == key.to_dict()
    assert found["config"] == CFG.to_dict()
    assert found["target"]["kind"] == "llvm"
    assert set(found["sources"].values()) == {"default"} and "attend" in found["sources"]
    json.dumps(found)


def test_configurations_with_one_key_share_a_build():
    other = KiviConfig(**{**CFG.to_dict(), "num_heads": 8, "num_kv_heads": 1})
    one, two = module(CFG), build(other)
    assert two.source == "cache" and two.library.origin == one.library.origin
    assert two.cfg.H_kv == 1


def test_no_compiler_and_an_unwritable_cache(monkeypatch, tmp_path, capfd):
    """Both compile in process and say why; outputs are the same bits; saving needs the compiler."""
    expected = outputs(module(CFG))
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path / "file" / "kernels"))
        made = build(CFG)
    said = capfd.readouterr().err
    assert made.source == "in-process"
    assert "cannot be written" in said and "KIVI_TVM_CACHE_DIR" in said and "in process" in said
    assert_same_outputs(outputs(made), expected)
    made.save(tmp_path / "saved.so")
    assert_same_outputs(outputs(load(tmp_path / "saved.so")), expected)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        made.save(tmp_path / "other.so")
    capfd.readouterr()
    assert_same_outputs(outputs(build(CFG)), expected)
    said = capfd.readouterr().err
    assert "no C++ compiler" in said and "CXX" in said and "in process" in said


LOADED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tvm" or name.startswith("tvm."):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Blocked())
import torch
from kivi_tvm import load
from kivi_tvm.runtime.module import Module
inputs = torch.load(sys.argv[2])
made = load(sys.argv[1])
cache = made.new_cache(batch_size=2)
cache.prefill(inputs["k"], inputs["v"], inputs["lengths"])
found = [
    cache.decode(*step, return_lse=True)
    for step in zip(inputs["q"], inputs["k_new"], inputs["v_new"])
]
torch.save(found, sys.argv[3])
print(made.source, "tvm" in sys.modules)
"""


def test_saved_and_loaded_where_tvm_cannot_be_imported(tmp_path):
    made = module(CFG)
    made.save(tmp_path / "kivi.so")
    inputs = draw(CFG, 300, [300, 33], steps=STEPS)
    torch.save(inputs._asdict(), tmp_path / "inputs.pt")
    paths = [str(tmp_path / name) for name in ("kivi.so", "inputs.pt", "outputs.pt")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, package_root()))}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *paths], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["file", "False"]
    assert_same_outputs(torch.load(paths[2]), outputs(made))


def package_root():
    """Where this process found the package, for a checkout that is not installed."""
    import kivi_tvm

    root = Path(kivi_tvm.__file__).parent.parent
    return [root] if str(root) in map(os.path.abspath, sys.path) else []


def test_load_gives_the_configuration(tmp_path):
    module(CFG).save(tmp_path / "kivi.so")
    loaded = load(str(tmp_path / "kivi.so"))
    assert loaded.source == "file" and loaded.cfg == CFG
    assert_same_outputs(outputs(loaded), outputs(module(CFG)))


@pytest.mark.parametrize(
    "cfg", [None, {"head_dim": 64}, CFG.kernel_key()], ids=["None", "dict", "key"]
)
def test_not_a_configuration(cfg):
    with pytest.raises(TypeError) as error:
        build(cfg)
    assert "`cfg` must be a KiviConfig" in str(error.value) and repr(cfg) in str(error.value)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("toaster", ["`target`", "TVM", "'toaster'"]),
        ({"kind": "toaster"}, ["`target`", "TVM", "toaster"]),
        ("opencl", ["`target`", "of kind 'llvm' or 'cuda'", "'opencl'"]),
        (
            {"kind": "llvm", "mtriple": "riscv64-unknown-linux-gnu"},
            ["`target`", "this machine's architecture", "riscv64"],
        ),
    ],
    ids=str,
)
def test_targets_that_cannot_be_built(target, words):
    with pytest.raises(UserError) as error:
        build(CFG, target)
    for word in words:
        assert word in str(error.value)


def test_caches_of_one_module_are_independent():
    inputs = draw(CFG, 100, steps=1)
    one, other = module(CFG).new_cache(), module(CFG).new_cache()
    one.prefill(inputs.k, inputs.v)
    assert other.lengths == [0] and (other.rows.state == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollback": -4}, ["`rollback`", "at least 0", "-4"]),
        ({"sink_tokens": 1.0}, ["`sink_tokens`", "int", "1.0"]),
        ({"window": "open"}, ["`window`", "['kivi', 'exact']", "'open'"]),
        ({"device": "meta"}, ["`device`", "'cpu'", "'meta'"]),
        ({"device": "toaster"}, ["`device`", "torch device", "'toaster'"]),
        ({"num_layers": 0}, ["`num_layers`", "at least 1", "0"]),
        ({"num_layers": True}, ["`num_layers`", "int", "True"]),
        ({"batch_size": -2}, ["`batch_size`", "at least 1", "-2"]),
        ({"max_tokens": 0}, ["`max_tokens`", "at least 1", "0"]),
        ({"max_tokens": 1.5, "rollback": True, "window": ""}, ["1.5", "`rollback`", "`window`"]),
    ],
    ids=str,
)
def test_options_of_a_cache(options, words):
    with pytest.raises(ValueError) as error:
        module(CFG).new_cache(**options)
    for word in words:
        assert word in str(error.value)


def test_save_after_the_file_was_removed(tmp_path):
    module(CFG).save(tmp_path / "one.so")
    loaded = load(tmp_path / "one.so")
    (tmp_path / "one.so").unlink()
    with pytest.raises(UserError, match=r"one\.so, which was removed"):
        loaded.save(tmp_path / "two.so")
    assert not (tmp_path / "two.so").exists()
