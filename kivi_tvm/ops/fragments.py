"""Matrices as the lanes of a warp hold them: operands and results of `mma.m16n8k16`.

A register holds a pair of float16 or bfloat16 numbers (operands) or one float32 (results). With
`g = lane / 4` and `c = lane % 4`, PTX ISA 9.7.16.5.8 ("Matrix Fragments for mma.m16n8k16") gives

    A [16, 16]: register r holds row g + 8 (r % 2), columns 2 c + 8 (r / 2) + {0, 1}
    B [16, 8]:  register r holds rows 2 c + 8 r + {0, 1}, column g
    C [16, 8]:  register e holds row g + 8 (e / 2), column 2 c + e % 2

Codes are A, what they are multiplied with is B: rows of A are tokens (of keys) or channels (of
values), columns of B are queries. Which token or channel a row is, and which one a column of A, is
free as long as both operands agree; `HalfTile` chooses so that every lane finds what it needs in
the words that it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from kivi_tvm.config import TILE_TOKENS, KernelKey

LANES = 32
QUERIES = 8  # columns of B and C
ROWS, DEPTH = 16, 16  # of A
PAIR_BITS = 16
TOKENS = TILE_TOKENS
BYTE_BITS = 8
SPAN = 32  # channels of keys that four lanes load 16 bytes each of


class OutputRows:
    """How all channels of a head are dealt out to the rows of `mma` whose A are values.

    A lane takes `channels_apart` neighbouring channels: rows `g` of so many matrices.
    """

    __slots__ = ()
    channels_apart: int

    def block(self, product: Any) -> Any:
        """The block of channels of the `mma` number `product`."""
        return product // (self.channels_apart // 2)

    def place(self, product: Any, high: Any) -> Any:
        """Which of a lane's channels in the block is its row `g` (`high` 0) or `g + 8` (1)."""
        return product % (self.channels_apart // 2) * 2 + high

    def channel(self, product: Any, row: Any) -> Any:
        """The channel that is row 0 .. 15 of the `mma` number `product`."""
        first = self.block(product) * QUERIES * self.channels_apart
        return first + row % 8 * self.channels_apart + self.place(product, row // 8)


@dataclass(frozen=True, slots=True)
class HalfTile(OutputRows):
    """How `TOKENS` tokens and all channels of a head are dealt out to lanes and registers.

    Tokens come in matrices of 8 rows, `x = 0 .. 7`. Those of a *unit* have their values in four
    words of every channel, one per lane `c`, or of two pieces with 2 bits in two words of each, of
    which lanes take bytes; those of a *section* have their keys' scale in common
    as well. Row `n` of matrix `x` of a section is its token `n * rows_apart + x`, so that lane `g`
    reads its tokens of a section side by side.
    """

    key: KernelKey

    @property
    def unit_tokens(self) -> int:
        return 4 * self.key.value_codes_per_word

    @property
    def section_tokens(self) -> int:
        return min(self.key.key_group_size, self.unit_tokens)

    @property
    def rows_apart(self) -> int:
        """Tokens of a section per row of its matrices: matrices of a section."""
        return self.section_tokens // QUERIES

    @property
    def matrices(self) -> int:
        return TOKENS // QUERIES

    @property
    def units(self) -> int:
        return TOKENS // self.unit_tokens

    @property
    def sections(self) -> int:
        return TOKENS // self.section_tokens

    @property
    def pieces(self) -> int:
        """Parts of the tile of which each lies in one page."""
        return 1 if self.key.page_size % TOKENS == 0 else 2

    def token(self, matrix: Any, row: Any) -> Any:
        """The token of the tile that is a row of a matrix."""
        section, inside = matrix // self.rows_apart, matrix % self.rows_apart
        return section * self.section_tokens + row * self.rows_apart + inside

    @property
    def key_spans(self) -> int:
        """Groups of four words of a token's key, one per lane `c`; the last may be incomplete."""
        return -(-self.key.head_dim // (4 * self.key.key_codes_per_word))

    @property
    def key_pairs(self) -> int:
        """Pairs in a word of keys: registers' worth of `mma`."""
        return self.key.key_codes_per_word // 2

    @property
    def key_steps(self) -> int:
        """`mma` per word of keys."""
        return self.key_pairs // 2

    @property
    def value_pairs(self) -> int:
        return self.key.value_codes_per_word // 2

    @property
    def channels_apart(self) -> int:  # type: ignore[override]
        return 4 if self.key.value_group_size % 32 == 0 else 2

    @property
    def value_blocks(self) -> int:
        """Blocks of 8 lanes' channels."""
        return self.key.head_dim // (QUERIES * self.channels_apart)

    @property
    def value_rows(self) -> int:
        """`mma` that cover all channels: 16 rows each."""
        return self.key.head_dim // ROWS

    @property
    def value_groups(self) -> int:
        return self.key.head_dim // self.key.value_group_size


@dataclass(frozen=True, slots=True)
class FullTile(OutputRows):
    """How `ROWS` tokens in 16 bits and all channels of a head are dealt out, in their order.

    Keys: lane `(g, c)` takes tokens `g` and `g + 8`, and of every span of 32 channels the 8 from
    `8 c` on, which are those of two `mma`. Values: it takes tokens `2 c + {0, 1, 8, 9}`, and of
    every block `channels_apart` channels.
    """

    head_dim: int

    @property
    def key_spans(self) -> int:
        return -(-self.head_dim // SPAN)

    @property
    def value_rows(self) -> int:
        """`mma` that cover all channels: 16 rows each."""
        return self.head_dim // ROWS

    @property
    def channels_apart(self) -> int:  # type: ignore[override]
        return next(n for n in (8, 4, 2) if self.head_dim % (QUERIES * n) == 0)

    @property
    def value_blocks(self) -> int:
        return self.head_dim // (QUERIES * self.channels_apart)


def position(bits: int, pair: Any) -> tuple[Any, Any]:
    """Where the codes of a pair are: in which byte of each half word, and at which of its bits."""
    return bits * pair // BYTE_BITS, bits * pair % BYTE_BITS


def code_pair(word: Any, bits: int, pair: Any) -> Any:
    """A pair of codes out of a word as float16 numbers `code * 2^(at - 24)`: subnormal, exact.

    `at` is the second part of `position`; whoever multiplies it has `2^-at` in its operand.
    """
    byte, at = position(bits, pair)
    mask = T.shift_left(T.uint32(((1 << bits) - 1) * 0x10001), T.Cast("uint32", at))
    return T.shift_right(word, T.Cast("uint32", byte * BYTE_BITS)) & mask


CODE_UNIT = 2.0**24  # what a product with codes as `code_pair` gives them lacks


def half_of(pair: Any, number: Any, dtype: str = "float16") -> Any:
    """The number 0 (low bits) or 1 of a pair, as float32."""
    bits = T.Cast("uint16", T.shift_right(pair, T.Cast("uint32", number * PAIR_BITS)))
    return T.Cast("float32", T.reinterpret(dtype, bits))


def pair_of(low: Any, high: Any) -> Any:
    """Two float16 or bfloat16 numbers as a pair, uint32."""
    low, high = (T.Cast("uint32", T.reinterpret("uint16", x)) for x in (low, high))
    return low | T.shift_left(high, T.uint32(PAIR_BITS))


def rounded_pair(low: Any, high: Any, dtype: str = "float16") -> Any:
    """Two float32 numbers as a pair."""
    return pair_of(T.Cast(dtype, low), T.Cast(dtype, high))


def pair_product(a: Any, b: Any) -> Any:
    """The products of two pairs, each rounded to float16."""
    return T.reinterpret("uint32", T.reinterpret("float16x2", a) * T.reinterpret("float16x2", b))


def power_pair(exponent: Any) -> Any:
    """A pair of `2^exponent`, normal float16 numbers."""
    return T.shift_left(T.Cast("uint32", 15 + exponent), T.uint32(10)) * T.uint32(0x10001)


def a_lane(row: Any, column: Any) -> Any:
    """The lane that holds an element of A."""
    return row % 8 * 4 + column % 8 // 2


def a_register(row: Any, column: Any) -> Any:
    """Its register there."""
    return row // 8 + column // 8 * 2


def b_lane(row: Any, column: Any) -> Any:
    """The lane that holds an element of B."""
    return column * 4 + row % 8 // 2


def b_register(row: Any) -> Any:
    """Its register there."""
    return row // 8


def c_lane(row: Any, column: Any) -> Any:
    """The lane that holds an element of C."""
    return row % 8 * 4 + column // 2


def c_register(row: Any, column: Any) -> Any:
    """Its register there."""
    return row // 8 * 2 + column % 2


def product(a: Any, b: Any, row: Any, column: Any, depth: Any, dtype: str = "float16") -> Any:
    """One product of `mma`; `a` and `b` give the register of a lane by (lane, number)."""
    return half_of(a(a_lane(row, depth), a_register(row, depth)), depth % 2, dtype) * half_of(
        b(b_lane(depth, column), b_register(depth)), depth % 2, dtype
    )


def transposed_pair(c: Any, lane: Any) -> Any:
    """What a lane holds of the transpose of a matrix of float16, 8 lanes `g` by 4 pairs."""
    low, high = (c((lane % 4 * 2 + i) * 4 + lane // 8) for i in (0, 1))
    shift = T.Cast("uint32", lane // 4 % 2 * PAIR_BITS)
    low, high = (T.shift_right(x, shift) & T.uint32(0xFFFF) for x in (low, high))
    return low | T.shift_left(high, T.uint32(PAIR_BITS))
