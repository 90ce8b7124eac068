"""The page that tools/cuda_page.py writes."""

from pathlib import Path

from kivi_tvm.ops import ALL_FUNCTIONS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cuda-kernels.md").read_text()


def test_the_page_says_how_it_is_made():
    command = "python tools/cuda_page.py"
    assert command in PAGE and command in (ROOT / "tools" / "cuda_page.py").read_text()


def test_every_kernel_and_architecture_is_there():
    for name in ALL_FUNCTIONS:
        assert f"\n| `{name}` |" in PAGE
    for architecture in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert f" {architecture} |" in PAGE
