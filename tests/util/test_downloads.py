"""Downloads from a misbehaving local server: nothing that is not whole may stay in the cache, nor anything be lost."""

import hashlib
import io
import os
import pwd
import shutil
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import Capture, Patch, refusal
from serving import Server, serving

from sst2_xlmr.programs import fetch
from sst2_xlmr.util import downloads
from sst2_xlmr.util.downloads import fetch_bundle, fetch_sst2

BODY = bytes(range(256)) * 40
TSV = {"train.tsv": "sentence\tlabel\na film\t1\n", "dev.tsv": "sentence\tlabel\n", "test.tsv": "index\tsentence\n"}


def zip_bytes(**members: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


WEIGHTS = zip_bytes(**{"archive/data.pkl": "x"})
SST2 = zip_bytes(**{f"SST-2/{name}": text for name, text in TSV.items()}, **{"SST-2/original/README.txt": "more"})


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        state.files.update({"/base.pt": WEIGHTS, "/bpe.model": BODY, "/SST-2.zip": SST2})
        yield state


@pytest.fixture(autouse=True)
def cache(server: Server, tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "RETRY_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(downloads, "BUNDLE_URLS", {"xlmr.base": (f"{server.url}/base.pt", f"{server.url}/bpe.model")})
    monkeypatch.setattr(downloads, "SST2_URL", f"{server.url}/SST-2.zip")
    monkeypatch.setattr(downloads, "SST2_MD5", hashlib.md5(SST2).hexdigest())
    monkeypatch.setattr(downloads, "SST2_ROWS", {"train.tsv": 1, "dev.tsv": 0, "test.tsv": 0})
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_each_is_fetched_once_and_whole(server: Server, cache: Path, capfd: Capture) -> None:
    for _ in range(2):
        weights, tokenizer = fetch_bundle("xlmr.base")
        folder = fetch_sst2()
    assert contents(cache / "encoders" / "xlmr.base") == {weights.name: WEIGHTS, tokenizer.name: BODY}
    assert {name: text.decode() for name, text in contents(cache / "SST-2").items()} == TSV
    assert sorted(file.name for file in cache.iterdir()) == ["SST-2", "encoders"]
    assert (folder, weights.parent) == (cache / "SST-2", cache / "encoders" / "xlmr.base")
    assert [path for method, path in server.requests if method == "GET"] == ["/base.pt", "/bpe.model", "/SST-2.zip"]
    assert capfd.readouterr() == ("", "")
    server.files["/bpe.model"] = bytes(2_000_000)
    tokenizer.unlink()
    fetch_bundle("xlmr.base")
    assert capfd.readouterr() == ("", f"downloading {server.url}/bpe.model (2 MB)\n")


BROKEN: dict[str, tuple[dict[str, Any], str, int]] = {
    "short": ({"length": len(WEIGHTS) + 1}, "broke off after", 3),
    "stalled": ({"stall": True, "length": 99_999}, "timed out", 3),
    "cut, without length": ({"body": WEIGHTS[:-30], "length": None}, "cut off", 3),
    "empty": ({"body": b""}, "it was empty", 3),
    "page": ({"body": b"\n<!DOCTYPE html>Please log in"}, "a web page", 3),
    "missing": ({"status": 404}, "HTTP Error 404", 1),
    "overloaded": ({"status": 503}, "HTTP Error 503", 3),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_whole_leaves_nothing(server: Server, cache: Path, monkeypatch: Patch, kind: str) -> None:
    how, says, tries = BROKEN[kind]
    server.answers["/base.pt"] = [how]
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.2)
    message = refusal(fetch_bundle, "xlmr.base")
    assert says in message
    assert f"cannot fetch {server.url}/base.pt" in message
    assert f"`sst2-xlmr fetch` elsewhere and copy the folder {cache}" in message
    assert not list((cache / "encoders" / "xlmr.base").iterdir())
    assert server.requests.count(("GET", "/base.pt")) == tries
    server.answers["/base.pt"] = [how, how, {}] if tries == 3 else [{}]
    assert fetch_bundle("xlmr.base")[0].read_bytes() == WEIGHTS, "a passing failure"


def test_another_zip_is_not_sst2(server: Server, cache: Path) -> None:
    server.files["/SST-2.zip"] = WEIGHTS
    assert f"has MD5 {hashlib.md5(WEIGHTS).hexdigest()}, expected {downloads.SST2_MD5}" in refusal(fetch_sst2)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("lies_there", ["notes.txt", "a link", "all, but other rows"])
def test_a_folder_that_the_user_made_is_never_changed(server: Server, tmp_path: Path, lies_there: str) -> None:
    folder = tmp_path / "data" / "SST-2"
    folder.mkdir(parents=True)
    for name in TSV if "rows" in lies_there else [lies_there]:
        (folder / name).write_text("sentence\tlabel\nmine\t1\nmine, too\t0\n")
    if lies_there == "a link":
        shutil.move(folder, tmp_path / "mine")
        folder.symlink_to(tmp_path / "mine")
    before = contents(tmp_path)
    message = refusal(fetch.main, ["sst2", "--cache-dir", str(tmp_path / "data")])
    assert f"{folder} exists, but is not SST-2, whose" in message
    assert contents(tmp_path) == before
    assert server.requests == []


def test_sst2_that_the_user_brought_is_used(server: Server, cache: Path) -> None:
    (cache / "SST-2").mkdir(parents=True)
    for name, text in TSV.items():
        (cache / "SST-2" / name).write_text(text.replace("film", "good"))
    assert "good" in (fetch_sst2() / "train.tsv").read_text()
    assert server.requests == []


def start_process() -> ForkProcess:
    process = ForkProcess(target=lambda: (fetch_bundle("xlmr.base"), fetch_sst2()))
    process.start()
    return process


def test_two_processes_at_once(server: Server, cache: Path) -> None:
    server.pause_s = 0.3
    for process in [start_process(), start_process()]:
        process.join(60)
        assert process.exitcode == 0
    assert contents(cache) == {
        "encoders/xlmr.base/base.pt": WEIGHTS,
        "encoders/xlmr.base/bpe.model": BODY,
        **{f"SST-2/{name}": text.encode() for name, text in TSV.items()},
    }


def test_a_killed_download_has_not_taken_its_name(server: Server, cache: Path) -> None:
    server.answers["/base.pt"] = [{"stall": True, "length": 99_999}]
    process = start_process()
    deadline = time.monotonic() + 60
    while ("GET", "/base.pt") not in server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    server.answers.clear()
    assert not (cache / "encoders" / "xlmr.base" / "base.pt").exists()
    assert fetch_bundle("xlmr.base")[0].read_bytes() == WEIGHTS


def test_a_cache_that_cannot_be_used_is_named(server: Server, cache: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("SST2_XLMR_CACHE", str(tmp_path / "file" / "cache"))
        assert "file/cache" in (message := refusal(fetch_bundle, "xlmr.base"))
        assert "set SST2_XLMR_CACHE to another folder" in message
    assert server.requests == []
    monkeypatch.setattr("shutil.copyfileobj", Mock(side_effect=OSError(28, "No space left")))
    assert f"cannot use the cache {cache}: [Errno 28] No space left" in refusal(fetch_bundle, "xlmr.base")
    assert server.requests == [("GET", "/base.pt")]
    assert contents(cache) == {}


def test_cache_dir_follows_the_environment(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for own, xdg, found in (("~/own", "/xdg", "own"), ("", "/xdg", "/xdg/sst2_xlmr"), ("", "", ".cache/sst2_xlmr")):
        monkeypatch.setenv("SST2_XLMR_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert downloads.cache_dir() == Path("/home/someone", found)


def test_without_a_home_folder_the_cache_is_a_private_one(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "SST2_XLMR_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"sst2_xlmr-{os.getuid()}"
    assert downloads.cache_dir() == folder
    assert fetch_sst2() == folder / "SST-2"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert f"nor a private {folder}; set SST2_XLMR_CACHE" in refusal(downloads.cache_dir)
    monkeypatch.setenv("SST2_XLMR_CACHE", "~/own")
    assert "no home folder for the cache ~/own" in refusal(downloads.cache_dir)


def test_the_program_names_what_to_copy(server: Server, tmp_path: Path, capsys: Capture) -> None:
    fetch.main(["--cache-dir", str(own := tmp_path / "own")])
    assert capsys.readouterr().out.splitlines() == [
        f"sst2: {own / 'SST-2'}",
        f"xlmr.base: {own / 'encoders' / 'xlmr.base'}",
        f"on another machine, set SST2_XLMR_CACHE to a copy of {own}",
    ]
    assert "invalid choice: 'xlmr.huge' (choose from sst2, xlmr.base" in refusal(fetch.main, ["xlmr.huge"])
