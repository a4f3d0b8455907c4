"""Fine-tune XLM-R for text classification in plain PyTorch.

Importing the package checks Python and torch by their version numbers alone, before torch is loaded: torchtext's C++
library fails under another torch with an undefined symbol that nobody can act on.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import metadata

# torchtext announces, once per submodule, that its development has ended; its version is pinned for that reason.
warnings.filterwarnings("ignore", message=r"\s*/!\\ IMPORTANT WARNING ABOUT TORCHTEXT STATUS")

# Makes torch ask for large pages, since the optimizer walks through gigabytes; must be set before torch allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _unusable_stack() -> str:
    """Return why this Python or torch cannot run the package, or an empty string."""
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        python = ".".join(map(str, sys.version_info[:2]))
        return f"Python {python} cannot run this: torch 2.3.1 exists for Python 3.9 to 3.12"
    for package, needed in (("torch", "2.3.1"), ("torchtext", "0.18.0"), ("torchdata", "0.9.0")):
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed in {sys.prefix}: run `pip install -e .` in the project's folder"
        if installed.split("+")[0] != needed:
            reason = "torchtext's C++ library loads only with torch 2.3.1"
            return f"{package} {installed} is installed, but {reason}: run `pip install {package}=={needed}`"
    return ""


if problem := _unusable_stack():
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)
