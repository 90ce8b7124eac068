"""`python -m kivi_tvm`."""

from __future__ import annotations

import sys

from kivi_tvm.cli import main

sys.exit(main())
