"""What is checked of a call's tensors; that errors say it is tested in `test_bad_input.py`."""

import pytest
import torch

from kivi_tvm.runtime.checks import LINE_BYTES, in_lines


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_begin_at_lines(dtype):
    wide = torch.randn(3, 4, 72).to(dtype)
    line = LINE_BYTES // wide.element_size()
    for x in (wide, wide[:, :, :64], wide[:, 1:, 8:], wide[:1].expand(3, 4, 72)):
        assert in_lines(x) is x
    odd = torch.randn(3, 3, 65).to(dtype)
    for x in (wide[:, :, 1:65], odd[:, :, :64], odd[:, :1, :64], odd.view(-1)[line + 1 :]):
        found = in_lines(x)
        assert found is not x and torch.equal(found, x)
        assert in_lines(found) is found
    alone = odd.as_strided((1, 1, 64), (7, 5, 1))  # steps that are never taken
    assert in_lines(alone) is alone
