"""The service: its answers are those of predict.py, and it survives what is sent to it."""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from conftest import change_json, free_port

from sst2_xlmr.predictor import Classifier

pytest.importorskip("uvicorn")
serve = importlib.import_module("sst2_xlmr.programs.serve")
TEXTS = ["Not bad at all.", "映画", "", "a longer text, " * 30]
GOOD = json.dumps({"texts": TEXTS, "all_probabilities": True}).encode()
# The program with a second for a request to arrive.
PROGRAM = """\
from sst2_xlmr.programs import serve
from sst2_xlmr.util.errors import exit_on_user_error
serve.REQUEST_TIMEOUT_S = 1.0
exit_on_user_error(serve.main)
"""


@contextlib.contextmanager
def started(model: Path, *more: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Start the service; yield its port and process."""
    port = free_port()
    words = ["--model", str(model), "--port", str(port), "--precision", "fp32", "--device", "cpu", *more]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stderr=subprocess.PIPE) as service:
        try:
            for _ in range(1200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield port, service
        finally:
            service.terminate()


def check_ends(service: subprocess.Popen[bytes]) -> None:
    """Check that SIGTERM ends the service, with nothing on standard error."""
    service.terminate()
    assert service.stderr is not None
    assert service.stderr.read() == b""
    assert service.wait(30) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def port(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Start the service once for all tests."""
    model = Path(shutil.copytree(model, tmp_path_factory.mktemp("serve") / "model"))
    change_json(model / "config.json", text_pairs=False)
    with started(model) as (port, service):
        yield port
        check_ends(service)


def ask(port: int, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}", body), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def check_answers(port: int, model: Path) -> None:
    classifier = Classifier.load(model, "fp32", "cpu")
    expected = classifier.probabilities(TEXTS)
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda _: ask(port, GOOD), range(48)))
    for status, answers in found:
        assert status == 200
        assert [answer["label"] for answer in answers] == classifier.predict(TEXTS)
        for answer, row in zip(answers, expected):
            assert [answer["probability_a"], answer["probability_b"]] == pytest.approx(row.tolist(), abs=1e-5)
    assert json.loads(get(port, "/healthz")) == {"status": "ok"}
    counters = dict(line.rsplit(" ", 1) for line in get(port, "/metrics").splitlines())
    assert int(counters['sst2_xlmr_requests_total{status="200"}']) >= 48
    assert int(counters["sst2_xlmr_texts_total"]) >= 48 * len(TEXTS)
    assert counters["sst2_xlmr_waiting_texts"] == "0"


def test_many_at_once_get_the_answers_of_the_model(port: int, model: Path) -> None:
    check_answers(port, model)


def workers_of(service: subprocess.Popen[bytes]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()]


def test_several_workers_answer_alike_and_count_together(model: Path) -> None:
    with started(model, "--workers", "2") as (port, service):
        assert len(workers_of(service)) == 2
        check_answers(port, model)
        check_ends(service)


def test_the_service_ends_if_a_worker_is_killed(model: Path) -> None:
    with started(model, "--workers", "2", "--abstain-below", "1") as (port, service):
        assert {answer["label"] for answer in ask(port, GOOD)[1]} == {"?"}
        killed, other = workers_of(service)
        os.kill(killed, signal.SIGKILL)
        assert service.stderr is not None
        assert b"error: a worker ended by itself (status -9)" in service.stderr.read()
        assert service.wait(30) == 2
        assert not Path(f"/proc/{other}").exists()


def test_what_is_too_much_is_turned_away(model: Path) -> None:
    sent: list[dict[str, Any]] = []
    counters = np.zeros(1, serve.COUNTERS)
    counters[serve.WAITING] = serve.MAX_QUEUED_TEXTS

    async def ask_app(path: str, method: str) -> None:
        arguments = argparse.Namespace(counters=counters, abstain_below=0.0)
        app = serve.make_app(Classifier.load(model, "fp32", "cpu"), arguments, asyncio.Queue(), 0)
        receive, send = AsyncMock(return_value={"body": GOOD}), AsyncMock(side_effect=sent.append)
        await app({"path": path, "method": method}, receive, send)

    asyncio.run(asyncio.wait_for(ask_app("/", "POST"), 20))
    asyncio.run(ask_app("/", "GET"))
    assert [message["status"] for message in sent[::2]] == [503, 404]


def test_small_answers_are_sent_at_once() -> None:
    with serve.listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP, "which asyncio wants before it sets TCP_NODELAY"


def test_an_address_that_is_taken_is_one_line(port: int, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sst2_xlmr", "serve", "--model", str(model), "--port", str(port)],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: cannot listen on --host 127.0.0.1 --port {port}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"texts": ["\xff"]}', 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[1]", 400, "a list of 1 to 100 texts"),
        (b'{"texts": "a text"}', 400, "a list of 1 to 100 texts"),
        (b'{"texts": []}', 400, "a list of 1 to 100 texts"),
        (json.dumps({"texts": ["a"] * 101}).encode(), 400, "a list of 1 to 100 texts"),
        (b'{"texts": [1]}', 400, "strings of at most"),
        (b'{"texts": [["a", "b"]]}', 400, "this model takes single texts"),
        (b'{"texts": ["\\ud83d"]}', 400, "not UTF-8"),
        (b'{"texts": ["bad\\u0000 word"]}', 400, "NUL"),
        (json.dumps({"texts": ["a" * 100_001]}).encode(), 400, "strings of at most 100,000 characters"),
        (b" " * ((1 << 20) + 1), 413, "a request may have at most 1,048,576 bytes"),
    ],
)
def test_a_bad_request_gets_one_line(port: int, body: bytes, status: int, says: str) -> None:
    found, answer = ask(port, body)
    assert (found, list(answer)) == (status, ["detail"])
    assert says in answer["detail"]
    assert "\n" not in answer["detail"]
    assert ask(port, GOOD)[0] == 200, "others are answered"


def test_connections_that_send_half_a_request_are_ended_and_hold_nobody_up(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    halves = [b"", b"POST / HT", head, head + b"Content-Length: 1000\r\n\r\n{"]
    with contextlib.ExitStack() as stack:
        opened = (socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(200))
        connections = [stack.enter_context(connection) for connection in opened]
        for number, connection in enumerate(connections):
            connection.sendall(halves[number % 4])
        assert ask(port, GOOD)[0] == 200
        ends = [connection.recv(1000) for connection in connections]
    assert all(end == b"" for number, end in enumerate(ends) if number % 4 < 3)
    assert all(b" 408 " in end for end in ends[3::4])
