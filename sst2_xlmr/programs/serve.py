"""Answer over HTTP with a trained model.

    sst2-xlmr serve --model runs/NAME/model --port 8000
    curl http://127.0.0.1:8000 -d '{"texts": ["A fine film.", "Not my cup of tea."]}'

A request has `texts`, strings or pairs of strings, and perhaps `"all_probabilities": true`; the answer is a list with
what predict.py writes for each. Texts that wait are computed together, those of all requests. GET /healthz says that
the service is there, GET /metrics has its counters for Prometheus. SIGTERM lets it finish what it has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

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
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise UserError("serve needs two packages: pip install 'starlette>=0.27' 'uvicorn>=0.22' (extra: serve)") from None

LARGEST_BODY, LARGEST_HEAD = 1 << 20, 1 << 14  # bytes of a request
LONGEST_TEXT, MOST_TEXTS = 100_000, 100  # characters of a text, texts of a request
MOST_WAITING, MOST_CONNECTIONS = 2000, 1000  # texts and connections, beyond which others are turned away
SECONDS_TO_ARRIVE = 10.0  # for the head of a request, and again for its body


async def compute(classifier: Classifier, waiting: asyncio.Queue[Any], batch_tokens: int) -> None:
    """Answer the texts that wait, as many at a time as have `batch_tokens`."""
    pending: list[Any] = []
    while True:
        batch, pending = pending or [await waiting.get()], []
        tokens = sum(len(ids) for ids, _ in batch)
        while not waiting.empty() and not pending:
            ids, answer = waiting.get_nowait()
            tokens += len(ids)
            (batch if tokens <= batch_tokens else pending).append((ids, answer))
        ids, lengths = np.concatenate([each for each, _ in batch]), np.array([len(each) for each, _ in batch])
        try:
            found: Any = await asyncio.to_thread(classifier.probabilities_of_ids, ids, lengths, batch_tokens)
        except Exception as error:  # one answer must not end the service
            found = [error] * len(batch)
        for (_, answer), probabilities in zip(batch, found):
            if not answer.done():
                answer.set_result(probabilities)


async def read_texts(request: Request, takes_pairs: bool | None) -> tuple[list[Any], bool]:
    """Return a request's texts, and whether it asks for all probabilities; HTTPException for any other request."""

    async def read() -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_BODY:
                raise HTTPException(413, f"a request may have {LARGEST_BODY:,} bytes")
        return body

    try:
        body = json.loads(await asyncio.wait_for(read(), SECONDS_TO_ARRIVE))
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the request has not arrived within {SECONDS_TO_ARRIVE:g} seconds") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}"[:200]) from None
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_TEXTS:
        raise HTTPException(400, f"texts: a list of 1 to {MOST_TEXTS} texts is needed")
    parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
    if not all(isinstance(part, str) and len(part) <= LONGEST_TEXT for part in parts):
        raise HTTPException(400, f"texts: strings of up to {LONGEST_TEXT:,} characters are needed, or pairs of such")
    if takes_pairs is not None and any(isinstance(text, list) != takes_pairs for text in texts):
        raise HTTPException(400, f"texts: this model takes {'pairs of texts' if takes_pairs else 'single texts'}")
    return texts, bool(body.get("all_probabilities"))


def make_app(classifier: Classifier, batch_tokens: int, abstain_below: float) -> Starlette:
    """Return the service as an ASGI application."""
    waiting: asyncio.Queue[Any] = asyncio.Queue()
    counts: Any = Counter()
    task = classifier.task
    takes_pairs = read_json(classifier.folder / "config.json", "a model's folder is needed").get("text_pairs")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        computing = asyncio.create_task(compute(classifier, waiting, batch_tokens))
        yield
        computing.cancel()

    async def answers_to(request: Request) -> list[dict[str, Any]]:
        texts, all_probabilities = await read_texts(request, takes_pairs)
        try:
            ids, lengths = await asyncio.to_thread(classifier.encode, texts)
        except (UserError, TypeError) as error:
            raise HTTPException(400, str(error)) from None
        if waiting.qsize() + len(lengths) > MOST_WAITING:
            raise HTTPException(503, "too many texts are waiting; try again later")
        futures = [asyncio.get_running_loop().create_future() for _ in lengths]
        for each, future in zip(np.split(ids, np.cumsum(lengths)[:-1]), futures):
            waiting.put_nowait((each, future))
        found = await asyncio.gather(*futures)
        if any(isinstance(each, Exception) for each in found):
            raise HTTPException(500, "a text could not be classified")
        cells = [task.cells(each.tolist(), all_probabilities, abstain_below) for each in found]
        return [dict(zip(task.columns(all_probabilities), each)) for each in cells]

    async def classify(request: Request) -> Response:
        start, status = time.monotonic(), 200
        answer: Any = None
        try:
            answer = await answers_to(request)
            counts["sst2_xlmr_texts_total"] += len(answer)
        except HTTPException as error:
            status, answer = error.status_code, {"detail": error.detail}
        except ClientDisconnect:
            status = 400
        counts[f'sst2_xlmr_requests_total{{status="{status}"}}'] += 1
        counts["sst2_xlmr_seconds_total"] += time.monotonic() - start
        return JSONResponse(answer, status)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        values = {**counts, "sst2_xlmr_waiting_texts": waiting.qsize()}
        return PlainTextResponse("".join(f"{name} {value}\n" for name, value in values.items()))

    routes = [Route("/", classify, methods=["POST"]), Route("/healthz", healthz), Route("/metrics", metrics)]
    return Starlette(routes=routes, lifespan=lifespan)


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


def main(argv: list[str] | None = None) -> None:
    arguments = options.serve().parse_args(argv)
    keep_freed_memory()
    classifier = Classifier.load_mean(arguments.models, arguments.precision, arguments.device)
    check_options(classifier.task, arguments)
    app = make_app(classifier, arguments.batch_tokens, arguments.abstain_below)
    settings: dict[str, Any] = {"http": TimedProtocol, "limit_concurrency": MOST_CONNECTIONS, "log_level": "error"}
    settings |= {"h11_max_incomplete_event_size": LARGEST_HEAD, "timeout_graceful_shutdown": 30}
    models = " + ".join(map(str, arguments.models))
    say(f"serving    {models} in {classifier.precision} at http://{arguments.host}:{arguments.port}")
    uvicorn.run(app, host=arguments.host, port=arguments.port, **settings)
