"""Moves that more than one schedule uses: each a few lines over `s_tir.Schedule`."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from kivi_tvm.schedules.byte_dot import byte_dot, byte_sum
from kivi_tvm.schedules.byte_order import byte_order
from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.lane_reduce import lane_reduce, lane_reduce_rows

# Registers for a tile's accumulators: of 32, some hold codes and operands.
MAX_ACCUMULATORS = 24


def largest_divisor(extent: int, limit: int) -> int:
    """The largest divisor of `extent` that is at most `limit`."""
    return max(d for d in range(1, min(extent, limit) + 1) if extent % d == 0)


def largest_power_of_two(extent: int, limit: int) -> int:
    """The largest power of two that divides `extent` and is at most `limit`."""
    return next(n for n in (1 << i for i in range(30, -1, -1)) if n <= limit and extent % n == 0)


def extent_of(sch: Schedule, loop: LoopRV) -> int:
    """The constant extent of a loop."""
    return int(sch.get(loop).extent)


def split_off(sch: Schedule, loop: LoopRV, limit: int) -> tuple[LoopRV, LoopRV]:
    """Split an inner loop of at most `limit` iterations off, with no remainder."""
    inner = largest_divisor(extent_of(sch, loop), limit)
    outer, tile = sch.split(loop, [None, inner])
    return outer, tile


def vectorize_last(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Vectorize the innermost loop of an elementwise block, `lanes` at a time."""
    loop = sch.get_loops(block)[-1]
    _, lane = split_off(sch, loop, lanes)
    sch.vectorize(lane)


def choose_width(sch: Schedule, name: str, lanes: int) -> int:
    """Elements that a stage takes at once: half a register, one, or two to hide latency."""
    return choose(sch, f"{name}_width", [lanes // 2, lanes, 2 * lanes], lanes)


def reduce_by_lanes(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Reduce the innermost loop in at most `lanes` partial results first, then these by shuffles.

    LLVM keeps the order of float additions, so a serial reduction is never vectorized.
    """
    loop = sch.get_loops(block)[-1]
    lanes = largest_power_of_two(extent_of(sch, loop), lanes)
    _, lane = sch.split(loop, [None, lanes])
    partial = sch.rfactor(lane, factor_axis=-1)
    *_, step, lane = sch.get_loops(partial)
    sch.vectorize(lane)
    init = sch.decompose_reduction(partial, step)
    sch.vectorize(sch.get_loops(init)[-1])
    fold_lanes(sch, block)


def fold_lanes(sch: Schedule, block: SBlockRV) -> None:
    """Reduce the innermost loop, over one vector of partial results, by shuffles if it can be.

    So many rows at once as there are in the loop around it, up to a vector of them.
    """
    *_, row, lane = sch.get_loops(block)
    lanes, kind = extent_of(sch, lane), reduction(sch, block)
    if kind is None or largest_power_of_two(lanes, lanes) != lanes:
        sch.decompose_reduction(block, lane)
        return
    rows = largest_power_of_two(extent_of(sch, row), lanes)
    if rows == 1:
        sch.decompose_reduction(block, lane)
        sch.tensorize(lane, lane_reduce(kind, lanes))
        return
    _, row = sch.split(row, [None, rows])
    sch.decompose_reduction(block, row)
    sch.tensorize(row, lane_reduce_rows(kind, rows, lanes))


def reduction(sch: Schedule, block: SBlockRV) -> str | None:
    """How a block of float32 reduces, in `lane_reduce`'s words; None if it is none of them."""
    body = sch.get(block).body
    kinds = {tirx.Add: "sum", tirx.Max: "max", tirx.Min: "min"}
    return kinds.get(type(body.value)) if body.buffer.dtype == "float32" else None


def divisors(extent: int, limit: int) -> list[int]:
    """The divisors of `extent` that are at most `limit`, in order."""
    return [d for d in range(1, min(extent, limit) + 1) if extent % d == 0]


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
) -> None:
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


def contract_bytes_in_registers(
    sch: Schedule,
    blocks: tuple[str, str, str, str],
    default: tuple[int, int],
    lanes: int,
    kind: str | None,
) -> list[LoopRV]:
    """Run a contraction of bytes as register tiles of rows x vectors of int32.

    `blocks` are the codes at a place of a word's bytes, (place, word, lane axis); their `dot`
    products with quads, (place, plane, row, lane axis, word, byte); the sum of these over places,
    (row, lane axis, place); and what it is for, (row, lane axis). Without an instruction for it
    (`kind`) the bytes are taken one by one. Returns the loops around a place of a tile.

    Choices, by the name of `dot`: `_tile`, by default `default` rows x vectors; `_outer`, whether
    tiles go down the rows or along the lane axis first; `_places`, whether the places of a tile's
    words are summed in turn, with the words read again, or together, each in registers of its own.
    """
    unpacked, block, product, consumer = map(sch.get_sblock, blocks)
    name = blocks[1]
    row, lane = sch.get_loops(consumer)
    lanes = largest_divisor(extent_of(sch, lane), lanes)
    outer, row, vector, lane = split_into_tiles(sch, name, row, lane, lanes, default)
    sch.reorder(*outer, row, vector, lane)
    fill_registers(sch, consumer)
    # 1. sums over places
    sch.compute_at(product, outer[-1], preserve_unit_loops=True)
    sch.set_scope(product, 0, "local")
    row, lane, place = sch.get_loops(product)[-3:]
    vector, lane = split_off(sch, lane, lanes)
    sch.reorder(place, row, vector, lane)
    fill_registers(sch, product)
    # 2. products of a place, or of all
    default_places = "together" if default[0] == 1 else "turn"
    together = choose(sch, f"{name}_places", ["turn", "together"], default_places) == "together"
    sch.compute_at(block, outer[-1] if together else place, preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    if together:
        sch.unroll(place)
    start = sch.decompose_reduction(product, place)
    fill_registers(sch, start)
    at, plane, row, lane, word, byte = sch.get_loops(block)[-6:]
    vector, lane = split_off(sch, lane, lanes)
    innermost = (lane, byte) if kind else (byte, lane)
    sch.reorder(word, at, plane, row, vector, *innermost)
    for loop in (at, plane, row, vector):
        sch.unroll(loop)
    # 3. codes in registers, for all rows of the tile
    sch.compute_at(unpacked, at, preserve_unit_loops=True)
    sch.set_scope(unpacked, 0, "local")
    held, held_lane = split_off(sch, sch.get_loops(unpacked)[-1], lanes)
    sch.unroll(held)
    sch.vectorize(held_lane)
    if not kind:
        sch.unroll(byte)
        sch.vectorize(lane)
    start = sch.decompose_reduction(block, word)
    *_, at, plane, row, vector, lane = sch.get_loops(start)
    for loop in (at, plane, row, vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    if kind:
        sch.tensorize(sch.get_loops(block)[-2], byte_dot(kind, lanes))
    return outer if together else [*outer, place]


def sum_bytes(
    sch: Schedule, block: SBlockRV, tile: tuple[int, int], kind: str | None
) -> None:
    """Add up the bytes of vectors of quads: loops (plane, row, column, step, lane, byte)."""
    plane, row, column, step, lane, byte = sch.get_loops(block)
    row_tile, row = split_off(sch, row, tile[0])
    column_tile, column = split_off(sch, column, tile[1])
    innermost = (lane, byte) if kind else (byte, lane)
    sch.reorder(plane, row_tile, column_tile, step, row, column, *innermost)
    for loop in (row, column):
        sch.unroll(loop)
    if not kind:
        sch.unroll(byte)
        sch.vectorize(lane)
    start = sch.decompose_reduction(block, step)
    fill_registers(sch, start)
    if kind:
        lanes = extent_of(sch, lane)
        sch.tensorize(lane, byte_sum(kind, lanes))


def sum_products(
    sch: Schedule, block: SBlockRV, operand: SBlockRV, tile: tuple[int, int]
) -> None:
    """Sum in as many parts as there are lanes: loops (row, column, step, lane).

    The `operand` of a column is made in registers, for all rows of a tile.
    """
    row, column, step, lane = sch.get_loops(block)
    lanes = extent_of(sch, lane)
    row_tile, row = split_off(sch, row, tile[0])
    column_tile, column = split_off(sch, column, tile[1])
    sch.reorder(row_tile, column_tile, step, row, column, lane)
    sch.compute_at(operand, step, preserve_unit_loops=True)
    sch.set_scope(operand, 0, "local")
    column, lane = sch.get_loops(operand)[-2:]
    _, lane = split_off(sch, lane, lanes)
    sch.unroll(column)
    sch.vectorize(lane)
    fill_registers(sch, block)
    fill_registers(sch, sch.decompose_reduction(block, step))


def order_bytes(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Move elements from the order of words to that of bytes: loops (.., byte, word, place)."""
    byte, word, place = sch.get_loops(block)[-3:]
    places = extent_of(sch, place)
    words = largest_power_of_two(extent_of(sch, word), lanes // places)
    outer, word = sch.split(word, [None, words])
    sch.reorder(outer, byte, word, place)
    sch.tensorize(byte, byte_order(words, places))


def unroll_off(sch: Schedule, name: str, loop: LoopRV) -> list[LoopRV]:
    """Unroll all iterations of a loop, or as many as the choice `name` says; the loops it becomes.

    Fewer make shorter code, but what the unrolled ones share is loaded again.
    """
    extent = extent_of(sch, loop)
    count = choose(sch, name, divisors(extent, extent)[-3:], extent)
    loops = [loop] if count == extent else list(sch.split(loop, [None, count]))
    sch.unroll(loops[-1])
    return loops


def dot_by_lanes(sch: Schedule, block: SBlockRV, accumulators: int, lanes: int) -> None:
    """Run dot products of contiguous operands in partial results by lane, as register tiles.

    `block` has the loops (row, column, reduced axis). Choices, by its name: `_lanes`, and `_tile`,
    the results of a tile, by default those that load least with at most `accumulators`.
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


def reduce_over_rows(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Reduce the outer of two loops (reduced, lane axis), `lanes` elements of the axis at once."""
    step, axis = sch.get_loops(block)[-2:]
    outer, lane = split_off(sch, axis, lanes)
    sch.reorder(outer, step, lane)
    sch.vectorize(lane)
    start = sch.decompose_reduction(block, step)
    sch.vectorize(sch.get_loops(start)[-1])


def parallelize(sch: Schedule, block: SBlockRV) -> None:
    """Give all loops around a block to threads as one."""
    sch.parallel(sch.fuse(*sch.get_loops(block)))
