"""Register tiles in integers: codes times quads of int8, and how quads are made and summed."""

from __future__ import annotations

from typing import NamedTuple

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from kivi_tvm.schedules import byte_dot
from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.primitives import (
    extent_of,
    largest_divisor,
    split_off,
)
from kivi_tvm.schedules.tiles import fill_registers, split_into_tiles


class ByteBlocks(NamedTuple):
    """The names of a contraction's blocks, with their loops."""

    codes: str  # (place, word, lane axis): what four bytes hold at a place
    dot: str  # (place, plane, row, lane axis, word, byte): its products with quads
    sum: str  # (row, lane axis, place)
    result: str  # (row, lane axis)


def contract_bytes(
    sch: Schedule, names: ByteBlocks, default: tuple[int, int], lanes: int, kind: str | None
) -> list[LoopRV]:
    """Run a contraction of bytes as register tiles of rows x vectors of int32.

    Every vector of codes is unpacked once for all rows and planes of a tile. Without an instruction
    for dot products of bytes (`kind`) these are taken one by one. Returns the loops whose turns
    share the work evenly: tiles, and places where they are summed in turn.

    Choices, by the name of the block `dot`: `_tile`, by default `default` rows x vectors; `_outer`,
    whether tiles go down the rows or along the lane axis first; `_places`, whether a tile's places
    are summed in "turn", reading its words for each, or "together", in registers of their own:
    with one row the latter has enough sums under way, with more rows it runs out of registers.
    """
    codes, dot, total, result = map(sch.get_sblock, names)
    # 1. tiles of the result
    row, lane = sch.get_loops(result)
    lanes = largest_divisor(extent_of(sch, lane), lanes)
    outer, row, vector, lane = split_into_tiles(sch, names.dot, row, lane, lanes, default)
    sch.reorder(*outer, row, vector, lane)
    fill_registers(sch, result)
    # 2. sums over places
    sch.compute_at(total, outer[-1], preserve_unit_loops=True)
    sch.set_scope(total, 0, "local")
    row, lane, place = sch.get_loops(total)[-3:]
    vector, lane = split_off(sch, lane, lanes)
    sch.reorder(place, row, vector, lane)
    fill_registers(sch, total)
    # 3. products of a place, or of all
    way = choose(sch, f"{names.dot}_places", ["turn", "together"], _places(default))
    around = outer[-1] if way == "together" else place
    sch.compute_at(dot, around, preserve_unit_loops=True)
    sch.set_scope(dot, 0, "local")
    if way == "together":
        sch.unroll(place)
    fill_registers(sch, sch.decompose_reduction(total, place))
    word, at = _fill_with_dots(sch, dot, lanes, kind)
    # 4. codes in registers
    sch.compute_at(codes, at, preserve_unit_loops=True)
    sch.set_scope(codes, 0, "local")
    vector, lane = split_off(sch, sch.get_loops(codes)[-1], lanes)
    sch.unroll(vector)
    sch.vectorize(lane)
    # 5. instructions
    _unroll_all_but_lanes(sch, sch.decompose_reduction(dot, word), 4)
    if kind:
        sch.tensorize(sch.get_loops(dot)[-2], byte_dot.byte_dot(kind, lanes))
    return outer if way == "together" else [*outer, place]


def _places(tile: tuple[int, int]) -> str:
    return "together" if tile[0] == 1 else "turn"


def _fill_with_dots(
    sch: Schedule, dot: SBlockRV, lanes: int, kind: str | None
) -> tuple[LoopRV, LoopRV]:
    """Unroll the tile of `dot` inside of its loop over words; that loop and the one over places."""
    at, plane, row, lane, word, byte = sch.get_loops(dot)[-6:]
    vector, lane = split_off(sch, lane, lanes)
    innermost = (lane, byte) if kind else (byte, lane)
    sch.reorder(word, at, plane, row, vector, *innermost)
    for loop in (at, plane, row, vector):
        sch.unroll(loop)
    if not kind:
        sch.unroll(byte)
        sch.vectorize(lane)
    return word, at


def _unroll_all_but_lanes(sch: Schedule, block: SBlockRV, count: int) -> None:
    """Vectorize the innermost loop and unroll the `count` loops around it."""
    *_, lane = loops = sch.get_loops(block)
    for loop in loops[-1 - count : -1]:
        sch.unroll(loop)
    sch.vectorize(lane)


def make_quads(sch: Schedule, block: SBlockRV, rows: int, lanes: int) -> None:
    """Make quads, loops (plane, row, group, quad), for several rows of a group at once.

    What a group contributes is loaded once for them, and all planes come from the same integers.
    """
    plane, row, group, lane = sch.get_loops(block)
    step, lane = split_off(sch, lane, lanes)
    tile, row = split_off(sch, row, rows)
    sch.reorder(tile, group, step, plane, row, lane)
    _unroll_all_but_lanes(sch, block, 2)


def sum_bytes(
    sch: Schedule, block: SBlockRV, tile: tuple[int, int], lanes: int, kind: str | None
) -> None:
    """Add up the bytes of quads: loops (plane, row, group, step, lane axis, byte)."""
    plane, row, group, step, axis, byte = sch.get_loops(block)
    axis, lane = split_off(sch, axis, lanes)
    row_tile, row = split_off(sch, row, tile[0])
    group_tile, group = split_off(sch, group, tile[1])
    if kind is None or not byte_dot.has(kind, extent_of(sch, lane)):
        kind = None
    innermost = (lane, byte) if kind else (byte, lane)
    sch.reorder(plane, row_tile, group_tile, axis, step, row, group, *innermost)
    for loop in (row, group):
        sch.unroll(loop)
    if not kind:
        sch.unroll(byte)
        sch.vectorize(lane)
    _unroll_all_but_lanes(sch, sch.decompose_reduction(block, step), 2)
    if kind:
        sch.tensorize(lane, byte_dot.byte_sum(kind, extent_of(sch, lane)))


def sum_products(
    sch: Schedule, block: SBlockRV, operand: SBlockRV, tile: tuple[int, int], lanes: int
) -> None:
    """Sum products in parts by lane: loops (row, group, step, lane axis).

    `operand`, loops (group, element), is made in registers, once for all rows of a tile.
    """
    row, group, step, axis = sch.get_loops(block)
    axis, lane = split_off(sch, axis, lanes)
    row_tile, row = split_off(sch, row, tile[0])
    group_tile, group = split_off(sch, group, tile[1])
    sch.reorder(row_tile, group_tile, axis, step, row, group, lane)
    sch.compute_at(operand, step, preserve_unit_loops=True)
    sch.set_scope(operand, 0, "local")
    _unroll_all_but_lanes(sch, operand, 1)
    _unroll_all_but_lanes(sch, block, 2)
    _unroll_all_but_lanes(sch, sch.decompose_reduction(block, step), 2)
