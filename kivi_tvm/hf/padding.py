"""Padding: from the mask of a forward to the columns of each row that are real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Which prompt columns are real tokens.

    Parameters
    ----------
    visible : Tensor
        bool `[B, T]`, False on padding.
    lengths : list of int
        Real tokens of each row.
    """

    visible: Tensor
    lengths: list[int]

    def compact(self, x: Tensor) -> Tensor:
        """`x [B, H_kv, T, D]` without its padding: `[B, H_kv, max(lengths), D]`.

        Row `i` starts with its `lengths[i]` real tokens in order; what follows is padding.
        """
        order = torch.argsort(~self.visible, dim=1, stable=True)[:, : max(self.lengths)]
        index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)


def prompt_padding(mask: Tensor | None, batch_size: int, tokens: int) -> Padding | None:
    """Padding of a prompt of `tokens` columns from its causal mask; None if there is none.

    Raises
    ------
    NotImplementedError
        The mask is not "causal and padding": decode could not continue it.
    """
    if mask is None:
        return None
    row = padding_row(mask, batch_size, tokens, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril_()
    for i in range(batch_size):
        if not torch.equal(mask[i % mask.shape[0], 0], causal & row[i]):
            raise _custom(f"one whose row {i} is not causal with padding")
    if bool(row.all()):
        return None
    return Padding(row, row.sum(1).tolist())


def check_decode_mask(
    mask: Tensor | None, padding: Padding | None, batch_size: int, columns: int
) -> None:
    """Check that a decode step over `columns` columns hides exactly the prompt's padding.

    Raises
    ------
    NotImplementedError
        A column changed between hidden and visible since it was stored.
    """
    prompt = None if padding is None else padding.visible
    given = None if mask is None else padding_row(mask, batch_size, 1, columns)
    known = given if prompt is None else prompt
    if known is None:
        return
    stored = torch.ones(batch_size, columns, dtype=torch.bool, device=known.device)
    seen = stored if given is None else given
    if prompt is not None:
        stored = stored.clone()
        stored[:, : prompt.shape[1]] = prompt
    if torch.equal(seen, stored):
        return
    row, column = (seen != stored).nonzero()[0].tolist()
    now = "visible" if seen[row, column] else "hidden"
    raise NotImplementedError(
        "`attention_mask` must keep hiding the prompt's padding and nothing else, got row "
        f"{row}, column {column} newly {now}: KiviCache cannot change stored tokens yet"
    )


def padding_row(mask: Tensor, batch_size: int, tokens: int, columns: int) -> Tensor:
    """The last query's view `[B, columns]` of a bool mask `[B or 1, 1, tokens, columns]`."""
    shape = tuple(mask.shape)
    if mask.dtype != torch.bool:
        raise _custom(f"dtype {mask.dtype}")
    if shape[1:] != (1, tokens, columns) or shape[0] not in (1, batch_size):
        raise _custom(f"shape {list(shape)} for {tokens} tokens over {columns} columns")
    return mask[:, 0, -1, :].expand(batch_size, -1)


def same_padding(a: Padding | None, b: Padding | None) -> bool:
    """Whether both hide the same columns."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.visible, b.visible)


def _custom(got: str) -> NotImplementedError:
    return NotImplementedError(
        "`attention_mask` must be None or 2-D [B, columns] with KiviCache (custom 4-D masks are "
        f"not supported), got {got}"
    )
