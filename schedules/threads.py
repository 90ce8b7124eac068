"""Work-groups: how the blocks inside one are spread over its threads, warps of lanes.

Every block of a kernel takes all threads of its work-group, `threadIdx.y` warps of `threadIdx.x`
lanes; what passes between blocks lies in shared memory, unless the same thread writes and reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import For, IntImm, IterVar
from tvm.tirx.op import tvm_thread_invariant

from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.primitives import extent_of, largest_divisor, split_off
from kivi_tvm.targets import Hardware

WARPS = 4
FEW_WARPS = (
    2  # 1.2 to 1.5 times as fast on an H100 where threads do little more than load and store
)
WIDE_HEAD = 128  # channels, beyond which a thread has more to hold
WORDS = 4  # 32-bit words that a thread loads at once: 16 bytes


@dataclass(frozen=True, slots=True)
class WorkGroup:
    """`warps` warps of `lanes` threads."""

    warps: int
    lanes: int

    @property
    def threads(self) -> int:
        return self.warps * self.lanes


def work_group(sch: Schedule, hardware: Hardware, warps: int = WARPS) -> WorkGroup:
    """The work-group of a kernel, by the choice `warps`, by default of so many."""
    return WorkGroup(choose(sch, "warps", [2, 4, 8], warps), hardware.warp)


def over_groups(sch: Schedule, block: SBlockRV) -> None:
    """Give every iteration of the loops around a block to a work-group, as the last step.

    TVM is told that the condition of the block, if it has one, is the same for all threads of a
    work-group: without it there could be no barriers inside.
    """
    loop = sch.fuse(*sch.get_loops(block))
    sch.bind(loop, "blockIdx.x")
    nest, inside = sch.get(loop), sch.get(block)
    realize = nest.body
    if isinstance(realize.predicate, IntImm):
        return
    condition = tvm_thread_invariant(realize.predicate)
    body = SBlockRealize(realize.iter_values, condition, inside)
    changed = For(
        nest.loop_var, nest.min, nest.extent, nest.kind, body, nest.thread_binding,
        nest.annotations, nest.step,
    )  # fmt: skip
    sch.state.replace(sch.get_sref(loop), changed, {inside: inside})


def bind_threads(sch: Schedule, loop: LoopRV, group: WorkGroup) -> LoopRV:
    """Spread a loop over the threads of the work-group; the innermost loop that it becomes."""
    _, warp, lane = sch.split(loop, [None, group.warps, group.lanes])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    return lane


def over_threads(sch: Schedule, block: SBlockRV, group: WorkGroup) -> LoopRV:
    """Spread all iterations of an elementwise block; the innermost loop."""
    return bind_threads(sch, sch.fuse(*sch.get_loops(block)), group)


def over_last(sch: Schedule, block: SBlockRV, group: WorkGroup) -> LoopRV:
    """Spread the last axis alone, so that a thread meets the same elements in every block."""
    return bind_threads(sch, sch.get_loops(block)[-1], group)


def over_spatial(sch: Schedule, block: SBlockRV, group: WorkGroup) -> None:
    """Spread the results of a reduction, each of which a thread computes alone, in registers."""
    results = [sch.cache_write(block, i, "local") for i in range(len(sch.get(block).writes))]
    loops = sch.get_loops(block)
    bindings = zip(sch.get(block).iter_vars, sch.get(loops[-1]).body.iter_values, strict=True)
    summed = [x for axis, x in bindings if axis.iter_type == IterVar.CommReduce]
    spatial: list[LoopRV] = []
    reduced: list[LoopRV] = []
    for loop in loops:
        is_summed = any(map(sch.get(loop).loop_var.same_as, summed))
        (reduced if is_summed else spatial).append(loop)
    sch.reorder(*spatial, *reduced)
    result_loop = sch.fuse(*spatial)
    # A single one is computed by every thread: TVM would forget to store it from the first alone.
    single = extent_of(sch, result_loop) == 1
    thread = result_loop if single else bind_threads(sch, result_loop, group)
    for result in results:
        sch.reverse_compute_at(result, thread, preserve_unit_loops=True)


def over_tokens(sch: Schedule, block: SBlockRV, hardware: Hardware) -> None:
    """Give all loops of a kernel but the last, over channels, to work-groups."""
    *token, channel = sch.get_loops(block)
    bind_threads(sch, channel, work_group(sch, hardware, FEW_WARPS))
    sch.bind(sch.fuse(*token), "blockIdx.x")


def reduce_by_warps(sch: Schedule, block: SBlockRV, group: WorkGroup) -> None:
    """Reduce the last axis by the lanes of a warp, a row per warp.

    Rows that do not fill all warps are computed by each of them: they write the same. The sum of
    the lanes goes through registers: TVM would let one lane alone run every later block that has
    the result of such a reduction among what it reads, whatever threads that block has inside.
    """
    result = sch.cache_write(block, 0, "local")
    *rows, reduced = sch.get_loops(block)
    whole = [i for i, row in enumerate(rows) if extent_of(sch, row) % group.warps == 0]
    if whole:  # one axis, not all as one: TVM cannot tell what a thread needs of results otherwise
        last = whole[-1]
        _, rows[last] = sch.split(rows[last], [None, group.warps])
        sch.bind(rows[last], "threadIdx.y")
    _, lane = sch.split(reduced, [None, group.lanes])
    sch.bind(lane, "threadIdx.x")
    sch.reverse_compute_at(result, rows[-1])


def share(sch: Schedule, scope: str = "shared") -> None:
    """Put every buffer inside the kernel that has no scope yet in shared memory."""
    _place(sch, _blocks_in(sch, sch.get_sblock("root")), scope)


def _place(sch: Schedule, blocks: Sequence[SBlockRV], scope: str) -> None:
    """Give a scope to what blocks allocate, where it has none."""
    inside = [buffer for block in blocks for buffer in sch.get(block).alloc_buffers]
    for block in blocks:
        for index, region in enumerate(sch.get(block).writes):
            buffer = region.source
            if buffer.scope() == "global" and any(map(buffer.same_as, inside)):
                sch.set_scope(block, index, scope)


def _blocks_in(sch: Schedule, block: SBlockRV) -> list[SBlockRV]:
    inner = list(sch.get_child_blocks(block))
    return inner + [each for child in inner for each in _blocks_in(sch, child)]


def blocks_inside(sch: Schedule, block: SBlockRV) -> dict[str, SBlockRV]:
    """A block and all inside it by name, where a kernel has others of the same names."""
    return {str(sch.get(each).name_hint): each for each in (block, *_blocks_in(sch, block))}


def keep_local(sch: Schedule, name: str) -> None:
    """Let every thread compute a block for itself, into its registers."""
    sch.set_scope(sch.get_sblock(name), 0, "local")


def contract_by_threads(
    sch: Schedule, block: SBlockRV, words: SBlockRV, consumer: SBlockRV, group: WorkGroup
) -> None:
    """Run a contraction with codes, a thread `WORDS` neighbouring results of some words each.

    `block` has the loops (row, lane axis, word, slot), `words` loads the words (word, lane axis);
    `consumer` is elementwise over (row, lane axis) and spread already.
    """
    # 1. slices of the words, so that all threads have work
    _, lane_axis, word, _ = sch.get_loops(block)
    quads = extent_of(sch, lane_axis) // WORDS
    slices = largest_divisor(extent_of(sch, word), max(1, group.threads // quads))
    outer, _ = sch.split(word, [slices, None])
    partial = sch.rfactor(outer, factor_axis=0)
    # 2. a slice of four results per thread
    row, lane_axis, part, word, slot = sch.get_loops(partial)
    quad, lane = sch.split(lane_axis, [None, WORDS])
    sch.reorder(part, quad, word, slot, row, lane)
    thread = bind_threads(sch, sch.fuse(part, quad), group)
    written = sch.cache_write(partial, 0, "local")
    sch.reverse_compute_at(written, thread, preserve_unit_loops=True)
    # 3. words by loads of 16 bytes
    sch.compute_at(words, word, preserve_unit_loops=True)
    sch.set_scope(words, 0, "local")
    sch.vectorize(sch.get_loops(words)[-1])
    for loop in (slot, row, lane):
        sch.unroll(loop)
    sch.decompose_reduction(partial, word)
    # 4. slices summed where they are needed
    sch.compute_at(block, sch.get_loops(consumer)[-1], preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")


def keep_in_registers(sch: Schedule, block: SBlockRV) -> None:
    """Put what is computed inside the block of a warp in the registers of its lanes.

    The buffers have an axis of lanes, who read each other's elements by shuffles.
    """
    _place(sch, [block, *_blocks_in(sch, block)], "warp")


def by_lane(sch: Schedule, block: SBlockRV, elements: int = 1) -> None:
    """Give every lane of a warp its part of a block: the loop `lane`; `elements` as one vector."""
    loops = sch.get_loops(block)
    lane = next(each for each in loops if sch.get(each).loop_var.name == "lane")
    sch.bind(lane, "threadIdx.x")
    loops.remove(lane)
    if elements > 1:
        loops[-1], vector = split_off(sch, loops[-1], elements)
        sch.vectorize(vector)
    unroll(sch, loops)


def unroll(sch: Schedule, loops: Sequence[LoopRV]) -> None:
    """Unroll several loops."""
    for loop in loops:
        sch.unroll(loop)
