"""Compile the kernels that tests, gpu_steps.py and gpu_decode.py run, which they find then.

    python tools/gpu_build.py

needs torch with CUDA, transformers, pytest and nvcc.
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def main() -> None:
    """Compile them side by side."""
    # not in the processes that compile, which import this file
    sys.path.insert(0, str(TESTS))
    import configurations  # type: ignore[import-not-found]
    import gpu_decode
    import gpu_steps

    tested = (*configurations.CONFIGS, *configurations.HALF)
    gpu_steps.build_all(chain(tested, gpu_steps.configs(), gpu_decode.configs()))


if __name__ == "__main__":
    main()
