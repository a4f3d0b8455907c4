"""Fetch what a training run downloads, ahead of time: for compute nodes and machines without internet.

    python scripts/fetch.py [sst2] [xlmr.base] [xlmr.large] [--cache-dir DIR]

Copy the folder it names last to where training runs, and set SST2_XLMR_CACHE there to the copy.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from sst2_xlmr.cli import OneLineParser
from sst2_xlmr.util.downloads import BUNDLE_URLS, cache_dir, fetch_bundle, fetch_sst2

CHOICES = ("sst2", *BUNDLE_URLS)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description="Fetch data and encoders into the cache, for machines without internet.", allow_abbrev=False
    )
    what = f"{', '.join(CHOICES)} (default: sst2 xlmr.base)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=what)
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help=f"default: {cache_dir()}")
    arguments = parser.parse_args(argv)
    # With nargs="*", argparse before Python 3.12 holds the empty list against `choices`.
    for name in arguments.names:
        if name not in CHOICES:
            parser.error(f"argument NAME: invalid choice: {name!r} (choose from {', '.join(CHOICES)})")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.cache_dir is not None:
        os.environ["SST2_XLMR_CACHE"] = str(arguments.cache_dir.expanduser().resolve())
    # Without this, being terminated would leave a partial file behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name in arguments.names or ("sst2", "xlmr.base"):
        folder = fetch_sst2() if name == "sst2" else fetch_bundle(name)[0].parent
        print(f"{name}: {folder}", flush=True)
    print(f"elsewhere, set SST2_XLMR_CACHE to a copy of {cache_dir()}")
