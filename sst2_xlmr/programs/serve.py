"""Answer over HTTP with a trained model.

    sst2-xlmr serve --model runs/NAME/model --port 8000
    curl http://127.0.0.1:8000 -d '{"texts": ["A fine film.", "Not my cup of tea."]}'

A request has `texts`, strings or pairs of strings, and perhaps `"all_probabilities": true`; the answer is a list with
what predict.py writes for each. Texts that wait are computed together, those of all requests. GET /healthz says that
the service is there, GET /metrics has its counters for Prometheus. SIGTERM lets it finish what it has begun.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, cast

import numpy as np

from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options
from sst2_xlmr.task import check_options
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json
from sst2_xlmr.util.memory import keep_freed_memory
from sst2_xlmr.util.output import say

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise UserError("serve needs a package: pip install 'uvicorn>=0.22' (extra: serve)") from None

LARGEST_BODY, LARGEST_HEAD = 1 << 20, 1 << 14  # bytes of a request
LONGEST_TEXT, MOST_TEXTS = 100_000, 100  # characters of a text, texts of a request
MOST_WAITING, MOST_CONNECTIONS = 2000, 1000  # texts and connections, beyond which others are turned away
SHORT = 2000  # characters of a request; longer ones are tokenized in a thread, so that others are not held up
SECONDS_TO_ARRIVE = 10.0  # for the head of a request, and again for its body
WAITING = "sst2_xlmr_waiting_texts"
Receive = Callable[[], Any]  # as ASGI defines it


class Refused(Exception):
    """A request that is not answered: the status, and why."""


async def compute(
    classifier: Classifier, thread: ThreadPoolExecutor, waiting: asyncio.Queue[Any], batch_tokens: int
) -> None:
    """Answer the requests that wait, as many at a time as have `batch_tokens`."""
    pending: list[Any] = []
    loop = asyncio.get_running_loop()
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


async def read_body(receive: Receive) -> bytes:
    """Return a request's body."""
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")  # none if the client has gone
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"a request may have {LARGEST_BODY:,} bytes")
    return body


async def read_texts(receive: Receive, takes_pairs: bool | None) -> tuple[list[Any], int, bool]:
    """Return a request's texts, their characters, and whether it asks for all probabilities; Refused for any other."""
    try:
        body = json.loads(await asyncio.wait_for(read_body(receive), SECONDS_TO_ARRIVE))
    except asyncio.TimeoutError:
        raise Refused(408, f"the request has not arrived within {SECONDS_TO_ARRIVE:g} seconds") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"not JSON: {error}"[:200]) from None
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_TEXTS:
        raise Refused(400, f"texts: a list of 1 to {MOST_TEXTS} texts is needed")
    parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
    if not all(isinstance(part, str) and len(part) <= LONGEST_TEXT for part in parts):
        raise Refused(400, f"texts: strings of up to {LONGEST_TEXT:,} characters are needed, or pairs of such")
    if takes_pairs is not None and any(isinstance(text, list) != takes_pairs for text in texts):
        raise Refused(400, f"texts: this model takes {'pairs of texts' if takes_pairs else 'single texts'}")
    return texts, sum(map(len, parts)), bool(body.get("all_probabilities"))


def make_app(classifier: Classifier, waiting: asyncio.Queue[Any], abstain_below: float) -> Callable[..., Any]:
    """Return the service as an ASGI application, which puts token ids, lengths and a future into `waiting`."""
    counts: Any = Counter({WAITING: 0})
    task = classifier.task
    takes_pairs = read_json(classifier.folder / "config.json", "a model's folder is needed").get("text_pairs")

    async def answers_to(receive: Receive) -> list[dict[str, Any]]:
        texts, characters, all_probabilities = await read_texts(receive, takes_pairs)
        try:
            is_short = characters <= SHORT
            ids, lengths = classifier.encode(texts) if is_short else await asyncio.to_thread(classifier.encode, texts)
        except (UserError, TypeError) as error:
            raise Refused(400, str(error)) from None
        if counts[WAITING] + len(lengths) > MOST_WAITING:
            raise Refused(503, "too many texts are waiting; try again later")
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((ids, lengths, future))
        counts[WAITING] += len(lengths)
        try:
            found = (await future).tolist()
        finally:
            counts[WAITING] -= len(lengths)
        columns = task.columns(all_probabilities)
        return [dict(zip(columns, task.cells(each, all_probabilities, abstain_below))) for each in found]

    async def classify(receive: Receive) -> tuple[int, Any]:
        start, status = time.monotonic(), 500
        try:
            answer: Any = await answers_to(receive)
            status = 200
            counts["sst2_xlmr_texts_total"] += len(answer)
        except Refused as error:
            status, answer = error.args[0], {"detail": error.args[1]}
        except UserError as error:  # of the model
            answer = {"detail": str(error)}
        finally:
            counts[f'sst2_xlmr_requests_total{{status="{status}"}}'] += 1
            counts["sst2_xlmr_seconds_total"] += time.monotonic() - start
        return status, answer

    async def app(scope: dict[str, Any], receive: Receive, send: Callable[[dict[str, Any]], Any]) -> None:
        status, kind, answer = 200, "application/json", cast(Any, None)
        if scope["path"] == "/metrics":
            kind = "text/plain; version=0.0.4"
            answer = "".join(f"{name} {value}\n" for name, value in counts.items())
        elif scope["path"] == "/healthz":
            answer = {"status": "ok"}
        elif scope["path"] != "/" or scope["method"] != "POST":
            status, answer = 404, {"detail": "there are POST /, GET /healthz and GET /metrics"}
        else:
            status, answer = await classify(receive)
        body = (answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)).encode()
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
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
            self.timer = self.loop.call_later(SECONDS_TO_ARRIVE, self.end_idle)

    def end_idle(self) -> None:
        self.timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


async def run(classifier: Classifier, thread: ThreadPoolExecutor, arguments: argparse.Namespace) -> None:
    """Answer until a signal asks to stop."""
    waiting: asyncio.Queue[Any] = asyncio.Queue()
    settings: dict[str, Any] = {"http": TimedProtocol, "limit_concurrency": MOST_CONNECTIONS, "log_level": "error"}
    settings |= {"h11_max_incomplete_event_size": LARGEST_HEAD, "timeout_graceful_shutdown": 30, "lifespan": "off"}
    app = make_app(classifier, waiting, arguments.abstain_below)
    server = uvicorn.Server(uvicorn.Config(app, host=arguments.host, port=arguments.port, **settings))
    computing = asyncio.create_task(compute(classifier, thread, waiting, arguments.batch_tokens))
    await server.serve()
    computing.cancel()


def main(argv: list[str] | None = None) -> None:
    arguments = options.serve().parse_args(argv)
    keep_freed_memory()
    # One thread loads and computes. Each thread that computes has OpenMP threads of its own, and if there are more of
    # these than cores, they do not spin while they wait, which is slower.
    thread = ThreadPoolExecutor(1)
    classifier = thread.submit(Classifier.load_mean, arguments.models, arguments.precision, arguments.device).result()
    check_options(classifier.task, arguments)
    models = " + ".join(map(str, arguments.models))
    say(f"serving    {models} in {classifier.precision} at http://{arguments.host}:{arguments.port}")
    asyncio.run(run(classifier, thread, arguments))
