"""The examples in docstrings, the design's worked example among them."""

import doctest

import pytest

from kivi_tvm import config, layout, reference, workloads


@pytest.mark.parametrize("module", [config, layout, reference, workloads], ids=lambda m: m.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or module is not reference
