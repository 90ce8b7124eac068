"""The examples in docstrings, the design's worked example among them."""

import doctest

import pytest

from kivi_tvm import config, layout, workloads
from kivi_tvm.reference import formulas


@pytest.mark.parametrize("module", [config, layout, formulas, workloads], ids=lambda m: m.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or module is not formulas
