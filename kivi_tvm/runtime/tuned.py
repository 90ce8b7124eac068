"""The tuning records that a build uses, and what is said when there are none."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kivi_tvm.config import KernelKey, KiviConfig
from kivi_tvm.database import Found, find
from kivi_tvm.notices import announce_once
from kivi_tvm.target_names import slug


def find_records(cfg: KiviConfig, key: KernelKey, target: Mapping[str, Any]) -> Found:
    """The records for `cfg` on `target`; the user hears once if there are none.

    Parameters
    ----------
    cfg : KiviConfig
    key : KernelKey
        `targets.kernel_key` of `cfg` and the target.
    target : mapping
        `targets.identity` of the target.
    """
    found = find(target, key)
    if not found.records:
        command = tune_command(cfg, target)
        announce_once(
            f"no tuning record on {slug(target)} for {key.slug}: default schedules "
            "are used" + (f"; to tune them: {command}" if command else "")
        )
    return found


def tune_command(cfg: KiviConfig, target: Mapping[str, Any]) -> str | None:
    """The command line that tunes the kernels of `cfg` for `target`; None if it has no options.

    That is so for pages of another size than the default, for groups of keys and of values that
    differ, and for GPUs.
    """
    if (
        target.get("kind") == "cuda"
        or cfg.G_k != cfg.G_v
        or cfg.P != replace(cfg, page_size=None).P
    ):
        return None
    from kivi_tvm import targets

    fields = {name: x for name, x in target.items() if name not in ("machine", "system")}
    name = "native" if targets.is_native(target) else shlex.quote(json.dumps(fields))
    return (
        f"kivi-tvm tune --target {name} --head-dim {cfg.D} --num-heads {cfg.H} "
        f"--num-kv-heads {cfg.H_kv} --bits {cfg.key_bits} {cfg.value_bits} "
        f"--group-size {cfg.G_k} --dtype {cfg.dtype}"
        + (f" --compute {cfg.compute}" if cfg.compute != "auto" else "")
    )
