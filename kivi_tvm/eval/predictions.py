"""Predictions of a model over a cache, and figures that compare them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Predictions compared at once: four float64 copies of so many vocabularies are held.
_ROWS = 64


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
    same, divergence = 0, 0.0
    for reference, other in zip(reference_logits.split(_ROWS), logits.split(_ROWS), strict=True):
        same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        divergence += _divergence(reference.double(), other.double())
    return Agreement(same / len(logits), divergence / len(logits), len(logits))


def _divergence(reference_logits: Tensor, logits: Tensor) -> float:
    """KL(reference || other) in nats, summed over positions."""
    log_p, log_q = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    # Selected, not multiplied: 0 * (-inf - x) would be NaN.
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return terms.sum().item()


class Scored(NamedTuple):
    """Predictions of known tokens.

    `perplexity` is exp of the mean negative log-likelihood; `logits` `[positions, vocabulary]`
    are what it was computed from, for `agreement` with other predictions of the same tokens.
    """

    perplexity: float
    logits: Tensor


def perplexity(model: Any, cache: Any, tokens: Tensor, positions: int) -> Scored:
    """Perplexity of the last `positions` tokens of a text, read one by one over `cache`.

    Each prediction is a decode step, as in generation: a chunk of new tokens would see itself
    exactly, however few bits the cache has.

    Parameters
    ----------
    model, cache
        As in `decoded_logits`.
    tokens : Tensor
        int64 `[1, T]`, `T >= positions + 2`: the first `T - 1 - positions` are the prompt.
    positions : int

    Raises
    ------
    ValueError
        The text is too short for `positions`.
    """
    logits = decoded_logits(model, cache, tokens[:, :-1], positions)
    losses = cross_entropy(logits.float(), tokens[0, -positions:], reduction="none")
    return Scored(losses.double().mean().exp().item(), logits)


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
