"""Models of the Hugging Face Hub, through huggingface_hub.

HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN have their usual meaning. A model is named owner/name or
owner/name@revision; its folder in the Hub's cache has the name of the commit.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sst2_xlmr.util.downloads import cache_dir
from sst2_xlmr.util.errors import UserError


def fetch_folder(name: str, files: list[str]) -> Path:
    """Fetch those of `files` that a model has, at its newest commit unless offline; returns their folder.

    Raises:
        UserError: if there is no such model, or it cannot or must not be fetched.
    """
    repository, _, revision = name.partition("@")
    with _library(name, quiet=True) as (hub, cache):
        return Path(hub.snapshot_download(repository, revision=revision or None, cache_dir=cache, allow_patterns=files))


def fetch_first(name: str, folder: Path, files: list[str], *, quiet: bool = True) -> Path | None:
    """Return the first of `files` that a model has; it is fetched into its folder, unless one of them is there.

    Raises:
        UserError: if it cannot be fetched.
    """
    for file in files:
        if (folder / file).exists():
            return folder / file
    with _library(name, quiet) as (hub, cache):
        if not (quiet or sys.stderr.isatty() or hub.constants.HF_HUB_OFFLINE):
            print(f"downloading {name} from {hub.constants.ENDPOINT}", file=sys.stderr, flush=True)
        for file in files:
            try:
                return Path(hub.hf_hub_download(name.partition("@")[0], file, revision=folder.name, cache_dir=cache))
            except hub.utils.LocalEntryNotFoundError:
                raise
            except hub.utils.EntryNotFoundError:
                continue
    return None


@contextlib.contextmanager
def _library(name: str, quiet: bool) -> Iterator[tuple[ModuleType, Path]]:
    """Yield huggingface_hub and its cache; whatever goes wrong with the model becomes a `UserError`."""
    import huggingface_hub as hub  # takes half a second, which few runs need
    from huggingface_hub import constants, utils

    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # without a home folder it begins with ~
        cache = cache_dir() / "huggingface"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of its own further tries, and of packages that would be faster
    hide_bars = quiet and not utils.are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if hide_bars:
        utils.disable_progress_bars()
    try:
        yield hub, cache
    except Exception as error:  # the library's, those of requests or httpx, and the disk's
        repository, _, revision = name.partition("@")
        root: BaseException = error  # "Connection refused", under several layers of libraries
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        reason = (str(root).strip() or repr(root)).splitlines()[0]
        host = constants.ENDPOINT
        elsewhere = f"or `sst2-xlmr fetch {name}` elsewhere, and HF_HUB_CACHE set to a copy of {cache}"
        if isinstance(error, utils.GatedRepoError):
            problem = f"{name} is gated; ask for access at {host}/{repository}, and set HF_TOKEN"
        elif isinstance(error, utils.RepositoryNotFoundError):
            problem = f"{name} is neither a folder nor a model at {host}; check it, or set HF_TOKEN if it is private"
        elif isinstance(error, utils.RevisionNotFoundError):
            problem = f"{repository} has no revision {revision} at {host}; check what follows @"
        elif constants.HF_HUB_OFFLINE:
            problem = f"{name} is neither a folder nor whole in {cache}; unset HF_HUB_OFFLINE; {elsewhere}"
        else:
            problem = f"{name} is no folder, and cannot be fetched from {host}: {reason}; try again; {elsewhere}"
        raise UserError(problem) from error
    finally:
        log.setLevel(level)
        if hide_bars:
            utils.enable_progress_bars()
