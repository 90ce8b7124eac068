"""The compiler and TVM's runtime are found without importing anything heavy."""

import importlib.metadata
import os
import sys

import pytest

from kivi_tvm import host
from kivi_tvm.errors import UserError


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH with nothing but what the test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def add(*names):
        for name in names:
            (tmp_path / name).touch(mode=0o755)

    return tmp_path, add


def test_compilers_in_order(programs):
    folder, add = programs
    assert host.find_cxx() is None
    for name in ("c++", "clang++", "g++"):
        add(name)
        assert host.find_cxx() == str(folder / name)


@pytest.mark.parametrize(
    ("variable", "found"),
    [("my-cxx", "my-cxx"), ("ccache my-cxx -m64", "my-cxx"), ("absent", None), ("", "g++")],
)
def test_cxx_is_honoured(programs, monkeypatch, variable, found):
    folder, add = programs
    add("g++", "my-cxx", "ccache")
    monkeypatch.setenv("CXX", variable)
    assert host.find_cxx() == (found and str(folder / found))


def test_runtime_library_of_the_installed_tvm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    assert host.find_runtime_library().name == host.RUNTIME_LIBRARY


def no_distribution(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_runtime_library_without_metadata(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "distribution", no_distribution)
    library = tmp_path / "tvm" / "lib" / host.RUNTIME_LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "tvm" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert host.find_runtime_library() == library


def test_no_runtime_library(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", no_distribution)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"install apache-tvm 0\.27"):
        host.find_runtime_library()


def test_runtime_library_by_variable(monkeypatch, tmp_path):
    library = tmp_path / "mine.so"
    monkeypatch.setenv(host.RUNTIME_LIBRARY_ENV, str(library))
    with pytest.raises(UserError, match=r"must name a file, got .*mine\.so"):
        host.find_runtime_library()
    library.touch()
    assert host.find_runtime_library() == library


def test_available_processors():
    assert 1 <= host.available_processors() <= (os.cpu_count() or 1)


def test_installed_version():
    assert host.installed_version("no-such-distribution") is None
    assert host.installed_version("pytest") == pytest.__version__
