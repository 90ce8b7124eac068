"""How far each compute mode is from the reference on several kinds of data, without timing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from kivi_tvm.bench import ours
from kivi_tvm.bench.provider import Setting, relative_l2
from kivi_tvm.bench.record import Environment, workload_fields
from kivi_tvm.runtime.module import build
from kivi_tvm.workloads import Workload, make_inputs

KINDS = ("normal", "outlier", "peaked", "zero_mean")
MAX_TOKENS = 4096  # the reference is slow, and errors hardly depend on the length


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Relative L2 error of `decode` in one mode on one kind of data.

    `error` is the distance to the reference, which attends to the same codes in float64;
    `quantization_error` that of the reference to attention on the exact keys and values. Both are
    relative to the output that they are compared with.
    """

    op: str
    workload: Workload
    compute: str
    auto: bool
    target: str
    error: float
    quantization_error: float
    environment: Environment

    @property
    def share(self) -> float:
        """Error as a part of what quantization does anyway; NaN where nothing is quantized."""
        return self.error / self.quantization_error if self.quantization_error else math.nan

    def to_dict(self) -> dict[str, object]:
        fields = asdict(self)
        del fields["workload"], fields["environment"]
        return workload_fields(self.workload) | fields | asdict(self.environment)


def shortened(w: Workload) -> Workload:
    """The workload that errors are measured on: one row of at most `MAX_TOKENS` tokens."""
    return replace(w, tokens=min(w.tokens, MAX_TOKENS), batch_size=1, lengths=None)


def measure(
    w: Workload, compute: Sequence[str] | None = None, target: str = "native"
) -> list[Accuracy]:
    """Errors of every mode on every kind in `KINDS`, of the modules that users get.

    Parameters
    ----------
    w : Workload
        Its data does not matter; see `shortened`.
    compute : sequence of str, optional
        Compute modes; default all that the bits allow.
    target : str
    """
    found = []
    environment = Environment.current()
    for kind in KINDS:
        short = replace(shortened(w), data=kind)
        inputs = make_inputs(short)
        setting = Setting(short, inputs, "warm", 0)
        right = ours.expected(short, inputs)
        quantization = relative_l2(right, setting.exact(inputs.q[0], setting.keys, setting.values))
        for mode, auto in ours.modes(short, compute, target).items():
            module = build(replace(short, compute=mode).cfg, target)
            error = relative_l2(ours.call(module, short, inputs)(), right)
            found.append(
                Accuracy(
                    "decode_error", short, mode, auto, target, error, quantization, environment
                )
            )
    return found
