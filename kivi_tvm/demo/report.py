"""The end of the demo: a table for people, one JSON object for programs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from kivi_tvm.demo.footprint import Footprint

if TYPE_CHECKING:
    from kivi_tvm.demo.generate import Result, Settings

ORIGINS = {
    "cache": "from the per-user cache",
    "compiled": "compiled now, cached for the next start",
    "in-process": "compiled in this process, not cached",
    "file": "from a file",
}


def to_json(result: Result, settings: Settings, model: str, threads: int) -> dict[str, Any]:
    """Everything the table says, as plain data, and the text."""
    compared = result.agreement
    return {
        "command": "demo",
        "model": model,
        "dtype": settings.dtype,
        "threads": threads,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "residual_length": settings.residual_length,
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "prefill_s": result.prefill_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "cache": result.cache.to_dict(),
        "cache_8192_computed": result.at_8192.to_dict(),
        "kernels": {"source": result.kernels_from, "schedules": result.kernel_sources},
        "compare": compared._asdict() if compared else None,
    }


def print_tables(result: Result, settings: Settings, model: str, threads: int) -> None:
    """Two small tables on stdout: what it took, and what the cache holds."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print()
    console.print(_summary(result, settings, model, threads))
    console.print(_bytes(result))


def _summary(result: Result, settings: Settings, model: str, threads: int) -> Any:
    from rich.table import Table

    table = Table(show_header=False)
    setting = f"{settings.bits}-bit KIVI, G={settings.group_size}, R={settings.residual_length}"
    table.add_row("model", f"{model}, {settings.dtype}, {threads} threads")
    table.add_row("cache", setting)
    table.add_row("prompt", f"{result.prompt_tokens:,} tokens in {result.prefill_s:.2f} s")
    table.add_row("generated", f"{result.generated_tokens:,} tokens, {_speed(result)}")
    table.add_row("kernels", f"{_schedules(result)}, {ORIGINS[result.kernels_from]}")
    if (compared := result.agreement) is not None:
        table.add_row(
            "full precision",
            f"top-1 agreement {compared.top1:.1%}, mean KL {compared.kl:.4f} nats, "
            f"{compared.positions} positions teacher-forced",
        )
    return table


def _bytes(result: Result) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("cache, in MB", no_wrap=True)
    for name in ("packed", "window", "other", "total", "float16", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    tokens = f"{result.cache.tokens:,} tokens"
    table.add_row(tokens, *_cells(result.cache))
    table.add_row(f"{result.at_8192.tokens:,} tokens (computed)", *_cells(result.at_8192))
    return table


def _cells(f: Footprint) -> list[str]:
    counts = (f.packed_bytes, f.window_bytes, f.other_bytes, f.total_bytes, f.fp16_bytes)
    return [*(f"{count / 1e6:.2f}" for count in counts), f"{f.ratio:.2f}x"]


def _speed(result: Result) -> str:
    speed = result.decode_tokens_per_s
    return "too few to time" if speed is None else f"{speed:.1f} tokens/s"


def _schedules(result: Result) -> str:
    """For example "9 default, 2 tuned"."""
    counts = Counter(result.kernel_sources.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
