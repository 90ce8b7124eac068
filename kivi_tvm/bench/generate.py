"""Decode speed and memory of a real model with our cache and with transformers' own.

All caches of one context hold the same tokens and take turns of a few steps. A cache whose
predictions fail their check gets no time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from kivi_tvm.bench import harness
from kivi_tvm.bench.generate_cases import (
    CHECKED_STEPS,
    DYNAMIC,
    FULL_PRECISION,
    KIVI,
    Options,
    Setting,
    Subject,
    Text,
)
from kivi_tvm.bench.generate_check import Check, check
from kivi_tvm.bench.generate_memory import Peak, measured_apart
from kivi_tvm.bench.harness import Timing
from kivi_tvm.bench.record import Environment
from kivi_tvm.errors import UserError
from kivi_tvm.hf import models, peer_caches
from kivi_tvm.host import installed_version

VERSIONS = ("transformers", *peer_caches.DISTRIBUTIONS.values())


@dataclass(frozen=True, slots=True)
class GenerateRecord:
    """One cache at one context; `timing` (one decode step) is None if its check failed.

    `prefill_s` is one sample. `bytes` are those that the cache held after the last step. `kernels`
    and `compute` say where ours came from and their mode.
    """

    model: str
    cache: str
    family: str
    bits: int | None
    dtype: str
    detail: str
    context: int
    steps: int
    prefill_s: float
    timing: Timing | None
    bytes: int
    peak: Peak | None
    check: Check
    compute: str | None
    kernels: str | None
    environment: Environment

    @property
    def passed(self) -> bool:
        return self.timing is not None

    @property
    def setting(self) -> Setting:
        return Setting(self.family, self.bits, self.dtype)

    @property
    def is_baseline(self) -> bool:
        return self.family == DYNAMIC

    @property
    def tokens_per_s(self) -> float | None:
        """From the median step."""
        return None if self.timing is None else 1e6 / self.timing.p50_us

    def to_dict(self) -> dict[str, object]:
        """Plain data on one level, without times for a wrong result."""
        fields: dict[str, object] = {"op": "generate"} | asdict(self)
        for name in ("timing", "peak", "check", "environment"):
            del fields[name]
        fields |= {k: v if _is_finite(v) else None for k, v in asdict(self.check).items()}
        peak = self.peak or Peak(None, None)
        fields |= asdict(peak)
        if self.timing is None:
            del fields["prefill_s"]
        else:
            fields |= asdict(self.timing) | {"tokens_per_s": self.tokens_per_s}
        return fields | asdict(self.environment) | {"passed": self.passed}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A cache that was not measured."""

    cache: str
    dtype: str
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Records of all contexts, and what is missing among them."""

    records: list[GenerateRecord]
    left_out: list[LeftOut]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A cache that holds the prompt and the checked steps."""

    subject: Subject
    prefill_s: float
    check: Check


def run(
    folder: Path,
    name: str,
    options: Options,
    with_peak: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Benchmark the caches of `options` in one model.

    Parameters
    ----------
    folder : Path
        Of a local model.
    name : str
        What records call it.
    options : Options
    with_peak : bool
        Measure peak memory too, each cache in a process of its own.
    say : callable
        Told what is going on.

    Raises
    ------
    UserError
        The model cannot be used, or KIVI's options do not fit it.
    """
    text = Text(folder, options)
    left_out: dict[Setting, str] = {}
    records: list[GenerateRecord] = []
    for context in options.context:
        records += _compare(text, name, context, left_out, say)
    if with_peak:
        records = _with_peaks(text, records, say)
    named = [LeftOut(each.name, each.dtype, reason) for each, reason in left_out.items()]
    return Outcome(records, named)


def _compare(
    text: Text, name: str, context: int, left_out: dict[Setting, str], say: Callable[[str], None]
) -> list[GenerateRecord]:
    """All caches at one context: prompts, checks, then timed steps in turn."""
    prepared = _prepared(text, context, left_out, say)
    say(f"decode steps in turn at {context} tokens")
    good = {f"{s.name} {s.dtype}": [p.subject.step] for s, p in prepared.items() if p.check.passed}
    timings = harness.interleave(good, text.options.rounds, text.options.burst) if good else {}
    environment = _environment()
    return [
        _record(each, name, timings.get(f"{setting.name} {setting.dtype}"), environment)
        for setting, each in prepared.items()
    ]


def _prepared(
    text: Text, context: int, left_out: dict[Setting, str], say: Callable[[str], None]
) -> dict[Setting, Prepared]:
    """Every cache that was asked for with its prompt read and its first steps checked."""
    wanted = text.options.settings
    found: dict[Setting, Prepared] = {}
    reference: list[Tensor] | None = None
    # Full precision first, whether or not it is asked for: the others are compared with it.
    for setting in dict.fromkeys((FULL_PRECISION, *wanted)):
        say(f"{setting.name}, {setting.dtype}: {context} tokens")
        subject = _warmed(text, setting, context, left_out)
        if subject is None:
            continue
        start = time.perf_counter()
        subject.prefill()
        prefill_s = time.perf_counter() - start
        logits = [subject.step() for _ in range(CHECKED_STEPS)]
        reference = logits if reference is None else reference
        if setting in wanted:
            found[setting] = Prepared(subject, prefill_s, check(subject, reference, logits))
    return found


def _warmed(
    text: Text, setting: Setting, context: int, left_out: dict[Setting, str]
) -> Subject | None:
    """A subject that has run once; None, with the reason noted, if a peer cannot."""
    if setting in left_out:
        return None
    try:
        subject = Subject(text, setting, context)
        subject.warm()
    except Exception as error:  # whatever a peer raises is a reason to go on without it
        if setting.family in peer_caches.DISTRIBUTIONS:
            words = peer_caches.missing(setting.family) or str(error) or type(error).__name__
            left_out[setting] = words.strip().splitlines()[0]
            return None
        if setting.family == KIVI and isinstance(error, ValueError):
            raise UserError(str(error)) from error  # KiviConfig's words for what the heads break
        raise
    return subject


def _record(
    prepared: Prepared, name: str, timing: Timing | None, environment: Environment
) -> GenerateRecord:
    subject, setting = prepared.subject, prepared.subject.setting
    ours = models.modules(subject.cache)[0][0] if setting.family == KIVI else None
    return GenerateRecord(
        model=name,
        cache=setting.name,
        family=setting.family,
        bits=setting.bits,
        dtype=setting.dtype,
        detail=subject.detail,
        context=subject.context,
        steps=subject.position - subject.context,
        prefill_s=prepared.prefill_s,
        timing=timing,
        bytes=peer_caches.storage_bytes(subject.cache),
        peak=None,
        check=prepared.check,
        compute=ours.manifest["compute"] if ours else None,
        kernels=ours.manifest["sources"]["attend"] if ours else None,
        environment=environment,
    )


def _with_peaks(
    text: Text, records: list[GenerateRecord], say: Callable[[str], None]
) -> list[GenerateRecord]:
    """The records that passed with peaks, one process per cache."""
    peaks: dict[tuple[Setting, int], Peak] = {}
    for setting in dict.fromkeys(record.setting for record in records if record.passed):
        say(f"{setting.name}, {setting.dtype}: peak memory")
        found = measured_apart(text.folder, text.options, setting)
        peaks |= {(setting, context): peak for context, peak in zip(text.options.context, found)}
    return [
        replace(record, peak=peaks.get((record.setting, record.context)))
        if record.passed
        else record
        for record in records
    ]


def _environment() -> Environment:
    """The usual one, and the versions of what is compared with."""
    environment = Environment.current()
    found = {name: installed_version(name) for name in VERSIONS}
    versions = {name: version for name, version in found.items() if version is not None}
    return replace(environment, versions=environment.versions | versions)
