"""How far a cache setting moves a model's predictions from those at full precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Agreement(NamedTuple):
    """Two models' predictions over the same positions.

    `top1` is the share of positions with the same most likely token; `kl` the mean
    Kullback-Leibler divergence KL(reference || other) in nats.
    """

    top1: float
    kl: float
    positions: int


def agreement(reference_logits: Tensor, logits: Tensor) -> Agreement:
    """Compare next-token predictions position by position.

    Parameters
    ----------
    reference_logits, logits : Tensor
        `[N, vocabulary]`, any floating dtype; compared in float64. A token that the reference
        rules out (-inf) adds nothing; a tie goes to the lower token on both sides.

    Raises
    ------
    ValueError
        The shapes differ, or there is no position.
    """
    if reference_logits.shape != logits.shape or logits.ndim != 2 or not logits.numel():
        raise ValueError(
            "`reference_logits` and `logits` must have one shape [N, vocabulary], N >= 1, got "
            f"{list(reference_logits.shape)} and {list(logits.shape)}"
        )
    log_p = reference_logits.double().log_softmax(-1)
    log_q = logits.double().log_softmax(-1)
    p = log_p.exp()
    # Selected, not multiplied: 0 * (-inf - x) would be NaN.
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    same = reference_logits.argmax(-1) == logits.argmax(-1)
    return Agreement(same.double().mean().item(), terms.sum(-1).mean().item(), len(logits))


@torch.no_grad()
def full_precision_logits(model: Any, tokens: Tensor, positions: int) -> Tensor:
    """Logits `[positions, vocabulary]` after each of the last tokens of `tokens [1, T]`."""
    logits: Tensor = model(tokens, logits_to_keep=positions, use_cache=False).logits[0]
    return logits


@torch.no_grad()
def decoded_logits(model: Any, cache: Any, tokens: Tensor, positions: int) -> Tensor:
    """The same predictions, each made by one decode step over `cache`.

    Parameters
    ----------
    model : object
        A causal language model of transformers.
    cache : object
        Empty; takes all but the last `positions` tokens as a prompt, then one token at a time.
    tokens : Tensor
        int64 `[1, T]`, `T > positions`: every prediction follows the same tokens, whatever was
        predicted before (teacher forcing).
    positions : int

    Returns
    -------
    Tensor
        `[positions, vocabulary]`.
    """
    if not 0 < positions < tokens.shape[1]:
        raise ValueError(f"`positions` must be in 1..{tokens.shape[1] - 1}, got {positions}")
    first = tokens.shape[1] - positions
    model(tokens[:, :first], past_key_values=cache, logits_to_keep=1)
    steps = [
        model(tokens[:, t : t + 1], past_key_values=cache).logits[0]
        for t in range(first, tokens.shape[1])
    ]
    return torch.cat(steps)
