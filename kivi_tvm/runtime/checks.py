"""Rules that the tensors of a call must obey, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A cache outlives the call that makes it grow: its tensors must not be inference tensors, which
# cannot be updated outside torch.inference_mode().
outside_inference_mode = torch.inference_mode(mode=False)

INDEX_LIMIT = 2**31  # kernels index elements with int32


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
        Another shape or device, an inner stride other than 1, or gradients are asked for.
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
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"`{name}` must not require gradients: the cache is for inference; "
            "call it under torch.inference_mode() or torch.no_grad()"
        )


def fits(x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `check_tensor` would surely pass; the quick test of the hot path."""
    return (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype is dtype
        and x.device == device
        and (x.is_contiguous() or x.stride(-1) == 1)
        and not x.requires_grad
    )


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
    """`lengths` as a list of ints, each in `0 .. tokens`; None means `tokens` for every row.

    Raises
    ------
    TypeError
        Not a sequence or tensor of ints.
    ValueError
        Another count than `batch_size`, or a length out of range.
    """
    if lengths is None:
        return [tokens] * batch_size
    if isinstance(lengths, Tensor):
        if lengths.dtype.is_floating_point or lengths.dtype == torch.bool or lengths.ndim != 1:
            raise TypeError(
                f"`lengths` must be a 1-D tensor of ints, got {lengths.ndim}-D {lengths.dtype}"
            )
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or any(
        not isinstance(n, int) or isinstance(n, bool) for n in lengths
    ):
        raise TypeError(f"`lengths` must be ints, one per row, got {lengths!r}")
    if len(lengths) != batch_size:
        raise ValueError(
            f"`lengths` must have one entry per row ({batch_size}), got {len(lengths)}"
        )
    bad = {row: n for row, n in enumerate(lengths) if not 0 <= n <= tokens}
    if bad:
        raise ValueError(f"`lengths` must be in 0..{tokens}, got (row: length) {bad}")
    return list(lengths)


def span(x: Tensor) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
