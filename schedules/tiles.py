"""Register tiles: rows x vectors of accumulators, for contractions in float32."""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.primitives import (
    divisors,
    extent_of,
    fold_lanes,
    largest_divisor,
    split_off,
)

# Registers for a tile's accumulators: of 32, some hold codes and operands.
MAX_ACCUMULATORS = 24


def register_tile(rows: int, vectors: int, accumulators: int) -> tuple[int, int]:
    """Divisors of `rows` and `vectors` whose tile loads least for each multiplication.

    A tile of `r` x `v` accumulators takes `r + v` loads for `r v` multiplications.
    """
    tiles = [
        (r, v)
        for r in divisors(rows, accumulators)
        for v in divisors(vectors, accumulators)
        if r * v <= accumulators
    ]
    return min(tiles, key=lambda tile: sum(tile) / (tile[0] * tile[1]))


def choose_tile(
    sch: Schedule, name: str, rows: int, vectors: int, default: tuple[int, int]
) -> tuple[int, int]:
    """Rows x vectors of a register tile, chosen as one: what matters is how they share registers.

    What is taken is brought down to divisors of `rows` and `vectors`, so that the options do not
    depend on other choices that change their number.
    """
    powers = [1, 2, 4, 8, 16]
    tiles = [(r, v) for r in divisors(rows, MAX_ACCUMULATORS) for v in powers]
    names = {f"{r}x{v}": (r, v) for r, v in tiles if r * v <= MAX_ACCUMULATORS}
    fitting = max(divisors(rows, default[0])), default[1]
    names["{}x{}".format(*fitting)] = fitting
    r, v = names[choose(sch, name, list(names), "{}x{}".format(*fitting))]
    return r, max(divisors(vectors, v))


def choose_lanes(sch: Schedule, name: str, widest: int, extent: int) -> int:
    """Elements of a vector: a full register unless half a one is chosen.

    Half registers cost twice the instructions, but some chips clock or split wide ones down.
    """
    full = largest_divisor(extent, widest)
    return choose(sch, name, sorted({full, largest_divisor(extent, widest // 2)}), full)


def fill_registers(sch: Schedule, block: SBlockRV) -> None:
    """Unroll and vectorize the innermost loops (row, vector, lane) of a register tile."""
    row, vector, lane = sch.get_loops(block)[-3:]
    sch.unroll(row)
    sch.unroll(vector)
    sch.vectorize(lane)


def split_into_tiles(
    sch: Schedule, name: str, row: LoopRV, lane: LoopRV, lanes: int, default: tuple[int, int]
) -> tuple[list[LoopRV], LoopRV, LoopRV, LoopRV]:
    """Split rows and a lane axis into register tiles: the loops over tiles, row, vector, lane."""
    shape = extent_of(sch, row), extent_of(sch, lane) // lanes
    rows, vectors = choose_tile(sch, f"{name}_tile", *shape, default)
    row_tile, row = split_off(sch, row, rows)
    vector, lane = split_off(sch, lane, lanes)
    tile, vector = split_off(sch, vector, vectors)
    outer = [row_tile, tile]
    if choose(sch, f"{name}_outer", ["rows", "vectors"], "rows") == "vectors":
        outer.reverse()
    return outer, row, vector, lane


def contract_in_registers(
    sch: Schedule, block: SBlockRV, consumer: SBlockRV, default: tuple[int, int], lanes: int
) -> list[LoopRV]:
    """Run a contraction as register tiles of rows x vectors, reduced outside the tile.

    `block` has the loops (row, lane axis, *reduced), the last of several unrolled; its only
    consumer is elementwise over (row, lane axis). Every code is unpacked once per tile for all its
    rows. A vector has `lanes` elements, not the whole tile's: one of 80 is no power of two, and one
    of 32 spans two groups of 16 (`attend` took 7 to 12 times as long).

    Choices, by the name of `block`: `_lanes`; `_tile`, by default `default` rows x vectors;
    `_outer`, whether tiles go down the rows or along the lane axis first; `_unroll`, how many of
    the last reduced loop's iterations are unrolled.
    """
    name = sch.get(block).name_hint
    row, lane = sch.get_loops(consumer)
    lanes = choose_lanes(sch, f"{name}_lanes", lanes, extent_of(sch, lane))
    outer, row, vector, lane = split_into_tiles(sch, name, row, lane, lanes, default)
    sch.reorder(*outer, row, vector, lane)
    sch.compute_at(block, outer[-1], preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    fill_registers(sch, consumer)
    first = len(sch.get_loops(consumer)) - 3  # compute_at put the block beside these
    row, lane, *reduced = sch.get_loops(block)[first:]
    vector, lane = split_off(sch, lane, lanes)
    if len(reduced) > 1:
        reduced = [*reduced[:-1], *unroll_off(sch, f"{name}_unroll", reduced[-1])]
    sch.reorder(*reduced, row, vector, lane)
    fill_registers(sch, block)
    fill_registers(sch, sch.decompose_reduction(block, reduced[0]))
    return [*outer, reduced[0]]


def unroll_off(sch: Schedule, name: str, loop: LoopRV) -> list[LoopRV]:
    """Unroll all iterations of a loop, or as many as the choice `name` says; the loops it becomes.

    Fewer make shorter code, but what the unrolled ones share is loaded again.
    """
    extent = extent_of(sch, loop)
    count = choose(sch, name, divisors(extent, extent)[-3:], extent)
    loops = [loop] if count == extent else list(sch.split(loop, [None, count]))
    sch.unroll(loops[-1])
    return loops


def dot_by_lanes(sch: Schedule, block: SBlockRV, accumulators: int, lanes: int) -> list[LoopRV]:
    """Run dot products of contiguous operands in partial results by lane, as register tiles.

    `block` has the loops (row, column, reduced axis). Returns the loops over tiles. Choices, by its
    name: `_lanes`, and `_tile`, the results of a tile, by default those that load least with at
    most `accumulators`.
    """
    name = sch.get(block).name_hint
    rows, columns, reduced = (extent_of(sch, loop) for loop in sch.get_loops(block))
    lanes = choose_lanes(sch, f"{name}_lanes", lanes, reduced)
    default = register_tile(rows, columns, accumulators)
    rows, columns = choose_tile(sch, f"{name}_tile", rows, columns, default)
    # 1. one partial result per lane
    _, lane = split_off(sch, sch.get_loops(block)[-1], lanes)
    partial = sch.rfactor(lane, factor_axis=-1)
    row, column, step, lane = sch.get_loops(partial)
    row_tile, row = split_off(sch, row, rows)
    tile, column = split_off(sch, column, columns)
    sch.reorder(row_tile, tile, step, row, column, lane)
    fill_registers(sch, partial)
    fill_registers(sch, sch.decompose_reduction(partial, step))
    # 2. their sums
    fold_lanes(sch, block)
    return [row_tile, tile]
