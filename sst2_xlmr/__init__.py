"""Fine-tune XLM-R for text classification in plain PyTorch.

Importing the package checks Python and torch by their version numbers alone, before torch is loaded: torchtext's C++
library fails under another torch with an undefined symbol that nobody can act on.
"""

import sys
from importlib import metadata

TORCH_VERSION = "2.3.1"


def _unusable_stack() -> str:
    """Return why this Python or torch cannot run the package, or an empty string."""
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        found = "%d.%d" % sys.version_info[:2]
        return "Python %s cannot run this: torch %s exists for Python 3.9 to 3.12" % (found, TORCH_VERSION)
    for package, needed in (("torch", TORCH_VERSION), ("torchtext", "0.18.0"), ("torchdata", "0.9.0")):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return "%s is not installed in %s: run `pip install -e .` in the project's folder" % (
                package,
                sys.prefix,
            )
        if found.split("+")[0] != needed:
            return "%s %s is installed, but torchtext's C++ library loads only with torch %s: `pip install %s==%s`" % (
                package,
                found,
                TORCH_VERSION,
                package,
                needed,
            )
    return ""


if _unusable_stack():
    print("error: " + _unusable_stack(), file=sys.stderr)
    raise SystemExit(2)
