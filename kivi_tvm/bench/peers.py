"""The peers that decode attention is compared with: their names, and which can run here."""

from __future__ import annotations

from collections.abc import Sequence

from kivi_tvm.bench import peers_onnxruntime, peers_openvino, peers_torch, peers_vllm
from kivi_tvm.bench.provider import Peer, Provider, Setting, Unusable
from kivi_tvm.errors import UserError

_MODULES = (peers_torch, peers_vllm, peers_onnxruntime, peers_openvino)
PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}


def check(names: Sequence[str] | None) -> None:
    """Refuse names that are not known, and peers asked for that are not installed.

    Raises
    ------
    UserError
    """
    for name in names or ():
        if name not in PEERS:
            raise UserError(f"`peers` must be among {list(PEERS)}, got {name!r}")
        if (reason := PEERS[name].missing()) is not None:
            raise UserError(f"`peers` must be installed, got {name!r}: {reason}")


def make(
    setting: Setting, names: Sequence[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """Peers on the caches of `setting`.

    Parameters
    ----------
    setting : Setting
    names : sequence of str, optional
        Names in `PEERS`; default those that are marked so.

    Returns
    -------
    list of Provider
    dict of str to str
        Peers of the default list that were left out, and why.

    Raises
    ------
    UserError
        A peer that was named cannot run.
    """
    check(names)
    made, left_out = [], {}
    for name in [n for n, p in PEERS.items() if p.default] if names is None else names:
        try:
            if (reason := PEERS[name].missing()) is not None:
                raise Unusable(reason)
            made.append(PEERS[name].make(setting))
        except Unusable as error:
            if names is not None:
                raise Unusable(f"`peers`: {name} cannot run: {error}") from error
            left_out[name] = str(error)
    return made, left_out
