"""Where files come from: download, verify, cache.

A file gets its final name in the cache only when it is whole: it is streamed to a temporary name, its length (and
digest, where one is known) is checked, then it is renamed. Several processes may ask at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of

# The addresses of torchtext 0.18: torchtext/models/roberta/bundler.py and torchtext/datasets/sst2.py.
_BUCKET = "https://download.pytorch.org/models/text"
BUNDLE_URLS = {
    name: (f"{_BUCKET}/{name}.encoder.pt", f"{_BUCKET}/xlmr.sentencepiece.bpe.model")
    for name in ("xlmr.base", "xlmr.large")
}
SST2_URL = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
SST2_MD5 = "9f81648d4199384278b86e315dac217c"
SST2_FILES = ("train.tsv", "dev.tsv", "test.tsv")
RETRY_WAITS_S = (1.0, 3.0)
_CURE = "check SST2_XLMR_MIRROR and any proxy, or pass --data-dir / --encoder DIR"


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Raise ConnectionError for errors that may be temporary, UserError for others."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        kind = ConnectionError if error.code >= 500 else UserError
        raise kind(f"{url} answered HTTP {error.code} {error.reason}; {_CURE}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        host = url.partition("//")[2].partition("/")[0] or url
        offline = f"without internet, run scripts/fetch.py elsewhere and copy the folder {cache_dir()}"
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"cannot reach {host}: {reason}; {offline}, or {_CURE}") from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    # Network errors never get here: `download` turns them into UserErrors.
    try:
        yield
    except OSError as error:
        cure = "free space or make it writable, or set SST2_XLMR_CACHE to another folder"
        raise UserError(f"cannot use the cache {cache_dir()}: {error}; {cure}") from error


def cache_dir() -> Path:
    """Return $SST2_XLMR_CACHE, else $XDG_CACHE_HOME/sst2_xlmr, else ~/.cache/sst2_xlmr."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sst2_xlmr")
    return Path(os.environ.get("SST2_XLMR_CACHE") or default).expanduser()


def mirrored(url: str) -> str:
    """Return `url`, or its last path component under the base URL $SST2_XLMR_MIRROR if that is set."""
    mirror = os.environ.get("SST2_XLMR_MIRROR")
    return f"{mirror.rstrip('/')}/{url.rpartition('/')[2]}" if mirror else url


@_disk_errors()
def download(
    url: str,
    target: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    timeout_s: float = 30,
    quiet: bool = False,
) -> Path:
    """Fetch `url` into `target` unless it is there; record url, bytes and sha256 in `NAME.json` beside it.

    A file that is there must have the recorded size and any digest asked for, or it is fetched again. The
    recorded sha256 is trusted, because hashing a gigabyte is slow; a copy without a record is accepted.

    Args:
        timeout_s: longest silence of the server, in seconds.

    Raises:
        UserError: if the server is not reached in three tries, refuses, or sends something unexpected; or if the folder
            cannot be written.
    """
    expected = {kind: value.lower() for kind, value in (("md5", md5), ("sha256", sha256)) if value}
    if _is_good(target, expected):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                # The previous owner of the lock has probably fetched it.
                if not _is_good(target, expected):
                    _download_once(url, target, expected, timeout_s, quiet)
                break
            except ConnectionError as error:
                if wait_s is None:
                    raise UserError(str(error)) from error
                time.sleep(wait_s)
    return target


@_disk_errors()
def fetch_bundle(name: str, *, quiet: bool = False) -> tuple[Path, Path]:
    """Fetch one of torchtext's encoders; returns its weights (from torch.save) and its SentencePiece model."""
    folder = cache_dir() / "encoders" / name
    urls = BUNDLE_URLS[name]
    weights, model = (download(mirrored(url), folder / Path(url).name, quiet=quiet) for url in urls)
    # Login pages and proxies answer with HTML and status 200; torch.save writes a zip, or once wrote a pickle.
    with weights.open("rb") as file:
        is_weights = file.read(2) == b"\x80\x02" or zipfile.is_zipfile(weights)
    is_page = model.read_bytes()[:256].lstrip().lower().startswith((b"<html", b"<!doctype"))
    for path, bad in ((weights, not is_weights), (model, is_page)):
        if bad:
            path.unlink(missing_ok=True)
            _record_path(path).unlink(missing_ok=True)
            raise UserError(f"{path} was a web page or damaged, and was removed; {_CURE}")
    return weights, model


@_disk_errors()
def fetch_sst2(*, quiet: bool = False, md5: str | None = SST2_MD5) -> Path:
    """Return a folder with train.tsv, dev.tsv and test.tsv; once they are extracted, no zip is needed."""
    folder = cache_dir() / "SST-2"
    if not _is_extracted(folder):
        archive = download(mirrored(SST2_URL), folder.with_name("SST-2.zip"), md5=md5, quiet=quiet)
        with _locked(folder):
            if not _is_extracted(folder):
                _extract(archive, folder)
    return folder


def _download_once(url: str, target: Path, expected: dict[str, str], timeout_s: float, quiet: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as scratch:
        part = Path(scratch, target.name)
        with _network_errors(url):
            request = urllib.request.Request(url, headers={"User-Agent": "sst2_xlmr"})
            response = urllib.request.urlopen(request, timeout=timeout_s)
        with response, part.open("xb") as file:
            length = response.headers.get("Content-Length", "")
            chunked = "Transfer-Encoding" in response.headers
            total = int(length) if length.isdecimal() and not chunked else None
            if response.status not in (None, 200) or not (chunked or expected or total is not None):
                raise UserError(f"{url} answered HTTP {response.status}, or with no length: a part?; {_CURE}")
            no_bar = quiet or not sys.stderr.isatty()
            if no_bar and not quiet and (total is None or total > 1e6):
                print(f"downloading {url} ({(total or 0) / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
            read = _network_errors(url)(response.read)
            with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=no_bar) as bar:
                while chunk := read(1 << 20):
                    bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if total not in (None, size):
            raise ConnectionError(f"{url} broke off after {size:,} of {total:,} bytes; try again, or {_CURE}")
        if size == 0:
            raise UserError(f"{url} is empty; {_CURE}")
        for kind, value in expected.items():
            if (actual := digest_of(part, kind)) != value:
                raise UserError(f"{url} has {kind} {actual}, expected {value}; it was not kept; {_CURE}")
        part.replace(target)
    _write_record(target, url)


def _extract(archive: Path, folder: Path) -> None:
    """Extract SST2_FILES into `folder`, all or none; an archive that cannot be used is removed."""
    try:
        with zipfile.ZipFile(archive) as zipped, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for entry in zipped.infolist():
                # A Windows path knows both slashes and drives: no entry leaves the folder on any system.
                path, mode = PureWindowsPath(entry.filename), entry.external_attr >> 16
                if path.drive or path.root or ".." in path.parts or stat.S_ISLNK(mode):
                    raise zipfile.BadZipFile(f"entry {entry.filename!r} leaves the folder or is a link")
            part = Path(scratch, "SST-2")
            part.mkdir()
            for name in SST2_FILES:
                (part / name).write_bytes(zipped.read(f"SST-2/{name}"))
                _write_record(part / name, SST2_URL)
            if folder.exists() and not _is_extracted(folder):
                shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except (KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        archive.unlink(missing_ok=True)
        _record_path(archive).unlink(missing_ok=True)
        raise UserError(f"{archive} is not SST-2 and was removed: {error}; {_CURE}") from error
    except OSError:
        # Without lock support another process may have been faster.
        if not _is_extracted(folder):
            raise


def _is_extracted(folder: Path) -> bool:
    return all(_read_record(folder / name) and _is_good(folder / name, {}) for name in SST2_FILES)


def _is_good(path: Path, expected: dict[str, str]) -> bool:
    record, size = _read_record(path), path.stat().st_size if path.is_file() else 0
    wrong = (kind for kind, value in expected.items() if (record.get(kind) or digest_of(path, kind)) != value)
    return size > 0 and record.get("bytes", size) == size and not any(wrong)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Without lock support, work is done twice at worst: every change is atomic.
    with path.with_name(f".{path.name}.lock").open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(_record_path(path).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _write_record(path: Path, url: str) -> None:
    record = {"url": url, "bytes": path.stat().st_size, "sha256": digest_of(path, "sha256")}
    _record_path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")
