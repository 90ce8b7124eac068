"""The compiled configurations cover what they say they cover."""

from configurations import (
    AXES,
    CONFIGS,
    FEW,
    POINTS,
    WAIVED,
    config_id,
    grid,
    pairs_of_all,
)

from kivi_tvm.config import DTYPES


def test_every_valid_pair_but_the_waived_is_covered_by_24():
    assert len(POINTS) == len(set(POINTS)) <= 24
    missing = pairs_of_all(grid()) - pairs_of_all(POINTS)
    assert {(a, b) for a, b, _, _ in missing} <= WAIVED
    assert len(missing) == 20


def test_every_value_is_covered():
    for axis, values in AXES.items():
        assert {getattr(point, axis) for point in POINTS} == set(values)


def test_configurations_are_the_points():
    keys = [cfg.kernel_key() for cfg in CONFIGS]
    assert len(set(keys)) == len(POINTS)
    for key, point in zip(keys, POINTS, strict=True):
        assert (key.head_dim, key.queries_per_kv) == (point.head_dim, point.queries_per_kv)
        assert key.page_size % key.key_group_size == 0


def test_few_have_each_dtype_and_ids_are_unique():
    assert {cfg.dtype for cfg in FEW} == set(DTYPES)
    assert len(set(map(config_id, CONFIGS))) == len(CONFIGS)
