"""Fetch what a training run downloads, ahead of time: for compute nodes and machines without internet.

sst2-xlmr fetch [sst2] [xlmr.base] [xlmr.large] [OWNER/NAME[@REVISION] ...] [--cache-dir DIR]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from sst2_xlmr.cli import OneLineParser
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, find_encoder, is_hub_id
from sst2_xlmr.util.downloads import cache_dir, fetch_sst2

CHOICES = ("sst2", *BUNDLE_SHAPES)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    epilog = "OWNER/NAME goes into the Hub's cache (see HF_HOME, HF_ENDPOINT, HF_TOKEN). Without internet, set"
    epilog += " SST2_XLMR_CACHE and HF_HUB_CACHE to copies of the folders named at the end, and HF_HUB_OFFLINE=1."
    parser = OneLineParser(description="Fetch data and encoders ahead of time.", epilog=epilog)
    ours = ", ".join(CHOICES)
    what = f"{ours}, or OWNER/NAME[@REVISION] of a model on the Hugging Face Hub (default: sst2 xlmr.base)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=what)
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help=f"for {ours} [{cache_dir()}]")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in CHOICES and not is_hub_id(name):
            parser.error(f"argument NAME: invalid choice: {name!r} (choose from {ours}, or OWNER/NAME)")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.cache_dir is not None:
        os.environ["SST2_XLMR_CACHE"] = str(arguments.cache_dir)
    # Without this, being terminated would leave a partial file behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    caches = {}
    for name in arguments.names or ("sst2", "xlmr.base"):
        folder = fetch_sst2() if name == "sst2" else find_encoder(name).weights_file.parent
        print(f"{name}: {folder}", flush=True)
        if name in CHOICES:
            caches["SST2_XLMR_CACHE"] = cache_dir()
        elif not Path(name).is_dir():
            caches["HF_HUB_CACHE"] = folder.parents[2]  # of models--OWNER--NAME/snapshots/COMMIT
    for variable, cache in caches.items():
        print(f"elsewhere, set {variable} to a copy of {cache}")
