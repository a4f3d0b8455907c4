"""Fine-tune XLM-R for text classification in plain PyTorch.

Importing the package refuses, in one line, a Python or torch that cannot run it.
"""

from __future__ import annotations

import os
import sys

from sst2_xlmr.util import versions

# Makes torch ask for large pages, since the optimizer walks through gigabytes; must be set before torch allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if problem := versions.unusable():
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)
