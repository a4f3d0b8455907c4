"""Atomic downloads: torchtext's encoders and SST-2 into our cache, and models from the Hugging Face Hub.

huggingface_hub caches the latter: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN have their usual meaning.
"""

import contextlib
import errno
import http.client
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of, sync_files

# From torchtext 0.18: torchtext/models/roberta/bundler.py and torchtext/datasets/sst2.py.
_BUCKET = "https://download.pytorch.org/models/text"
_TOKENIZER_URL = f"{_BUCKET}/xlmr.sentencepiece.bpe.model"
BUNDLE_URLS = {name: (f"{_BUCKET}/{name}.encoder.pt", _TOKENIZER_URL) for name in ("xlmr.base", "xlmr.large")}
SST2_URL = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
SST2_MD5 = "9f81648d4199384278b86e315dac217c"
SST2_ROWS = {"train.tsv": 67_349, "dev.tsv": 872, "test.tsv": 1_821}
_FIX = "check the network and any proxy; without internet, run `sst2-xlmr fetch` elsewhere and copy the folder {}, or"
_FIX += " pass --data-dir / --encoder DIR"
RETRY_WAITS_S = (1.0, 3.0)
TIMEOUT_S = 30.0  # of a server's silence


def cache_dir() -> Path:
    """Return $SST2_XLMR_CACHE, $XDG_CACHE_HOME/sst2_xlmr, ~/.cache/sst2_xlmr, or else a private folder in /tmp."""
    variable = os.environ.get("SST2_XLMR_CACHE")
    path = Path(variable or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sst2_xlmr"))
    with contextlib.suppress(RuntimeError):  # no home folder: HOME unset and no passwd entry, as in containers
        return path.expanduser()
    folder = Path(tempfile.gettempdir(), f"sst2_xlmr-{os.getuid()}")
    if variable or not ensure_private(folder):
        raise UserError(f"no home folder for the cache {path}, nor a private {folder}; set SST2_XLMR_CACHE to a folder")
    return folder


def ensure_private(folder: Path) -> bool:
    """Create a folder unless it exists; returns whether only this user can write to it."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return False


def fetch_bundle(name: str) -> tuple[Path, Path]:
    """Fetch one of torchtext's encoders; returns the files of its weights (torch.save) and its SentencePiece model."""
    folder, files = cache_dir() / "encoders" / name, []
    for url in BUNDLE_URLS[name]:
        files.append(folder / Path(url).name)
        if not files[-1].exists():
            with _downloaded(url, folder) as part:
                part.replace(files[-1])
    return files[0], files[1]


def fetch_sst2() -> Path:
    """Return SST-2's folder, with train.tsv, dev.tsv and test.tsv; UserError if an existing one holds other files."""
    folder = cache_dir() / "SST-2"
    if not folder.exists():
        with _downloaded(SST2_URL, folder.parent) as archive:
            if (md5 := digest_of(archive, "md5")) != SST2_MD5:
                fix = _FIX.format(cache_dir())
                raise UserError(f"{SST2_URL} has MD5 {md5}, expected {SST2_MD5}, and was not kept; {fix}")
            extracted = archive.with_name("SST-2")
            extracted.mkdir()
            with zipfile.ZipFile(archive) as opened:
                for name in SST2_ROWS:
                    (extracted / name).write_bytes(opened.read(f"SST-2/{name}"))
            sync_files(extracted)
            with contextlib.suppress(OSError):  # another process has just done it
                extracted.rename(folder)
    for name, rows in SST2_ROWS.items():
        file = folder / name
        if not file.is_file() or len(file.read_bytes().splitlines()) != 1 + rows:
            fix = "move it away, or choose another cache with SST2_XLMR_CACHE (fetch: --cache-dir)"
            raise UserError(f"{folder} exists, but is not SST-2, whose {name} has {rows:,} rows; {fix}")
    return folder


@contextlib.contextmanager
def _downloaded(url: str, folder: Path) -> Iterator[Path]:
    """Download `url` into a temporary folder in `folder`, and yield the file; disk errors become a `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            part = Path(scratch, Path(url).name)
            _download(url, part)
            sync_files(part.parent)
            yield part
    except OSError as error:
        fix = "free space or make it writable, or set SST2_XLMR_CACHE to another folder"
        raise UserError(f"cannot use the cache {cache_dir()}: {error}; {fix}") from error


def _download(url: str, part: Path) -> None:
    """Download `url` to `part`, with retries; OSError if the disk is full, UserError if the server fails."""
    has_bar = sys.stderr.isatty()
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, part.open("wb") as file:
                length = int(response.headers.get("Content-Length", 0))
                if length > 1e6 and not has_bar:
                    print(f"downloading {url} ({length / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
                with tqdm.wrapattr(file, "write", total=length or None, disable=not has_bar) as target:
                    shutil.copyfileobj(response, target)
            if length not in (0, part.stat().st_size):
                raise ConnectionError(f"it broke off after {part.stat().st_size:,} of {length:,} bytes")
            with part.open("rb") as written:
                start = written.read(256).lstrip()
            # A login page has HTTP status 200; torch.save writes a zip file, or, in old versions, a pickle.
            if start[:1] in (b"", b"<") or (start.startswith(b"PK") and not zipfile.is_zipfile(part)):
                raise ConnectionError("it was empty, cut off or a web page, and was not kept")
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if wait_s is None or getattr(error, "code", 500) < 500:
                raise UserError(f"cannot fetch {url}: {error or repr(error)}; {_FIX.format(cache_dir())}") from error
            time.sleep(wait_s)


def fetch_folder(name: str, files: list[str]) -> Path:
    """Fetch those of `files` that a model on the Hub has, at its newest commit; returns the folder of that commit."""
    repository, _, revision = name.partition("@")
    with _library(name, quiet=True) as (hub, cache):
        return Path(hub.snapshot_download(repository, revision=revision or None, cache_dir=cache, allow_patterns=files))


def fetch_first(name: str, folder: Path, files: list[str], quiet: bool) -> Path | None:
    """Fetch the first of `files` that a model on the Hub has into its folder; None if it has none."""
    with _library(name, quiet) as (hub, cache):
        if not (quiet or sys.stderr.isatty() or hub.constants.HF_HUB_OFFLINE):
            print(f"downloading {name} from {hub.constants.ENDPOINT}", file=sys.stderr, flush=True)
        for file in files:
            try:
                return Path(hub.hf_hub_download(name.partition("@")[0], file, revision=folder.name, cache_dir=cache))
            except hub.utils.EntryNotFoundError as error:
                if isinstance(error, hub.utils.LocalEntryNotFoundError):  # there is no connection
                    raise
    return None


@contextlib.contextmanager
def _library(name: str, quiet: bool) -> Iterator[tuple[ModuleType, Path]]:
    """Yield huggingface_hub and its cache; any error becomes a `UserError`."""
    import huggingface_hub as hub  # here, as it takes half a second and few runs need it
    from huggingface_hub import constants, utils

    repository, _, revision = name.partition("@")
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # without a home folder it begins with ~
        cache = cache_dir() / "huggingface"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # no warnings about retries or faster packages
    hide_bars = quiet and not utils.are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if hide_bars:
        utils.disable_progress_bars()
    try:
        yield hub, cache
    except Exception as error:  # from the library, requests or httpx, or the disk
        root: BaseException = error  # e.g. "Connection refused", below several layers of libraries
        while inner := root.__cause__ or root.__context__:
            root = inner
        reason = (str(root).strip() or repr(root)).splitlines()[0]
        host = constants.ENDPOINT
        instead = f"or `sst2-xlmr fetch {name}` elsewhere, and HF_HUB_CACHE set to a copy of {cache}"
        problem = f"{name} is not a local folder, and cannot be downloaded from {host}: {reason}; try again; {instead}"
        if isinstance(error, utils.GatedRepoError):
            problem = f"{name} is gated; ask for access at {host}/{repository}, and set HF_TOKEN"
        elif isinstance(error, utils.RepositoryNotFoundError):
            problem = f"{name} is neither a folder nor a model at {host}; check it, or set HF_TOKEN if it is private"
        elif isinstance(error, utils.RevisionNotFoundError):
            problem = f"{repository} has no revision {revision} at {host}; check what follows @"
        elif constants.HF_HUB_OFFLINE:
            problem = f"{name} is neither a folder nor whole in {cache}; unset HF_HUB_OFFLINE; {instead}"
        raise UserError(problem) from error
    finally:
        log.setLevel(level)
        if hide_bars:
            utils.enable_progress_bars()
