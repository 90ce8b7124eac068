"""Imports go one way: `config` at the bottom, `cli` on top."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import kivi_tvm

PACKAGE = Path(kivi_tvm.__file__).parent
# The modules of one line may import each other and those of the lines above.
LAYERS = [
    {
        "config",
        "control_flow",
        "cpu",
        "cuda",
        "cuda_tools",
        "errors",
        "host",
        "instruction_counts",
        "layout",
        "machine_code",
        "notices",
        "occupancy",
        "outputs",
        "pictures",
        "target_names",
    },
    {"reference", "workloads", "geometry", "targets", "ops"},
    {"schedules"},
    {"database", "database_files", "tuning_record"},
    {
        *("tune", "compile", "lowering", "cuda_build", "gpu_passes", "statements"),
        *("artifact", "artifact_cache", "cache_key", "manifest"),
    },
    {"runtime"},
    {"hf", "model_export", "tuning_logs"},
    {"bench", "demo", "eval"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Who may import what from outside, at the top of a file or inside a function.
# `runtime` loads artifacts where no compiler is installed, so it may name TVM in functions only.
ALLOWED = {
    "torch": {
        "reference",
        "workloads",
        "tune",
        "runtime",
        "hf",
        "model_export",
        "bench",
        "demo",
        "eval",
        "cli",
    },
    "tvm": {
        "targets",
        "runtime",
        "ops",
        "schedules",
        "database",
        "tune",
        "compile",
        "lowering",
        "cuda_build",
        "gpu_passes",
        "statements",
        "cli",
    },
    # meets torch in `runtime`, and in `bench`, which times what `runtime` calls
    "tvm_ffi": {"host", "compile", "cuda_build", "gpu_passes", "tune", "runtime", "bench"},
    "transformers": {"hf"},
}
LINKS = ("schedules", "model_export", "tuning_logs")  # rglob does not descend into links
FILES = sorted({p for d in ("", *LINKS) for p in (PACKAGE / d).rglob("*.py")})


def is_lazy(node):
    """Tell whether what is below `node` does not run at import: functions, typing."""
    typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return typing or isinstance(node, ast.FunctionDef)


def imports(path):
    """Yield (dotted name, at import time) of everything that a file imports."""
    tree = ast.parse(path.read_text())
    lazy = {n for f in ast.walk(tree) if is_lazy(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module, node not in lazy
            yield from ((f"{node.module}.{a.name}", node not in lazy) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":  # the public names, resolved lazily
        return
    assert own in RANK, f"`{own}` has no layer: add it to LAYERS"
    for name, at_import in imports(path):
        root, _, rest = name.partition(".")
        assert own in ALLOWED.get(root, {own}), f"{own} may not import {name}"
        assert not (at_import and own == "runtime" and root == "tvm"), f"{name} at import"
        other = rest.partition(".")[0]
        if root == "kivi_tvm" and other in RANK:
            assert RANK[other] <= RANK[own], f"{own} imports {name}, a higher layer"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent == PACKAGE / "cli"] or FILES[:1])
def test_cli_starts_without_heavy_imports(path):
    eager = {name.partition(".")[0] for name, at_import in imports(path) if at_import}
    assert not eager & {"torch", "tvm", "tvm_ffi", "transformers"}


def test_schedules_have_one_import_root():
    assert importlib.util.find_spec("kivi_tvm.schedules") is not None
    assert str(PACKAGE.parent) not in sys.path
    other = importlib.util.find_spec("schedules")  # the tests' own folder may be found
    roots = list(other.submodule_search_locations) if other else []
    assert (PACKAGE / "schedules").resolve() not in [Path(root).resolve() for root in roots]
