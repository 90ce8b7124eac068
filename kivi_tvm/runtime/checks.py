"""Rules that the tensors of a call must obey, checked before anything changes."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A cache outlives the call that makes it grow: its tensors must not be inference tensors, which
# cannot be updated outside torch.inference_mode().
outside_inference_mode = torch.inference_mode(mode=False)

INDEX_LIMIT = 2**31  # kernels index elements with int32
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
LINE_BYTES = 16  # of a query that kernels in compute mode "half" load at once


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless `x` is a tensor the kernels take; None in `shape` stands for any size.

    Raises
    ------
    TypeError
        Not a tensor, or of another dtype.
    ValueError
        Another shape or device, an inner stride other than 1, a negated view, or gradients are
        asked for.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype}, got {x.dtype}")
    if x.ndim != len(shape) or any(
        want is not None and got != want for got, want in zip(x.shape, shape, strict=True)
    ):
        want = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"`{name}` must have shape {want}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"`{name}` must be on {device}, got {x.device}")
    if x.stride(-1) != 1 and x.numel():
        raise ValueError(f"`{name}` must have inner stride 1, got strides {x.stride()}")
    if x.is_neg():
        raise ValueError(f"`{name}` must not be a negated view: pass `{name}.resolve_neg()`")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"`{name}` must not require gradients: the cache is for inference; "
            "call it under torch.inference_mode() or torch.no_grad()"
        )


def fits(x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `check_tensor` and `check_span` would surely pass; the quick test of the hot path."""
    return (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype is dtype
        and x.device == device
        and (
            x.numel() < INDEX_LIMIT
            if x.is_contiguous()
            else x.stride(-1) == 1 and span(x) < INDEX_LIMIT
        )
        and not x.requires_grad
        and not x.is_neg()
    )


def check_span(name: str, x: Tensor) -> None:
    """Raise if a kernel cannot count the elements from the first to the last of `x`.

    `name` as a sentence has it: an argument in backticks, or a row of one.

    Raises
    ------
    ValueError
        There are 2^31 or more.
    """
    if span(x) >= INDEX_LIMIT:
        raise ValueError(
            f"{name} must span less than 2^31 elements, got shape {list(x.shape)} with strides "
            f"{x.stride()}: pass a contiguous copy, or less at once"
        )


def in_lines(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its rows do not begin at multiples of `LINE_BYTES`.

    Those of a contiguous tensor do where it begins so: a head is so many bytes or a multiple.
    """
    line = LINE_BYTES // x.element_size()
    apart = () if x.is_contiguous() else zip(x.stride()[:-1], x.shape[:-1], strict=True)
    if x.data_ptr() % LINE_BYTES or any(step % line for step, count in apart if count > 1):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def check_no_overlap(name: str, x: Tensor) -> None:
    """Raise if two elements of `x` share memory: an output would overwrite itself.

    Raises
    ------
    ValueError
        A stride is too small for the sizes inside it.
    """
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(f"`{name}` must not overlap itself, got strides {x.stride()}")
        extent = max(extent, stride * size)


def check_lengths(lengths: object, batch_size: int, tokens: int) -> list[int]:
    """`lengths` as a list of ints, each in `0 .. tokens`.

    Raises
    ------
    TypeError
        Not a sequence or tensor of ints.
    ValueError
        Another count than `batch_size`, or a length out of range.
    """
    found = check_ints("lengths", lengths)
    if len(found) != batch_size:
        raise ValueError(f"`lengths` must have one entry per row ({batch_size}), got {len(found)}")
    bad = {row: n for row, n in enumerate(found) if not 0 <= n <= tokens}
    if bad:
        raise ValueError(f"`lengths` must be in 0..{tokens}, got (row: length) {bad}")
    return found


def check_rows(name: str, rows: object, batch_size: int, distinct: bool = True) -> list[int]:
    """`rows` as a list of row numbers in `0 .. batch_size - 1`.

    Raises
    ------
    TypeError
        Not a sequence or tensor of ints.
    ValueError
        Empty, a number out of range, or (with `distinct`) one that occurs twice.
    """
    found = check_ints(name, rows)
    if not found:
        raise ValueError(f"`{name}` must name at least one row, got {rows!r}")
    bad = [row for row in found if not 0 <= row < batch_size]
    if bad:
        raise ValueError(f"`{name}` must be in 0..{batch_size - 1}, got {bad}")
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"`{name}` must not name a row twice, got {found}")
    return found


def check_ints(name: str, numbers: object, rule: str = "a list of ints") -> list[int]:
    """`numbers` as a list of ints.

    Raises
    ------
    TypeError
        Not a sequence or 1-D tensor of ints.
    """
    if isinstance(numbers, np.ndarray):
        numbers = torch.from_numpy(numbers)
    if isinstance(numbers, Tensor):
        if numbers.dtype.is_floating_point or numbers.dtype == torch.bool or numbers.ndim != 1:
            raise TypeError(
                f"`{name}` must be a 1-D tensor of ints, got {numbers.ndim}-D {numbers.dtype}"
            )
        numbers = numbers.tolist()
    found = [as_int(n) for n in numbers] if isinstance(numbers, Sequence) else [None]
    if None in found:
        raise TypeError(f"`{name}` must be {rule}, got {numbers!r}")
    return [n for n in found if n is not None]


def as_int(number: object) -> int | None:
    """`number` if it is an int of any library but no bool, else None."""
    if isinstance(number, (bool, np.bool_)):
        return None
    if isinstance(number, Tensor) and (number.ndim or number.dtype == torch.bool):
        return None
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_count(name: str, count: object, least: int = 0) -> int:
    """`count` as an int of at least `least`.

    Raises
    ------
    ValueError
        It is not.
    """
    found = as_int(count)
    if found is None or found < least:
        raise ValueError(f"`{name}` must be an int of at least {least}, got {count!r}")
    return found


def finite_scale(scale: object) -> float:
    """The softmax scale as a float.

    Raises
    ------
    ValueError
        It is no number, or not finite in float32.
    """
    found = math.nan
    if isinstance(scale, Tensor) and scale.numel() == 1 and scale.is_floating_point():
        found = scale.item()
    elif isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool):
        with contextlib.suppress(OverflowError):
            found = float(scale)
    if not abs(found) <= LARGEST_FLOAT32:  # nor NaN
        raise ValueError(f"`scale` must be a finite number of float32, got {scale!r}")
    return found


def span(x: Tensor) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
