"""A configuration states its rules: every one that is broken is named with its value."""

from dataclasses import FrozenInstanceError, replace

import pytest
from configurations import CONFIGS

from kivi_tvm import KiviConfig
from kivi_tvm.config import CHUNK_TOKENS, HEAD_DIMS, SPLIT_TOKENS, TILE_TOKENS

GOOD = {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8}


def message(kind, **change):
    with pytest.raises(kind) as error:
        KiviConfig(**{**GOOD, **change})
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 100}, ["`head_dim`", "one of", "100"]),
        ({"num_heads": 0}, ["`num_heads`", "at least 1", "0"]),
        ({"num_kv_heads": -8}, ["`num_kv_heads`", "at least 1", "-8"]),
        ({"num_heads": 30}, ["`num_heads`", "multiple of num_kv_heads=8", "30"]),
        ({"key_bits": 3}, ["`key_bits`", "[2, 4, 8]", "3"]),
        ({"value_bits": 16}, ["`value_bits`", "[2, 4, 8]", "16"]),
        ({"group_size": 48}, ["`group_size`", "[16, 32, 64, 128]", "48"]),
        ({"key_group_size": 8}, ["`key_group_size`", "8"]),
        ({"value_group_size": 256}, ["`value_group_size`", "256"]),
        ({"residual_length": 100}, ["`residual_length`", "multiple", "32", "100"]),
        ({"residual_length": 0}, ["`residual_length`", "positive", "0"]),
        ({"page_size": 48}, ["`page_size`", "multiple of 32", "48"]),
        ({"page_size": 64, "group_size": 128}, ["`page_size`", "multiple of 128", "64"]),
        ({"dtype": "float8"}, ["`dtype`", "'float16', 'bfloat16', 'float32'", "'float8'"]),
        ({"compute": "int4"}, ["`compute`", "'float'", "'int8x2'", "'int8'", "'int4'"]),
        ({"compute": "int8", "key_bits": 8}, ["`key_bits`", "at most 4", "'int8'", "8"]),
        ({"compute": "int8x2", "value_bits": 8}, ["`value_bits`", "at most 4", "'int8x2'", "8"]),
        ({"head_dim": 80}, ["`group_size`", "head_dim=80", "32", "use 16", "value_group_size"]),
        ({"head_dim": 96, "value_group_size": 64}, ["`value_group_size`", "64", "use 16 or 32"]),
    ],
    ids=str,
)
def test_a_broken_rule(change, words):
    found = message(ValueError, **change)
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 128.0}, ["`head_dim`", "int", "128.0"]),
        ({"num_heads": True}, ["`num_heads`", "int", "True"]),
        ({"key_bits": None}, ["`key_bits`", "int", "None"]),
        ({"page_size": "64"}, ["`page_size`", "int", "'64'"]),
        ({"dtype": 16}, ["`dtype`", "string", "16"]),
    ],
    ids=str,
)
def test_a_wrong_type(change, words):
    found = message(TypeError, **change)
    for word in words:
        assert word in found


def test_all_broken_rules_are_listed():
    found = message(ValueError, head_dim=1, num_heads=9, key_bits=5, dtype="x", residual_length=7)
    for name in ("head_dim", "num_heads", "key_bits", "dtype", "residual_length"):
        assert f"`{name}`" in found


def test_the_advice_is_valid():
    """What the error for D=80 tells the user to do works."""
    cfg = KiviConfig(80, 8, 8, value_group_size=16)
    assert (cfg.G_k, cfg.G_v) == (32, 16)


def test_defaults_and_short_names():
    cfg = KiviConfig(**GOOD)
    assert (cfg.D, cfg.H, cfg.H_kv, cfg.M) == (128, 32, 8, 4)
    assert (cfg.G_k, cfg.G_v, cfg.R, cfg.P) == (32, 32, 128, 128)
    assert KiviConfig(**GOOD, page_size=64).P == 64
    assert KiviConfig(64, 71, 1).M == 71


def test_auto_is_a_mode_by_what_the_processor_can_and_the_cache_is():
    cfg = KiviConfig(**GOOD)
    assert (cfg.compute_mode(), cfg.compute_mode(byte_dot=True)) == ("float", "int8")
    assert replace(cfg, value_bits=4).compute_mode(byte_dot=True) == "int8"
    assert replace(cfg, key_bits=4, value_bits=4).compute_mode(byte_dot=True) == "int8x2"
    assert replace(cfg, dtype="float32").compute_mode(byte_dot=True) == "float"
    assert replace(cfg, value_bits=8).compute_mode(byte_dot=True) == "float"
    for mode in ("float", "int8x2", "int8"):
        assert replace(cfg, compute=mode, dtype="float32").compute_mode(byte_dot=True) == mode
    assert cfg.kernel_key(byte_dot=True) == replace(cfg, compute="int8").kernel_key()


def test_auto_takes_tensor_cores_where_they_serve():
    cfg = KiviConfig(**GOOD)
    assert cfg.compute_mode(tensor_cores=True) == "half"
    assert replace(cfg, key_bits=8, dtype="bfloat16").compute_mode(tensor_cores=True) == "half"
    assert replace(cfg, page_size=96).compute_mode(tensor_cores=True) == "half"
    assert replace(cfg, dtype="float32").compute_mode(tensor_cores=True) == "float"
    key = replace(cfg, compute="half").kernel_key()
    assert cfg.kernel_key(tensor_cores=True) == key and key.pack_order == "fragment"


def test_tensor_cores_do_not_serve_float32():
    with pytest.raises(ValueError, match=r"`dtype` must be .* with compute='half'"):
        KiviConfig(**GOOD, dtype="float32", compute="half")


@pytest.mark.parametrize("page_size", [32, 96, 128, 160, 288, 1056])
def test_parts_in_mode_half_are_whole_tiles(page_size):
    key = KiviConfig(**GOOD, page_size=page_size, compute="half").kernel_key()
    assert 0 < key.split_tokens == key.split_tokens // TILE_TOKENS * TILE_TOKENS


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_a_group_size(head_dim):
    KiviConfig(head_dim, 4, 2, value_group_size=16)


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.kernel_key().slug)
def test_keys_of_every_configuration(cfg):
    assert KiviConfig(**cfg.to_dict()) == cfg
    key = cfg.kernel_key()
    assert key.chunk_tokens % key.page_size == 0 == key.split_tokens % key.chunk_tokens
    assert min(CHUNK_TOKENS, key.page_size) <= key.chunk_tokens
    assert key.chunk_tokens <= max(CHUNK_TOKENS, key.page_size)
    assert key.split_tokens <= max(SPLIT_TOKENS, key.chunk_tokens)


def test_run_time_values_do_not_enter_the_key():
    """Tensor-parallel shards and other windows share a build."""
    key = KiviConfig(**GOOD).kernel_key()
    assert KiviConfig(128, 8, 2, residual_length=64).kernel_key() == key
    for change in ({"key_bits": 4}, {"group_size": 64}, {"dtype": "float32"}, {"page_size": 64}):
        assert KiviConfig(**GOOD, **change).kernel_key() != key


def test_a_configuration_cannot_change():
    with pytest.raises(FrozenInstanceError):
        KiviConfig(**GOOD).head_dim = 64
