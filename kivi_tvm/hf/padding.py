"""Padding: from the mask of a forward to the columns of each row that are real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Which new columns are real tokens.

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
        """`x [B, H, T, D]` without its padding: `[B, H, max(lengths), D]`.

        Row `i` starts with its `lengths[i]` real tokens in order; what follows is padding.
        """
        order = torch.argsort(~self.visible, dim=1, stable=True)[:, : max(self.lengths)]
        index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `compact`, heads last: `[B, T, H, D]`, zeros on padding."""
        B, H, width, D = x.shape
        lengths = self.visible.sum(1, keepdim=True)
        real = torch.arange(width, device=x.device) < lengths
        out = x.new_zeros(B, self.visible.shape[1], H, D)
        out[self.visible] = x.transpose(1, 2)[real]
        return out


@dataclass(frozen=True, slots=True)
class Rewind:
    """Stored tokens that a mask hides from now on: the last ones of their rows.

    Generation goes on for a row that has ended until the whole batch has; the next turn's mask
    says that what it stored since was no text.

    Parameters
    ----------
    history : Tensor
        bool `[B, start]`, False on padding and on what is hidden now.
    lengths : list of int
        Tokens that each row loses.
    """

    history: Tensor
    lengths: list[int]


def step_padding(
    mask: Tensor | None, history: Tensor | None, batch_size: int, start: int, tokens: int
) -> tuple[Padding | None, Rewind | None]:
    """Padding of `tokens` new columns on top of `start` stored ones, and what became hidden.

    What became hidden waits for a step that shows a new token: before that it may be the padding
    in front of the next turn, in chunks, or a mistake, for which nothing is given up.

    Parameters
    ----------
    mask : Tensor or None
        bool `[B or 1, 1, tokens, start + tokens]`; None hides nothing.
    history : Tensor or None
        bool `[B, <= start]`, False on the padding known so far; later columns are real.

    Raises
    ------
    NotImplementedError
        A stored column became visible, or hidden in front of one that is visible, or the mask is
        not "causal and padding": later steps could not continue it.
    ValueError
        Stored columns became hidden, and the only new one is: what transformers makes of a mask
        that has no columns for them.
    """
    if mask is None:
        if history is not None:
            _newly_hidden(torch.ones_like(history), history)
        return None, None
    row = padding_row(mask, batch_size, tokens, start + tokens)
    rewind = _newly_hidden(row[:, :start], history)
    if tokens > 1:
        _check_causal(mask, row, start)
    visible = row[:, start:]
    if rewind is not None and not bool(visible.any()):
        if tokens == 1:
            raise ValueError(
                "`attention_mask` must show a new token if it hides stored ones, got one that "
                f"hides the last {rewind.lengths} stored tokens of the rows and the new column "
                f"{start}: has it a column for every stored and every new token?"
            )
        rewind = None
    if bool(visible.all()):
        return None, rewind
    return Padding(visible, visible.sum(1).tolist()), rewind


def extend_history(history: Tensor | None, start: int, padding: Padding | None) -> Tensor | None:
    """`history` of `start` columns with the new columns' padding behind it."""
    if padding is None:
        return history
    return torch.cat([_whole(history, padding.visible, start), padding.visible], 1)


def tokens_of_last(history: Tensor | None, batch_size: int, start: int, count: int) -> list[int]:
    """Real tokens of each row among the last `count` of `start` columns."""
    if history is None:
        return [count] * batch_size
    last: list[int] = _whole(history, history, start)[:, start - count :].sum(1).tolist()
    return last


def _whole(history: Tensor | None, like: Tensor, start: int) -> Tensor:
    """`history` as bool `[B, start]`."""
    stored = torch.ones(like.shape[0], start, dtype=torch.bool, device=like.device)
    if history is not None:
        known = history[:, :start]
        stored[:, : known.shape[1]] = known
    return stored


def _newly_hidden(seen: Tensor, history: Tensor | None) -> Rewind | None:
    """What of the stored columns `seen` bool `[B, start]` hides and `history` does not."""
    stored = _whole(history, seen, seen.shape[1])
    if torch.equal(seen, stored):
        return None
    hidden = stored & ~seen
    # Columns that are visible or have a visible one on their right.
    kept = seen.flip(1).cumsum(1).flip(1) > 0
    wrong = (seen & ~stored) | (hidden & kept)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        now = "visible" if seen[row, column] else "hidden in front of visible ones"
        raise NotImplementedError(
            "`attention_mask` must keep hiding the padding of earlier steps and, beside it, at "
            f"most the last tokens of a row, got row {row}, column {column} newly {now}: "
            "KiviCache cannot change stored tokens"
        )
    return Rewind(seen.clone(), hidden.sum(1).tolist())


def _check_causal(mask: Tensor, row: Tensor, start: int) -> None:
    tokens, columns = mask.shape[2:]
    causal = torch.ones(tokens, columns, dtype=torch.bool, device=mask.device).tril_(start)
    for i in range(row.shape[0]):
        if not torch.equal(mask[i % mask.shape[0], 0], causal & row[i]):
            raise _custom(f"one whose row {i} is not causal with padding")


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
