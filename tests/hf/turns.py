"""Turns of a batch: new columns with padding anywhere, fed to a model over a cache."""

from __future__ import annotations

import torch
from hf.tiny import pad, prompt

from kivi_tvm.hf.reference_cache import ReferenceKiviCache

R = 32


def turn(*lengths, seed=0, side="left"):
    """New columns with so many real tokens in each row."""
    return pad([prompt(n, seed=100 * seed + i)[0] for i, n in enumerate(lengths)], side)


def ragged(seed=0):
    """Two rows with padding at the left, inside and at the right of the columns."""
    ids, mask = prompt(9, 2, seed), torch.ones(2, 9, dtype=torch.long)
    mask[0, [0, 4, 5]] = mask[1, [2, 3, 8]] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def feed(model, cache, turns, mask=None):
    """The logits of each turn's real tokens, and the mask of all columns."""
    found = []
    for inputs in turns:
        new = inputs["attention_mask"]
        mask = new if mask is None else torch.cat([mask, new], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(
            inputs["input_ids"], attention_mask=mask, position_ids=position, past_key_values=cache
        )
        found.append(out.logits[new.bool()])
    return torch.cat(found), mask


def new_cache(model, **options):
    return ReferenceKiviCache(model.config, residual_length=R, **options)


def after(model, cache, mask, rows=2):
    """Logits of a longer turn and two decode steps, which flush."""
    turns = [turn(*[40] * rows, seed=7), turn(*[1] * rows, seed=8), turn(*[1] * rows, seed=9)]
    return feed(model, cache, turns, mask)[0]
