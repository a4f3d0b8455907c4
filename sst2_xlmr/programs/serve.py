"""Serve a trained model over HTTP; docs/from-csv-to-service.md has examples.

A request has `texts`, strings or pairs of strings, and optionally `"all_probabilities": true`; the response is a list
with the columns of predict.py for each text. Waiting texts of all requests are batched. On SIGTERM, it finishes the
requests it has received. With --workers, several processes answer, and share the model's memory.
"""

import argparse
import asyncio
import json
import mmap
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options
from sst2_xlmr.task import check_options
from sst2_xlmr.util.device import tune_memory
from sst2_xlmr.util.errors import SIGNALS, UserError, say
from sst2_xlmr.util.files import read_json

MAX_BODY_BYTES, MAX_HEAD_BYTES = 1 << 20, 1 << 14
MAX_TEXT_CHARACTERS, MAX_TEXTS = 100_000, 100  # of a request
MAX_QUEUED_TEXTS, MAX_CONNECTIONS = 2000, 1000  # beyond which requests are turned away
INLINE_CHARACTERS = 2000  # longer requests are tokenized in a thread, so that others are not held up
REQUEST_TIMEOUT_S = 10.0  # for the head of a request, and again for its body
STATUSES = (200, 400, 408, 413, 500, 503)  # of answers to POST /
WAITING, TEXTS, SECONDS = "sst2_xlmr_waiting_texts", "sst2_xlmr_texts_total", "sst2_xlmr_seconds_total"
REQUESTS = {status: f'sst2_xlmr_requests_total{{status="{status}"}}' for status in STATUSES}
COUNTERS = np.dtype([(name, np.float64) for name in (WAITING, TEXTS, SECONDS, *REQUESTS.values())])
Receive = Callable[[], Any]  # as ASGI defines it
Queue = asyncio.Queue[Any]  # of token ids, lengths and a future for each request


async def compute(classifier: Classifier, waiting: Queue, batch_tokens: int) -> None:
    """Answer the requests that wait, as many at a time as have `batch_tokens`."""
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    pending: list[Any] = []
    while True:
        batch, pending = pending or [await waiting.get()], []
        tokens = sum(len(ids) for ids, *_ in batch)
        while not waiting.empty() and not pending:
            request = waiting.get_nowait()
            tokens += len(request[0])
            (batch if tokens <= batch_tokens else pending).append(request)
        ids, lengths, futures = zip(*batch)
        texts = np.concatenate(ids), np.concatenate(lengths)
        try:
            found = await loop.run_in_executor(thread, classifier.probabilities_of_ids, *texts, batch_tokens)
        except Exception as error:  # one answer must not end the service
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            continue
        for future, answer in zip(futures, np.split(found, np.cumsum([len(each) for each in lengths])[:-1])):
            if not future.done():  # as it is if the service is ending
                future.set_result(answer)


async def read_texts(receive: Receive, takes_pairs: bool | None) -> tuple[list[Any], int, bool]:
    """Return a valid request's texts, their characters, and whether it asks for all probabilities."""

    async def read_body() -> bytes:
        content, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            content += message.get("body", b"")  # none if the client has gone
            if len(content) > MAX_BODY_BYTES:
                raise UserError(f"a request may have at most {MAX_BODY_BYTES:,} bytes", status=413)
        return content

    try:
        body = json.loads(await asyncio.wait_for(read_body(), REQUEST_TIMEOUT_S))
    except asyncio.TimeoutError:
        raise UserError(f"a request must arrive within {REQUEST_TIMEOUT_S:g} seconds", status=408) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}"[:200], status=400) from None
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise UserError(f"texts: a list of 1 to {MAX_TEXTS} texts is needed", status=400)
    parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
    if not all(isinstance(part, str) and len(part) <= MAX_TEXT_CHARACTERS for part in parts):
        raise UserError(f"texts must be strings of at most {MAX_TEXT_CHARACTERS:,} characters, or pairs", status=400)
    if takes_pairs is not None and any(isinstance(text, list) != takes_pairs for text in texts):
        raise UserError(f"texts: this model takes {'pairs of texts' if takes_pairs else 'single texts'}", status=400)
    return texts, sum(map(len, parts)), bool(body.get("all_probabilities"))


def make_app(classifier: Classifier, arguments: argparse.Namespace, waiting: Queue, worker: int) -> Callable[..., Any]:
    """Return the service as an ASGI application; each worker counts in its row of `arguments.counters`."""
    counters, task, abstain_below = arguments.counters, classifier.task, arguments.abstain_below
    counts = counters[worker]
    takes_pairs = read_json(classifier.folder / "config.json", "a model's folder is needed").get("text_pairs")

    async def answers_to(receive: Receive) -> list[dict[str, Any]]:
        texts, characters, all_probabilities = await read_texts(receive, takes_pairs)
        try:
            is_short = characters <= INLINE_CHARACTERS
            ids, lengths = classifier.encode(texts) if is_short else await asyncio.to_thread(classifier.encode, texts)
        except (UserError, TypeError) as error:
            raise UserError(str(error), status=400) from None
        if counts[WAITING] + len(lengths) > MAX_QUEUED_TEXTS:
            raise UserError("too many texts are waiting; try again later", status=503)
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((ids, lengths, future))
        counts[WAITING] += len(lengths)
        try:
            found = (await future).tolist()
        finally:
            counts[WAITING] -= len(lengths)
        columns = task.columns(all_probabilities)
        return [dict(zip(columns, task.prediction_cells(row, all_probabilities, abstain_below))) for row in found]

    async def app(scope: dict[str, Any], receive: Receive, send: Callable[[dict[str, Any]], Any]) -> None:
        status, content_type = 200, "application/json"
        answer: Any = None
        if scope["path"] == "/metrics":
            content_type = "text/plain; version=0.0.4"
            answer = "".join(f"{name} {counters[name].sum():.15g}\n" for name in counters.dtype.names or ())
        elif scope["path"] == "/healthz":
            answer = {"status": "ok"}
        elif scope["path"] != "/" or scope["method"] != "POST":
            status, answer = 404, {"detail": "there are POST /, GET /healthz and GET /metrics"}
        else:
            start, status = time.monotonic(), 500
            try:
                answer = await answers_to(receive)
                status = 200
                counts[TEXTS] += len(answer)
            except UserError as error:
                status = error.status if error.status in STATUSES else 500  # 2: the model is damaged
                answer = {"detail": str(error)}
            finally:
                counts[REQUESTS[status]] += 1
                counts[SECONDS] += time.monotonic() - start
        body = (answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)).encode()
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


class TimedProtocol(H11Protocol):
    """HTTP whose connections end if the head of a request does not arrive in time."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def watch(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.timer and not is_idle:
            self.timer.cancel()
            self.timer = None
        elif is_idle and not self.timer:
            self.timer = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.close)


async def run(classifier: Classifier, arguments: argparse.Namespace, worker: int = 0) -> None:
    """Answer at `arguments.listener` until a signal asks to stop."""
    waiting: Queue = asyncio.Queue()
    settings: dict[str, Any] = {"http": TimedProtocol, "limit_concurrency": MAX_CONNECTIONS, "log_level": "error"}
    settings |= {"h11_max_incomplete_event_size": MAX_HEAD_BYTES, "timeout_graceful_shutdown": 30, "lifespan": "off"}
    app = make_app(classifier, arguments, waiting, worker)
    computing = asyncio.create_task(compute(classifier, waiting, arguments.batch_tokens))
    await uvicorn.Server(uvicorn.Config(app, **settings)).serve([arguments.listener])
    computing.cancel()


def work(classifier: Classifier, arguments: argparse.Namespace, worker: int) -> None:
    """Run one of several worker processes."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # until uvicorn handles them
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.workers))
    asyncio.run(run(classifier, arguments, worker))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to this address, not yet listening."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only if the protocol is given; without it, small answers wait for 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on --host {host} --port {port}: {error}; choose another") from None
    return listener


def supervise(processes: list[Any]) -> None:
    """Run worker processes until a signal asks them to stop; UserError if one ends by itself."""

    def stop(*_: object) -> None:
        for process in processes:
            if process.pid:
                process.terminate()

    for number in SIGNALS:
        signal.signal(number, stop)
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes])
    stop()  # all, if one has
    for process in processes:
        process.join()
    if died := [each.exitcode for each in processes if each.exitcode not in (0, *(-number for number in SIGNALS))]:
        raise UserError(f"a worker ended by itself (status {died[0]}), and so the service; start fewer --workers")


def main(argv: list[str] | None = None) -> None:
    arguments = options.parse("serve", argv)
    arguments.listener = listen(arguments.host, arguments.port)
    tune_memory()
    # Load in a thread that ends, so its OpenMP threads end too: if there were more than cores, waiting ones would not
    # spin, which is slower, and a forked process would wait for threads that it does not have.
    with ThreadPoolExecutor(1) as thread:
        load, asked = Classifier.load_ensemble, (arguments.models, arguments.precision, arguments.device)
        classifier = thread.submit(load, *asked).result()
    check_options(classifier.task, arguments)
    workers = arguments.workers
    if workers > 1 and classifier.device.type != "cpu":
        raise UserError("--workers is for a CPU; leave it out, or add --device cpu")
    arguments.counters = np.frombuffer(mmap.mmap(-1, COUNTERS.itemsize * workers), COUNTERS)
    models = " + ".join(map(str, arguments.models))
    say(f"serving    {models} in {classifier.precision} at http://{arguments.host}:{arguments.port}")
    if workers == 1:
        asyncio.run(run(classifier, arguments))
        return
    fork = multiprocessing.get_context("fork")  # so that they share the model's memory
    supervise([fork.Process(target=work, args=(classifier, arguments, worker)) for worker in range(workers)])
