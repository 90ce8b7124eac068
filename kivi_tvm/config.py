"""The one record that says what a KIVI cache is: shapes, bits, groups, window, dtype."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BITS = (2, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
DTYPES = ("float16", "bfloat16", "float32")
COMPUTE_MODES = ("auto", "float", "half", "int8x2", "int8")
INTEGER_MODES = ("int8x2", "int8")
MAX_INTEGER_BITS = 4  # products of four larger codes would not fit the byte instructions
WINDOWS = ("kivi", "exact")
WORD_BITS = 32
# How codes share words, and which way each compute mode reads them (`layout.PackOrder`).
PACK_ORDERS = ("plain", "bytes", "fragment")
PACK_ORDER_OF = {"float": "plain", "half": "fragment", "int8x2": "bytes", "int8": "bytes"}
MIN_PAGE_SIZE = 32
TILE_TOKENS = 64  # that a warp takes at once in mode "half"
PAGE_SIZE = 128
CHUNK_TOKENS = 256
SPLIT_TOKENS = 1024
EXTEND_TOKENS = 16
EXTEND_ROWS = 128


@dataclass(frozen=True, slots=True)
class KernelKey:
    """What a compiled module depends on; everything else is a run-time value.

    Two configurations with equal keys share one build: `num_kv_heads`, `residual_length`,
    batch, pages and softmax scale never enter the code (design section 4).
    """

    head_dim: int
    queries_per_kv: int
    key_bits: int
    value_bits: int
    key_group_size: int
    value_group_size: int
    page_size: int
    dtype: str
    pack_order: str
    compute: str
    rows_per_query: int = 1

    @property
    def key_codes_per_word(self) -> int:
        return WORD_BITS // self.key_bits

    @property
    def value_codes_per_word(self) -> int:
        return WORD_BITS // self.value_bits

    @property
    def rows(self) -> int:
        """Query rows that share one KV head: `M` heads of `rows_per_query` tokens each."""
        return self.queries_per_kv * self.rows_per_query

    @property
    def extend_rows(self) -> int:
        """New tokens whose queries one pass of `extend` takes: at most 16 and 128 query rows."""
        return max(1, min(EXTEND_TOKENS, EXTEND_ROWS // self.queries_per_kv))

    @property
    def chunk_tokens(self) -> int:
        """Packed tokens whose scores `attend` holds at once: whole pages, about 256 tokens.

        With the queries of several tokens the chunk is one page: their scores fill the same cache.
        """
        pages = CHUNK_TOKENS // self.page_size if self.rows_per_query == 1 else 1
        return self.page_size * max(1, pages)

    @property
    def split_tokens(self) -> int:
        """Packed tokens of one work item of `attend`.

        A constant, so that where a sequence is cut depends on nothing but its own length: a row
        gives the same bits in every batch and on any number of threads. It grows with the queries,
        so that partial results stay small beside the cache.
        """
        tokens = SPLIT_TOKENS * self.rows_per_query
        found = self.chunk_tokens * max(1, tokens // self.chunk_tokens)
        return found // TILE_TOKENS * TILE_TOKENS if self.compute == "half" else found

    @property
    def slug(self) -> str:
        """A name a person can read, one per key."""
        return (
            f"D{self.head_dim}-M{self.queries_per_kv}-k{self.key_bits}v{self.value_bits}"
            f"-g{self.key_group_size}x{self.value_group_size}-P{self.page_size}"
            f"-{self.dtype}-{self.pack_order}-{self.compute}"
            + (f"-n{self.rows_per_query}" if self.rows_per_query > 1 else "")
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KiviConfig:
    """Configuration of a KIVI cache (arXiv 2402.02750).

    Parameters
    ----------
    head_dim : int
        Channels per head, `D`: one of `HEAD_DIMS`.
    num_heads, num_kv_heads : int
        Query heads `H` and key/value heads `H_kv`; `H` must be a multiple of `H_kv`.
    key_bits, value_bits : int
        Bits per code, `b`: 2, 4 or 8, independently.
    group_size : int
        `G`: tokens per key group and channels per value group, unless given one by one.
    residual_length : int
        `R`: tokens kept in full precision; a multiple of the key group size.
    dtype : str
        Model dtype of q, k, v and the window: "float16", "bfloat16" or "float32".
    compute : str
        Compute mode of `attend`: "float" (float32 arithmetic), on CPUs "int8x2" (codes times the
        other operand as high and low int8: relative error below 1e-3) or "int8" (a single int8:
        about 3e-2, also with a peaked softmax; about 1e-1 where a few key channels are 10 to 100
        times as large as the others), for at most 4 bits, and slower than "float" where the
        processor has no dot product of bytes; on tensor cores "half" (the other operand as float16:
        at most 3e-3; in the window probabilities as `dtype`), for caches in 16 bits. "auto" is the
        fastest one whose error is at most a tenth of what quantization itself brings (a quarter
        with 2 bits and such channels): "int8" with keys or values of 2 bits, "int8x2" with 4,
        "half" where there are tensor cores, "float" for float32 caches. The manifest names the
        mode.
    key_group_size, value_group_size : int or None
        `G_k` (tokens) and `G_v` (channels, must divide `head_dim`); default `group_size`.
    page_size : int or None
        `P`: tokens per page, a multiple of 32 and of `G_k`; default 128. Smaller pages waste less
        memory at the end of a sequence; a head's part of a larger one is longer to read in a row.

    Raises
    ------
    TypeError
        A field has the wrong type.
    ValueError
        One or more fields break a rule; the message lists every one of them.

    Source: paper section 4 and Algorithm 1; group and window rules of its Table 4.
    """

    head_dim: int
    num_heads: int
    num_kv_heads: int
    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 32
    residual_length: int = 128
    dtype: str = "float16"
    compute: str = "auto"
    key_group_size: int | None = None
    value_group_size: int | None = None
    page_size: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _check_types(self) -> None:
        optional = ("key_group_size", "value_group_size", "page_size")
        for name in ("dtype", "compute"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"`{name}` must be a string, got {value!r}")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("dtype", "compute") or (name in optional and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r}")

    def _problems(self) -> list[str]:
        """Every rule that is broken, in words a user can act on."""
        found = []

        def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
            if value not in allowed:
                found.append(f"`{name}` must be one of {list(allowed)}, got {value!r}")

        one_of("head_dim", self.head_dim, HEAD_DIMS)
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                found.append(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads:
            found.append(
                f"`num_heads` must be a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        one_of("key_bits", self.key_bits, BITS)
        one_of("value_bits", self.value_bits, BITS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("compute", self.compute, COMPUTE_MODES)
        one_of("group_size", self.group_size, GROUP_SIZES)
        one_of("key_group_size", self.G_k, GROUP_SIZES)
        one_of("value_group_size", self.G_v, GROUP_SIZES)
        if self.compute in INTEGER_MODES:
            for name in ("key_bits", "value_bits"):
                if (bits := getattr(self, name)) > MAX_INTEGER_BITS:
                    found.append(
                        f"`{name}` must be at most {MAX_INTEGER_BITS} with "
                        f"compute={self.compute!r}, got {bits}"
                    )
        if self.compute == "half" and self.dtype == "float32":
            found.append("`dtype` must be 'float16' or 'bfloat16' with compute='half'")
        return found + self._divisibility_problems()

    def _divisibility_problems(self) -> list[str]:
        found = []
        if self.head_dim in HEAD_DIMS and self.G_v in GROUP_SIZES and self.head_dim % self.G_v:
            fits = [g for g in GROUP_SIZES if self.head_dim % g == 0]
            name = "group_size" if self.value_group_size is None else "value_group_size"
            hint = "" if name == "value_group_size" else ", as value_group_size if not for both"
            found.append(
                f"`{name}` must divide head_dim={self.head_dim}, got {self.G_v}; "
                f"use {' or '.join(map(str, fits))}{hint}"
            )
        if self.G_k in GROUP_SIZES and (
            self.residual_length < 1 or self.residual_length % self.G_k
        ):
            found.append(
                f"`residual_length` must be a positive multiple of the key group size {self.G_k}, "
                f"got {self.residual_length}"
            )
        if self.page_size is not None and self.G_k in GROUP_SIZES:
            unit = max(MIN_PAGE_SIZE, self.G_k)
            if self.page_size < 1 or self.page_size % unit:
                found.append(
                    f"`page_size` must be a positive multiple of {unit}, got {self.page_size}"
                )
        return found

    # The design's short names; every formula in the package uses these.
    @property
    def D(self) -> int:
        return self.head_dim

    @property
    def H(self) -> int:
        return self.num_heads

    @property
    def H_kv(self) -> int:
        return self.num_kv_heads

    @property
    def M(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def R(self) -> int:
        return self.residual_length

    @property
    def G_k(self) -> int:
        return self.group_size if self.key_group_size is None else self.key_group_size

    @property
    def G_v(self) -> int:
        return self.group_size if self.value_group_size is None else self.value_group_size

    @property
    def P(self) -> int:
        return PAGE_SIZE if self.page_size is None else self.page_size

    def compute_mode(self, byte_dot: bool = False, tensor_cores: bool = False) -> str:
        """The mode that `compute` is, where there are dot products of bytes or tensor cores.

        "auto" is one of integers with the former, for at most 4 bits, and "half" with the latter,
        unless the caches are float32: whoever asks for these wants the exact mode. A single int8
        has 0.4 to 5% of the error of 2-bit codes on the data of `kivi-tvm bench attention`, 0.4 to
        8% where only keys or values have 2 bits, and up to 25% of that of 4-bit codes.
        """
        if self.compute != "auto":
            return self.compute
        if self.dtype == "float32":
            return "float"
        if tensor_cores:
            return "half"
        if not byte_dot or max(self.key_bits, self.value_bits) > MAX_INTEGER_BITS:
            return "float"
        return "int8" if min(self.key_bits, self.value_bits) == 2 else "int8x2"

    def kernel_key(
        self, pack_order: str | None = None, byte_dot: bool = False, tensor_cores: bool = False
    ) -> KernelKey:
        """The part of this configuration that a compiled module depends on.

        `byte_dot` and `tensor_cores` as for `compute_mode`; `targets.kernel_key` knows them of a
        target. The pack order is that of the compute mode unless it is given.
        """
        mode = self.compute_mode(byte_dot, tensor_cores)
        return KernelKey(
            head_dim=self.D,
            queries_per_kv=self.M,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            key_group_size=self.G_k,
            value_group_size=self.G_v,
            page_size=self.P,
            dtype=self.dtype,
            pack_order=pack_order or PACK_ORDER_OF[mode],
            compute=mode,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `KiviConfig(**cfg.to_dict())` gives an equal configuration."""
        return asdict(self)
