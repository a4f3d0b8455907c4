"""A local server that misbehaves as it is told, and speaks enough of the Hugging Face Hub's protocol."""

import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" * 6 + "abcd"


class Server:
    """What is at each path, how it is answered instead, in turn (the last one duplicates), and what was asked for."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}  # path -> body
        # Path -> how to answer: body, status, length (the header's; None for none), headers, stall.
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.models: dict[str, dict[str, bytes]] = {}  # id -> file name -> body; its answers are those of /id/file
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.pause_s = 0.0
        self.released = threading.Event()

    def find(self, path: str) -> dict[str, Any]:
        path = path.partition("?")[0]
        found = self.hub_answer(path.strip("/").split("/"))
        path = path.replace(f"/resolve/{COMMIT}", "").replace("/resolve/main", "")
        answers = self.answers.get(path, [{}])
        told = answers.pop(0) if len(answers) > 1 else answers[0]
        if path in self.files:
            found = {"body": self.files[path]}
        return {**(found or {"status": 404, "body": b"not here"}), **told}

    def hub_answer(self, parts: list[str]) -> dict[str, Any] | None:
        """Answer what the Hub is asked: /api/models/ID/revision/REV, /api/models/ID/tree/REV, /ID/resolve/REV/FILE."""
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else [*parts, "", ""]
        files = self.models.get(f"{owner}/{name}")
        if files is None:
            return {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}} if is_api else None
        if len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
            return {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}
        if is_api:
            oids = {name: hashlib.sha1(body).hexdigest() for name, body in files.items()}
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": oid} for file, oid in oids.items()]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return {"body": json.dumps(tree if rest[:1] == ["tree"] else info).encode()}
        if rest[2] not in files:
            return {"status": 404, "headers": {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}}
        body = files[rest[2]]
        return {"body": body, "headers": {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server_state: Server, *args: Any) -> None:
        self.state = server_state
        super().__init__(*args)

    def do_GET(self) -> None:
        self.state.requests.append((self.command, self.path))
        self.state.tokens.append(self.headers.get("Authorization"))
        answer = self.state.find(self.path)
        body = answer.get("body", b"")
        time.sleep(self.state.pause_s)
        self.send_response(answer.get("status", 200))
        length = answer.get("length", len(body))
        for name, value in {"Content-Length": length, **answer.get("headers", {})}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
            if answer.get("stall"):
                self.state.released.wait(60)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http_server:
        state = Server(http_server.server_address[1])
        http_server.RequestHandlerClass = functools.partial(Handler, state)
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.released.set()
        http_server.shutdown()
        thread.join()
