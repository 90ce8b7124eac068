"""Two caches in one model: the same tokens, step by step, and how far the logits are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_ERROR = 1e-3
MARGIN = 10.0


@torch.no_grad()
def run(
    model: Any, cache: Any, inputs: dict[str, Tensor], steps: int, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prefill `inputs`, then `steps` decode steps on `tokens` (greedy if None).

    Returns
    -------
    logits : Tensor
        `[steps, B, vocabulary]` of the decode steps.
    tokens : Tensor
        `[B, steps]` that were fed.
    """
    mask = inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=position, past_key_values=cache, logits_to_keep=1)
    logits, fed = [out.logits[:, -1]], mask.new_empty(len(mask), steps)
    for i in range(steps):
        new = logits[-1].argmax(-1) if tokens is None else tokens[:, i]
        fed[:, i] = new
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = mask.sum(1, keepdim=True) - 1
        out = model(
            input_ids=new[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits)[1:], fed


@dataclass(frozen=True)
class Comparison:
    """Positions compared, those outside the tolerance, and the errors seen."""

    positions: int
    far: int
    flipped: int
    excused: int
    worst: float
    median: float

    def __str__(self) -> str:
        return (
            f"{self.positions} positions: {self.far} with relative L2 over {MAX_ERROR:g}, "
            f"{self.flipped} with another top-1 beyond the margin, {self.excused} excused; "
            f"relative L2 median {self.median:.1e}, worst {self.worst:.1e}"
        )


def compare(got: Tensor, want: Tensor) -> Comparison:
    """Compare logits `[..., vocabulary]` position by position.

    A position is fine when its relative L2 is under `MAX_ERROR`, and its top-1 is equal or the
    reference's margin between first and second is within `MARGIN` times the largest difference.
    """
    got, want = got.double().flatten(0, -2), want.double().flatten(0, -2)
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    first, second = want.topk(2, dim=1).values.unbind(1)
    clear = first - second > MARGIN * (got - want).abs().amax(1)
    flipped = clear & (got.argmax(1) != want.argmax(1))
    far = ~(error < MAX_ERROR)
    return Comparison(
        positions=len(error),
        far=int(far.sum()),
        flipped=int(flipped.sum()),
        excused=int((far | flipped).sum()),
        worst=float(error.max()),
        median=float(error.median()),
    )


@dataclass(frozen=True)
class Talk:
    """Logits `[positions, vocabulary]` of every real token, in the order of the forwards.

    `seen` and `prompt` `[positions]`: tokens of the row that a position could see quantized, and
    tokens of the row's first turn. `tokens [B, steps]` were generated.
    """

    logits: Tensor
    seen: Tensor
    prompt: Tensor
    tokens: Tensor

    def clean(self, R: int) -> Tensor:
        """Positions that saw nothing quantized but tokens of the first turn, in blocks of `R`."""
        return (self.seen // R * R <= self.prompt) & (self.seen - R <= self.prompt)


@torch.no_grad()
def talk(
    model: Any, cache: Any, turns: list[tuple[dict[str, Tensor], int]], tokens: Tensor | None = None
) -> Talk:
    """Turns of new columns, each one forward, followed by decode steps on `tokens` or greedy."""
    mask = turns[0][0]["attention_mask"][:, :0]
    prompt = turns[0][0]["attention_mask"].sum(1)
    found, fed, greedy = [], [], mask
    for inputs, steps in turns:
        new, shown = inputs["input_ids"], inputs["attention_mask"]
        for step in range(steps + 1):
            if step:
                new = greedy if tokens is None else tokens[:, len(fed)][:, None]
                shown = torch.ones_like(new)
                fed.append(new)
            # A decode step appends first; several tokens see the history as it was.
            seen = mask.sum(1) + (1 if step else 0)
            mask = torch.cat([mask, shown], 1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            logits = model(
                input_ids=new, attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits
            greedy = logits[:, -1].argmax(-1, keepdim=True)
            row, _ = shown.nonzero(as_tuple=True)
            found.append((logits[shown.bool()], seen[row], prompt[row]))
    fed = torch.cat([mask[:, :0], *fed], 1)
    return Talk(*(torch.cat(part) for part in zip(*found)), fed)
