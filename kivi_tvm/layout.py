"""Memory layout: where each code sits, and the shape and size of every buffer of a cache.

This is the only module that knows the pack order. The reference, the operators and the
converters all ask it, with Python ints, torch tensors or TensorIR expressions alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kivi_tvm.config import PACK_ORDERS, TILE_TOKENS, WORD_BITS, KernelKey, KiviConfig

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint32": 4, "int32": 4}
STATE_FIELDS = ("length", "packed_keys", "packed_values", "reserved")
LENGTH, PACKED_KEYS, PACKED_VALUES = 0, 1, 2
NO_PAGE = -1
BYTE_BITS = 8
# In mode "half" a row that is not one of the shortest is cut into at most so many parts before its
# parts become longer.
SHORT_SPLITS = 8


@dataclass(frozen=True, slots=True)
class PackOrder:
    """How `W = codes_per_word` codes share a 32-bit word, low bits first.

    Element `i` of the packed axis (channels for keys, tokens for values) is in word `word(i)` at
    bits `shift(slot(i))`. In order "plain" a word holds `W` neighbours, as in the authors'
    `new_pack.py`. In order "bytes" the elements of every `span` (a head's channels, a page's
    tokens) go byte by byte: its first quarter into the first byte of all words of the span, the
    next one into the second byte. Four codes at the same place of a word's bytes are `span / 4`
    elements apart then, and so are the numbers that a dot product of bytes meets them with.

    In order "fragment" four words share `4 W` elements, dealt out in runs of `run`: the first run
    of every four goes into the first word, the next one into the second. Half of each run is in the
    low half of its word, so that two codes at one place of both halves are `run / 2` elements
    apart: a pair that one lane holds as an operand of `mma` (`ops/fragments.py`). With runs as long
    as words this is order "plain". In spans that are an odd number of times `2 W` elements, two
    words share these: the first has the first two runs of every four.
    """

    name: str
    bits: int
    span: int
    run: int = 0

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def code_mask(self) -> int:
        return (1 << self.bits) - 1

    def word(self, element: Any) -> Any:
        """Index of the word that holds `element`."""
        if self.name == "plain":
            return element // self.codes_per_word
        if self.name == "fragment":
            share, run = self.words_together, element // self.run % 4
            word = run if share == 4 else run // 2
            return element // (share * self.codes_per_word) * share + word
        inside = element % self.span % self._quarter // self._places
        return element // self.span * self._words + inside

    def slot(self, element: Any) -> Any:
        """Position of `element` within its word."""
        if self.name == "plain":
            return element % self.codes_per_word
        if self.name == "fragment":
            half, place = element % self.run // self._pairs, element % self._pairs
            runs = element % (self.words_together * self.codes_per_word) // (4 * self.run)
            if self.words_together == 2:
                runs = element // self.run % 2 * self._runs + runs
            return half * (self.codes_per_word // 2) + runs * self._pairs + place
        byte = element % self.span // self._quarter
        return byte * self._places + element % self._places

    def element(self, word: Any, slot: Any) -> Any:
        """The inverse of (`word`, `slot`)."""
        if self.name == "plain":
            return word * self.codes_per_word + slot
        if self.name == "fragment":
            half, inside = slot // (self.codes_per_word // 2), slot % (self.codes_per_word // 2)
            runs, place = inside // self._pairs, inside % self._pairs
            share, of_four = self.words_together, word % self.words_together
            if share == 2:
                runs, of_four = runs % self._runs, of_four * 2 + runs // self._runs
            first = word // share * share * self.codes_per_word + (runs * 4 + of_four) * self.run
            return first + half * self._pairs + place
        byte, place = slot // self._places, slot % self._places
        first = word // self._words * self.span + word % self._words * self._places
        return first + byte * self._quarter + place

    def shift(self, slot: Any) -> Any:
        """Bit offset of `slot` within its word."""
        return slot * self.bits

    @property
    def words_together(self) -> int:
        """Words that share their elements in order "fragment"."""
        whole = self.span % (4 * self.codes_per_word) == 0
        return 4 if whole or self.run == self.codes_per_word else 2

    @property
    def _pairs(self) -> int:
        """Half a run."""
        return self.run // 2

    @property
    def _runs(self) -> int:
        """Half of the runs in a word that has two of every four."""
        return self.codes_per_word // (2 * self.run)

    @property
    def _places(self) -> int:
        """Codes in a byte."""
        return BYTE_BITS // self.bits

    @property
    def _words(self) -> int:
        """Words of a span."""
        return self.span // self.codes_per_word

    @property
    def _quarter(self) -> int:
        return self.span // 4


def pack_order(name: str, bits: int, span: int, run: int = 0) -> PackOrder:
    """The pack order called `name` for codes of `bits` bits in spans of so many elements.

    `run` is for order "fragment" alone, a power of two of at most a word; default a word.

    Raises
    ------
    ValueError
        `name` is unknown, or a span is no whole number of words.
    """
    if name not in PACK_ORDERS:
        raise ValueError(f"`pack_order` must be one of {list(PACK_ORDERS)}, got {name!r}")
    if span % (WORD_BITS // bits):
        raise ValueError(f"`span` must be a multiple of {WORD_BITS // bits}, got {span}")
    if name != "fragment":
        return PackOrder(name, bits, span)
    return PackOrder(name, bits, span, run or WORD_BITS // bits)


def key_order(key: KernelKey) -> PackOrder:
    """How the channels of a head share words."""
    return pack_order(key.pack_order, key.key_bits, key.head_dim)


def value_order(key: KernelKey) -> PackOrder:
    """How the tokens of a page share words.

    In order "fragment" four runs are as long as a group of keys: the tokens of one `mma` have their
    keys' scale in common.
    """
    run = min(key.value_codes_per_word, key.key_group_size // 4)
    return pack_order(key.pack_order, key.value_bits, key.page_size, run)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Shape and dtype of one buffer."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * DTYPE_BYTES[self.dtype]


def page_buffers(cfg: KiviConfig, num_pages: int) -> dict[str, Buffer]:
    """One layer's page pool (design section 3): codes, scales and zeros of `num_pages` pages."""
    N, H_kv, D, P = num_pages, cfg.H_kv, cfg.D, cfg.P
    W_k, W_v = WORD_BITS // cfg.key_bits, WORD_BITS // cfg.value_bits
    key_stats = Buffer((N, H_kv, P // cfg.G_k, D), "float16")
    value_stats = Buffer((N, H_kv, D // cfg.G_v, P), "float16")
    return {
        "k_code": Buffer((N, H_kv, D // W_k, P), "uint32"),
        "k_scale": key_stats,
        "k_zero": key_stats,
        "v_code": Buffer((N, H_kv, P // W_v, D), "uint32"),
        "v_scale": value_stats,
        "v_zero": value_stats,
    }


# Axis of the tokens in one page `[H_kv, ..., ...]` of every page buffer.
TOKEN_AXES = {"k_code": 2, "k_scale": 1, "k_zero": 1, "v_code": 1, "v_scale": 2, "v_zero": 2}


def ring_size(cfg: KiviConfig, rollback: int = 0) -> int:
    """Slots of a ring, `R + E + 1`: the window, tokens that can be taken back, and one to spare.

    Without the spare one a new token would overwrite the value that leaves the window, and a
    decode that fails half-way could not be undone.
    """
    return cfg.R + rollback + 1


def ring_buffers(
    cfg: KiviConfig,
    num_slots: int,
    rollback: int = 0,
    window: str = "kivi",
    sink_tokens: int = 0,
) -> dict[str, Buffer]:
    """One layer's full-precision tokens of `num_slots` sequences.

    `k_ring` and `v_ring` hold the window; `k_exact` the same keys never dequantized, so that a
    flush can be taken back (with `rollback`, unless `window="exact"` keeps them anyway); `k_sink`
    and `v_sink` a row's first tokens.
    """
    ring = Buffer((num_slots, cfg.H_kv, ring_size(cfg, rollback), cfg.D), cfg.dtype)
    found = {"k_ring": ring, "v_ring": ring}
    if rollback and window == "kivi":
        found["k_exact"] = ring
    if sink_tokens:
        sink = Buffer((num_slots, cfg.H_kv, sink_tokens, cfg.D), cfg.dtype)
        found |= {"k_sink": sink, "v_sink": sink}
    return found


def num_pages(cfg: KiviConfig, packed_tokens: int) -> int:
    """Pages that hold `packed_tokens` tokens of one sequence."""
    return -(-packed_tokens // cfg.P)


def packed_keys(cfg: KiviConfig, length: int) -> int:
    """Keys held as codes after `length` tokens: whole blocks of R (paper Algorithm 1)."""
    return length - length % cfg.R


def packed_values(cfg: KiviConfig, length: int) -> int:
    """Values held as codes after `length` tokens: all but the last R (paper Algorithm 1)."""
    return max(0, length - cfg.R)


def split_tokens(
    key: KernelKey,
    packed: Any,
    most: Any,
    select: Callable[[Any, Any, Any], Any] = lambda holds, one, other: one if holds else other,
) -> Any:
    """Packed tokens of one work item of `attend`, of a row that has `packed` of them.

    Depends on the row's own length alone, so that a row gives the same bits in every batch. In mode
    "half" parts of short rows are a quarter or half of `most`: a row has too few otherwise for all
    of a GPU, and on longer ones small parts cost more than they bring. The shortest rows are one
    part: alone they have little to do, and in large batches there are enough of them.

    Parameters
    ----------
    key : KernelKey
    packed, most : int or TensorIR expression
        `most` is `key.split_tokens`, of the key of the function that attends.
    select : callable
        `select(holds, one, other)`, for expressions.
    """
    found = most
    for end, part in reversed(_short_rows(key, most)):
        found = select(packed <= end, part, found)
    return found


def _short_rows(key: KernelKey, most: Any) -> list[tuple[Any, Any]]:
    """Rows of how many packed tokens have other parts than `most`, and those parts, by length."""
    if key.compute != "half":
        return []
    half, quarter = (most // n // TILE_TOKENS * TILE_TOKENS for n in (2, 4))
    shorter = [(SHORT_SPLITS * part, part) for part in (quarter, half)]
    return [(most // 2, most), *shorter]  # `one_part_tokens`


def one_part_tokens(key: KernelKey) -> int:
    """Packed tokens that a row may have, in mode "half", and still be one part (`split_tokens`)."""
    return key.split_tokens // 2


def tokens_of_splits(key: KernelKey, splits: int, packed: int) -> int:
    """The packed tokens that a row of `packed` may grow to before it has more than `splits` splits.

    Where parts become longer it has fewer than a token before.
    """
    before, room = 0, splits * key.split_tokens
    for end, part in _short_rows(key, key.split_tokens):
        if packed <= end and splits * part < end:
            room = splits * part
            break
        before = end
    return max(before, room)
