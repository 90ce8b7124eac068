"""Compile the kernels that gpu_steps.py and gpu_decode.py measure, which they find then.

    python tools/gpu_build.py

needs torch with CUDA, transformers and nvcc.
"""

from __future__ import annotations

from itertools import chain


def main() -> None:
    """Compile them side by side."""
    import gpu_decode  # not in the processes that compile, which import this file
    import gpu_steps

    gpu_steps.build_all(chain(gpu_steps.configs(), gpu_decode.configs()))


if __name__ == "__main__":
    main()
