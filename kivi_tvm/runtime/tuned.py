"""The tuning records that a build uses, and what is said when there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kivi_tvm.config import KiviConfig
from kivi_tvm.database import Found, find
from kivi_tvm.notices import announce_once
from kivi_tvm.target_names import slug


def find_records(cfg: KiviConfig, target: Mapping[str, Any]) -> Found:
    """The records for `cfg` on `target`; the user hears once if only other kernels are tuned.

    Parameters
    ----------
    cfg : KiviConfig
    target : mapping
        `targets.identity` of the target.
    """
    found = find(target, cfg.kernel_key())
    if found.target_known and not found.records:
        announce_once(
            f"no tuning record on {slug(target)} for {cfg.kernel_key().slug}: default schedules "
            f"are used; to tune them: {tune_command(cfg)}"
        )
    return found


def tune_command(cfg: KiviConfig) -> str:
    """The command line that tunes the kernels of `cfg` on this machine."""
    return (
        f"kivi-tvm tune --target native --head-dim {cfg.D} --num-heads {cfg.H} "
        f"--num-kv-heads {cfg.H_kv}"
        + _option("key-bits", cfg.key_bits, 2)
        + _option("value-bits", cfg.value_bits, 2)
        + _option("group-size", cfg.group_size, 32)
        + _option("dtype", cfg.dtype, "float16")
    )


def _option(name: str, value: object, default: object) -> str:
    return "" if value == default else f" --{name} {value}"
