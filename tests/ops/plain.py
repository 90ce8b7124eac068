"""Operators compiled for this CPU as they are, not scheduled: their mathematics alone."""

from functools import cache

import tvm
from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.lowering import compile_module
from kivi_tvm.ops import OPS


@cache
def plain_kernel(name, key):
    """The operator `name` for a kernel key."""
    module = tvm.IRModule({name: OPS[name](key).with_attr("global_symbol", name)})
    # Further optimization by LLVM 22 gives wrong sums with AVX-512, and right ones without.
    target = {**targets.as_dict(targets.resolve("native")), "opt-level": 1}
    return compile_module(module, Target(target))[name]
