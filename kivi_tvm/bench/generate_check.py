"""Whether a cache's predictions are right, before its steps are timed.

Every cache is compared with full precision: a cache that is garbage predicts no better than the
model without one, so it must stay below half of that divergence. Ours must also give the logits of
the same algorithm in plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kivi_tvm.bench.generate_cases import KIVI, Subject, kivi_options
from kivi_tvm.bench.provider import relative_l2
from kivi_tvm.eval import agreement, decoded_logits
from kivi_tvm.hf import models
from kivi_tvm.hf.reference_cache import ReferenceKiviCache
from kivi_tvm.tune.cases.tolerance import MODE_L2, RELATIVE_L2

MAX_KL_SHARE = 0.5
# Rounding in one layer moves the next one's inputs: logits of SmolLM2's 30 layers were off by 1e-6
# in float32 and 1.1e-2 in bfloat16, at most a tenth of what this allows.
MARGIN = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """Predictions of the first decode steps.

    `kl` is the mean divergence (nats) from full precision in float32, `top1` the share of equal
    tokens, `kl_without_cache` the divergence of the model that sees only the current token. `error`
    is the relative L2 distance of the first logits to KIVI in plain torch, `tolerance` its limit;
    both None for the others.
    """

    kl: float
    top1: float
    kl_without_cache: float
    error: float | None = None
    tolerance: float | None = None

    @property
    def passed(self) -> bool:
        near = math.isfinite(self.kl) and self.kl <= MAX_KL_SHARE * self.kl_without_cache
        if self.error is None or self.tolerance is None:
            return near
        return near and self.error <= self.tolerance  # false for NaN


def check(subject: Subject, reference: list[Tensor], logits: list[Tensor]) -> Check:
    """Compare the logits `[1, vocabulary]` of a subject's first steps.

    Parameters
    ----------
    subject : Subject
    reference : list of Tensor
        Of the same steps in full precision.
    logits : list of Tensor
    """
    expected = torch.cat(reference)
    alike = agreement(expected, torch.cat(logits))
    alone = agreement(expected, _without_cache(subject, len(logits)))
    if subject.setting.family != KIVI:
        return Check(alike.kl, alike.top1, alone.kl)
    error = relative_l2(logits[0], _in_plain_torch(subject))
    return Check(alike.kl, alike.top1, alone.kl, error, _tolerance(subject))


def _tolerance(subject: Subject) -> float:
    mode = models.modules(subject.cache)[0][0].manifest["compute"]
    own = MARGIN * RELATIVE_L2[getattr(torch, subject.setting.dtype)]
    return max(own, MODE_L2.get(mode, 0.0))


def _in_plain_torch(subject: Subject) -> Tensor:
    """Logits of the first decode step with the reference cache."""
    options = kivi_options(subject.text.options, subject.setting.bits or 0)
    cache = ReferenceKiviCache(subject.text.config, accumulate=torch.float32, **options)
    tokens = subject.text.tokens[:, : subject.context + 1]
    return decoded_logits(subject.model, cache, tokens, 1)


@torch.no_grad()
def _without_cache(subject: Subject, steps: int) -> Tensor:
    """Logits `[steps, vocabulary]` after each token of the first steps, seen alone."""
    tokens = subject.text.tokens[0, subject.context : subject.context + steps]
    logits: Tensor = subject.model(tokens[:, None], use_cache=False).logits[:, -1]
    return logits
