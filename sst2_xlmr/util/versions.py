"""The installed stack, torch with torchtext or torch alone; only training/optimizer.py checks it, too.

torchtext's last release, 0.18, loads its C++ library only under torch 2.3. It is needed only for the TorchScript
export, for its SentencePiece operator. Only version numbers are read: loading might fail with an undefined symbol.
"""

import platform
import re
from importlib import metadata

OLDEST_TORCH = "2.3.1"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 3, 1) for 2.3.1+cu121."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


def unusable() -> str:
    """Return why the installed packages cannot run this one, in one line; an empty string if they can."""
    torch = _installed("torch") or OLDEST_TORCH
    if _numbers(torch) >= _numbers(OLDEST_TORCH):
        return ""
    fix = "run `pip install -U torch`, or set up an environment with scripts/setup.sh"
    return f"torch {torch} is installed, but {OLDEST_TORCH} or newer is needed: {fix}"


def has_torchtext() -> bool:
    """Whether torchtext is installed and loads under this torch."""
    torch, torchtext = (_numbers(_installed(package) or "") for package in ("torch", "torchtext"))
    return torch[:2] == (2, 3) and torchtext[:2] == (0, 18)


def versions() -> str:
    """Return the versions of Python and of the packages that a result may depend on."""
    packages = ["torch", *["torchtext"] * has_torchtext(), "numpy", "safetensors", "sentencepiece"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_installed(name)}" for name in packages)])
