"""Fetch what a training run downloads, ahead of time: for compute nodes and machines without internet."""

import os
import signal
import sys
from pathlib import Path

from sst2_xlmr.model.encoders import find_encoder, is_hub_id
from sst2_xlmr.programs import options
from sst2_xlmr.util.downloads import cache_dir, fetch_sst2
from sst2_xlmr.util.errors import UserError


def main(argv: list[str] | None = None) -> None:
    arguments = options.parse("fetch", argv)
    for name in arguments.names:
        if name not in options.FETCHED and not is_hub_id(name):
            ours = ", ".join(options.FETCHED)
            raise UserError(f"argument NAME: invalid choice: {name!r} (choose from {ours} or OWNER/NAME); see --help")
    if arguments.cache_dir is not None:
        os.environ["SST2_XLMR_CACHE"] = str(arguments.cache_dir)
    # So that SIGTERM leaves no partial file behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    caches: dict[str, object] = {}
    for name in arguments.names or ("sst2", "xlmr.base"):
        folder = fetch_sst2() if name == "sst2" else find_encoder(name).weights_file.parent
        print(f"{name}: {folder}", flush=True)
        if name in options.FETCHED:
            caches["SST2_XLMR_CACHE"] = cache_dir()
        elif not Path(name).is_dir():
            # The parent of models--OWNER--NAME/snapshots/COMMIT.
            caches["HF_HUB_CACHE"] = f"{folder.parents[2]} and HF_HUB_OFFLINE=1"
    for variable, cache in caches.items():
        print(f"on another machine, set {variable} to a copy of {cache}")
