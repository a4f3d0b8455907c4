"""Downloads against a misbehaving local server: nothing that is not whole may stay in the cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sst2_xlmr.util import downloads
from sst2_xlmr.util.downloads import download, fetch_bundle, fetch_sst2, mirrored
from sst2_xlmr.util.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "fetch.py"
BODY = bytes(range(256)) * 40
HTML = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
TSV = {
    "SST-2/train.tsv": "sentence\tlabel\na fine film\t1\n",
    "SST-2/dev.tsv": "sentence\tlabel\na bad film\t0\n",
    "SST-2/test.tsv": "index\tsentence\n0\ta film\n",
}


class Server:
    """What each path answers, in turn (the last answer repeats), and how often it was asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.requests: list[str] = []
        self.released = threading.Event()

    def on(self, path: str, body: bytes = b"", **how: Any) -> str:
        """Add an answer; `how`: status, length (the header's, None for none), chunked, pause_s, stall."""
        self.answers.setdefault(path, []).append({"body": body, **how})
        return self.url + path


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server_state: Server, *args: Any) -> None:
        self.state = server_state
        super().__init__(*args)

    def do_GET(self) -> None:
        self.state.requests.append(self.path)
        answers = self.state.answers.get(self.path, [{"status": 404, "body": b"not here"}])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        body = answer["body"]
        time.sleep(answer.get("pause_s", 0))
        if answer.get("chunked"):
            self.protocol_version = "HTTP/1.1"
        self.send_response(answer.get("status", 200))
        if answer.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            end = b"0\r\n\r\n" if answer["chunked"] == "whole" else b""
            body = b"%x\r\n%b\r\n" % (len(body), body) + end
        elif answer.get("length", len(body)) is not None:
            self.send_header("Content-Length", str(answer.get("length", len(body))))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
        if answer.get("stall"):
            self.state.released.wait(10)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http_server:
        state = Server(http_server.server_address[1])
        http_server.RequestHandlerClass = functools.partial(Handler, state)
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.released.set()
        http_server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SST2_XLMR_MIRROR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(downloads, "RETRY_WAITS_S", (0.01, 0.01))
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    """Return what lies in the folder and below, lock files left out."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock"}


def zip_bytes(members: dict[str, str], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == link else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, text)
    return buffer.getvalue()


def check_refused(url: str, target: Path, match: str, **options: Any) -> None:
    """Check that the download fails with one line that matches, and leaves nothing behind."""
    with pytest.raises(UserError, match=match) as caught:
        download(url, target, quiet=True, **options)
    assert "\n" not in str(caught.value)
    assert names(target.parent) == set()


def test_download_keeps_the_file_and_its_facts_and_asks_once(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY)
    sha256 = hashlib.sha256(BODY).hexdigest()
    target = cache / "deep" / "a.bin"
    assert download(url, target) == target
    assert download(url, target, sha256=sha256.upper()) == target
    assert download(url, target, md5=hashlib.md5(BODY).hexdigest()) == target
    assert target.read_bytes() == BODY
    record = json.loads((cache / "deep" / "a.bin.json").read_text())
    assert record == {"url": url, "bytes": len(BODY), "sha256": sha256}
    assert names(cache / "deep") == {"a.bin", "a.bin.json"}
    assert server.requests == ["/a.bin"]


CUT: dict[str, dict[str, Any]] = {
    "broke off after 10,240 of 10,241 bytes": {"length": len(BODY) + 1},
    r"cannot reach 127\.0\.0\.1:.*IncompleteRead": {"chunked": "cut"},
    r"cannot reach 127\.0\.0\.1:.*timed out": {"stall": True, "length": 99999},
}


@pytest.mark.parametrize("message", CUT, ids=["short", "chunked", "stalled"])
def test_truncated_body_never_enters_the_cache(server: Server, cache: Path, message: str) -> None:
    url = server.on("/a.bin", BODY, **CUT[message])
    check_refused(url, cache / "a.bin", message, timeout_s=0.2)
    assert len(server.requests) == 3


def test_body_without_length_must_be_chunked_or_have_a_digest(server: Server, cache: Path) -> None:
    assert download(server.on("/c", BODY, chunked="whole"), cache / "c").read_bytes() == BODY
    endless = server.on("/d", BODY, length=None)
    check_refused(endless, cache / "d" / "d", "no length")
    assert download(endless, cache / "d" / "d", md5=hashlib.md5(BODY).hexdigest()).read_bytes() == BODY


@pytest.mark.parametrize("first", [{"status": 503}, {"body": BODY[:9], "length": len(BODY)}])
def test_passing_failure_is_retried(server: Server, cache: Path, first: dict[str, Any]) -> None:
    url = server.on("/a.bin", **first)
    server.on("/a.bin", BODY)
    assert download(url, cache / "a.bin").read_bytes() == BODY
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (206, 1), (503, 3)])
def test_status_is_named_and_only_server_errors_are_retried(
    server: Server, cache: Path, status: int, tries: int
) -> None:
    url = server.on("/a.bin", BODY, status=status)
    check_refused(url, cache / "a.bin", f"{url} answered HTTP {status}.*--data-dir")
    assert len(server.requests) == tries


def test_empty_body_is_refused(server: Server, cache: Path) -> None:
    check_refused(server.on("/a.bin", b""), cache / "a.bin", "a.bin is empty")


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_digest_names_expected_and_found(server: Server, cache: Path, kind: str) -> None:
    found = hashlib.new(kind, BODY).hexdigest()
    expected = hashlib.new(kind, b"else").hexdigest()
    url = server.on("/a.bin", BODY)
    options: dict[str, Any] = {kind: expected}
    check_refused(url, cache / "a.bin", f"{kind} {found}, expected {expected}", **options)
    assert len(server.requests) == 1


def test_no_server_says_how_to_go_on_offline(cache: Path) -> None:
    # Port 1 needs a privileged server that nobody runs.
    says = rf"cannot reach 127\.0\.0\.1:1: .*scripts/fetch\.py .* the folder {cache}, .*--encoder DIR"
    with pytest.raises(UserError, match=says):
        fetch_bundle_from("http://127.0.0.1:1")
    with pytest.raises(UserError, match="SST2_XLMR_MIRROR"):
        fetch_bundle_from("no-address")
    assert all(path.startswith("encoders") for path in names(cache))
    assert not list(cache.rglob("*.part*"))


def fetch_bundle_from(mirror: str) -> tuple[Path, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SST2_XLMR_MIRROR", mirror)
        return fetch_bundle("xlmr.base", quiet=True)


def test_damaged_file_is_fetched_anew(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY)
    target = download(url, cache / "a.bin")
    target.write_bytes(BODY[:100])
    assert download(url, target).read_bytes() == BODY
    (cache / "a.bin.json").unlink()
    target.write_bytes(BODY[::-1])
    assert download(url, target, sha256=hashlib.sha256(BODY).hexdigest()).read_bytes() == BODY
    assert len(server.requests) == 3


def test_copy_without_record_is_used_unless_it_is_empty(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY)
    cache.mkdir()
    (cache / "a.bin").write_bytes(b"brought by hand")
    assert download(url, cache / "a.bin").read_bytes() == b"brought by hand"
    assert server.requests == []
    (cache / "a.bin").write_bytes(b"")
    assert download(url, cache / "a.bin").read_bytes() == BODY


def test_damaged_file_stays_unused_when_it_cannot_be_replaced(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY)
    target = download(url, cache / "a.bin")
    target.write_bytes(b"short")
    server.answers["/a.bin"] = [{"status": 404, "body": b""}]
    for _ in range(2):
        with pytest.raises(UserError, match="404"):
            download(url, target)


def start_download(url: str, target: Path) -> subprocess.Popen[bytes]:
    """Start a process that downloads and writes what it then finds in the file."""
    code = (
        "import pathlib, sys; from sst2_xlmr.util.downloads import download; "
        "sys.stdout.buffer.write(download(sys.argv[1], pathlib.Path(sys.argv[2])).read_bytes())"
    )
    command = [sys.executable, "-c", code, url, str(target)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def test_two_processes_at_once_download_once(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY, pause_s=0.4)
    started = [start_download(url, cache / "a.bin") for _ in range(2)]
    assert [process.communicate(timeout=20)[0] for process in started] == [BODY, BODY]
    assert server.requests == ["/a.bin"]
    assert names(cache) == {"a.bin", "a.bin.json"}


def test_without_locks_threads_do_not_harm_each_other(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    url = server.on("/a.bin", BODY, pause_s=0.1)
    serve_zip(server, zip_bytes(TSV), monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: download(url, cache / "a.bin").read_bytes(), range(4)))
        texts = list(pool.map(lambda _: (fetch_sst2(md5=None) / "dev.tsv").read_text(), range(4)))
    assert files == [BODY] * 4
    assert server.requests.count("/a.bin") == 4
    assert texts == [TSV["SST-2/dev.tsv"]] * 4
    assert {name.partition("/")[0] for name in names(cache)} == {
        "a.bin", "a.bin.json", "SST-2", "SST-2.zip", "SST-2.zip.json",
    }  # fmt: skip


def test_killed_download_leaves_no_file_under_its_name(server: Server, cache: Path) -> None:
    url = server.on("/a.bin", BODY, length=2 * len(BODY), stall=True)
    process = start_download(url, cache / "a.bin")
    deadline = time.monotonic() + 10
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert server.requests == ["/a.bin"]
    assert not (cache / "a.bin").exists()
    server.answers["/a.bin"] = [{"body": BODY}]
    assert download(url, cache / "a.bin").read_bytes() == BODY


def test_cache_that_cannot_be_written_is_named_with_the_cure(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the cache .*/file/x.*SST2_XLMR_CACHE"):
        download(server.on("/a.bin", BODY), tmp_path / "file" / "x" / "a.bin")
    assert server.requests == []


def test_full_disk_leaves_nothing_and_is_not_retried(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    url = server.on("/a.bin", BODY)
    check_refused(url, cache / "a.bin", "No space left on device.*free space.*SST2_XLMR_CACHE")
    assert len(server.requests) == 1


def test_progress_is_one_plain_line_for_a_big_file_and_none_otherwise(
    server: Server, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = server.on("/big", bytes(2_000_000))
    download(server.on("/small", BODY), cache / "small")
    download(big, cache / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
    download(big, cache / "big")
    assert capsys.readouterr() == ("", f"downloading {big} (2 MB)\n")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("SST2_XLMR_CACHE", "~/own")
    assert downloads.cache_dir() == Path("/home/someone/own")
    monkeypatch.setenv("SST2_XLMR_CACHE", "")
    assert downloads.cache_dir() == Path("/xdg/sst2_xlmr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert downloads.cache_dir() == Path("/home/someone/.cache/sst2_xlmr")


def test_mirrored_keeps_the_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirrored(downloads.SST2_URL) == downloads.SST2_URL
    monkeypatch.setenv("SST2_XLMR_MIRROR", "http://mirror/models/")
    assert mirrored("https://host/a/b/file.pt") == "http://mirror/models/file.pt"


def serve_bundle(server: Server, weights: bytes, model: bytes = b"\n\x0e\n\x05<unk>") -> None:
    server.answers.clear()
    server.on("/xlmr.base.encoder.pt", weights)
    server.on("/xlmr.sentencepiece.bpe.model", model)


def test_bundle_goes_into_its_folder(server: Server, cache: Path) -> None:
    serve_bundle(server, zip_bytes({"archive/data.pkl": "x"}))
    for _ in range(2):
        weights, model = fetch_bundle_from(server.url)
    assert weights == cache / "encoders" / "xlmr.base" / "xlmr.base.encoder.pt"
    assert model == cache / "encoders" / "xlmr.base" / "xlmr.sentencepiece.bpe.model"
    assert server.requests == ["/xlmr.base.encoder.pt", "/xlmr.sentencepiece.bpe.model"]


def test_bundle_from_a_mirror_folder(tmp_path: Path) -> None:
    (tmp_path / "xlmr.base.encoder.pt").write_bytes(zip_bytes({"archive/data.pkl": "x"}))
    (tmp_path / "xlmr.sentencepiece.bpe.model").write_bytes(BODY)
    assert fetch_bundle_from(tmp_path.as_uri())[1].read_bytes() == BODY


GOOD_WEIGHTS = zip_bytes({"archive/data.pkl": "x"})


@pytest.mark.parametrize(
    ("weights", "model", "bad"),
    [(HTML, BODY, "encoder.pt"), (GOOD_WEIGHTS[:-30], BODY, "encoder.pt"), (GOOD_WEIGHTS, HTML, "bpe.model")],
    ids=["page-as-weights", "cut-weights", "page-as-model"],
)
def test_web_page_instead_of_weights_or_model_is_removed(
    server: Server, cache: Path, weights: bytes, model: bytes, bad: str
) -> None:
    serve_bundle(server, weights, model)
    with pytest.raises(UserError, match=f"{bad} was a web page or damaged, and was removed"):
        fetch_bundle_from(server.url)
    assert not [path for path in names(cache) if bad in path]
    serve_bundle(server, GOOD_WEIGHTS)
    assert fetch_bundle_from(server.url)[0].read_bytes() == GOOD_WEIGHTS


def serve_zip(server: Server, body: bytes, patch: pytest.MonkeyPatch) -> None:
    server.answers["/SST-2.zip"] = [{"body": body}]
    patch.setenv("SST2_XLMR_MIRROR", server.url)


def test_sst2_is_extracted_and_then_needs_neither_zip_nor_server(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = zip_bytes({"SST-2/": "", **TSV, "SST-2/original/README.txt": "more"})
    serve_zip(server, body, monkeypatch)
    folder = fetch_sst2(md5=hashlib.md5(body).hexdigest())
    assert folder == cache / "SST-2"
    assert {path.name: path.read_text() for path in folder.glob("*.tsv")} == {
        Path(name).name: text for name, text in TSV.items()
    }
    assert not [name for name in names(folder) if "README" in name or "original" in name]
    (cache / "SST-2.zip").unlink()
    assert fetch_sst2() == folder
    assert server.requests == ["/SST-2.zip"]


@pytest.mark.parametrize("damage", ["shortened", "missing", "unrecorded"])
def test_sst2_with_a_damaged_file_is_extracted_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    serve_zip(server, zip_bytes(TSV), monkeypatch)
    train = fetch_sst2(md5=None) / "train.tsv"
    if damage == "shortened":
        train.write_text(TSV["SST-2/train.tsv"][:20])
    elif damage == "missing":
        train.unlink()
    else:
        train.with_name("train.tsv.json").unlink()
        train.write_text("sentence\tlabel\n")
    fetch_sst2(md5=None)
    assert train.read_text() == TSV["SST-2/train.tsv"]


def test_sst2_checks_its_digest(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_zip(server, zip_bytes(TSV), monkeypatch)
    with pytest.raises(UserError, match=f"expected {downloads.SST2_MD5}"):
        fetch_sst2()
    assert names(cache) == set()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (zip_bytes({**TSV, "../evil": "x"}), r"'\.\./evil'"),
        (zip_bytes({**TSV, "SST-2/a/../../../evil": "x"}), "evil"),
        (zip_bytes({**TSV, "..\\evil": "x"}), "evil"),
        (zip_bytes({**TSV, "/tmp/evil": "x"}), "'/tmp/evil'"),
        (zip_bytes({**TSV, "C:evil": "x"}), "'C:evil'"),
        (zip_bytes({**TSV, "SST-2/link": "/etc/passwd"}, link="SST-2/link"), "'SST-2/link'"),
        (zip_bytes({name: text for name, text in TSV.items() if "dev" not in name}), "SST-2/dev.tsv"),
        (zip_bytes(TSV).replace(b"a fine film", b"a fine fi1m"), "Bad CRC-32"),
        (zip_bytes(TSV)[:-40], "not a zip file"),
        (HTML, "not a zip file"),
    ],
    ids=["up", "inside-up", "backslash", "absolute", "drive", "link", "missing", "crc", "cut", "page"],
)
def test_unusable_zip_is_refused_whole(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, named: str
) -> None:
    serve_zip(server, body, monkeypatch)
    with pytest.raises(UserError, match=f"SST-2.zip is not SST-2 and was removed: .*{named}.*--data-dir"):
        fetch_sst2(md5=None)
    assert names(cache) == set()
    assert not list(cache.parent.rglob("*evil*"))


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    env = {**os.environ, **environment}
    # From another folder, as the script must find the package by itself.
    return subprocess.run(command, cwd=SCRIPT.parent, env=env, capture_output=True, text=True, timeout=30)


def test_script_fetches_into_the_cache_it_is_told(server: Server, tmp_path: Path) -> None:
    serve_bundle(server, zip_bytes({"archive/data.pkl": "x"}))
    own = tmp_path / "own"
    done = run_script("xlmr.base", "--cache-dir", str(own), SST2_XLMR_MIRROR=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"xlmr.base: {own / 'encoders' / 'xlmr.base'}\n" in done.stdout
    assert (own / "encoders" / "xlmr.base" / "xlmr.base.encoder.pt").is_file()


def test_script_turns_errors_into_one_line_and_status_2(server: Server) -> None:
    done = run_script(SST2_XLMR_MIRROR=server.url)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {server.url}/SST-2.zip answered HTTP 404")
    assert done.stderr.count("\n") == 1
    done = run_script("xlmr.huge")
    assert done.returncode == 2
    assert "invalid choice: 'xlmr.huge'" in done.stderr
