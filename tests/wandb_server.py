"""A W&B server small enough for a test: it accepts runs, remembers what it is sent, and can go away."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class WandbServer:
    """Serves on a free port of this machine while the ``with`` block lasts, or until :meth:`stop`.

    Attributes:
        url: For ``WANDB_BASE_URL``.
        history: Rows of history that runs have streamed, in the order of arrival.
        operations: Names of the GraphQL operations that came in.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.operations: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer: dict[str, Any] = {}
                if self.path == "/graphql":
                    answer = server._graphql(json.loads(body))
                elif self.path.endswith("/file_stream"):
                    lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                    server.history += map(json.loads, lines)
                self._answer(answer)

            def do_GET(self) -> None:
                self._answer({})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer({})

            def _answer(self, content: dict[str, Any]) -> None:
                text = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        operation = found[1] if found else ""
        self.operations.append(operation)
        name = (request.get("variables") or {}).get("name") or "run"
        project = {"id": "P", "name": "test", "entity": {"id": "E", "name": "somebody"}}
        bucket = {"id": "UnVu", "name": name, "displayName": name, "config": "{}", "historyLineCount": 0, "project": project}
        known = {
            "Viewer": {
                "viewer": {"id": "V", "entity": "somebody", "username": "somebody", "email": "", "flags": "{}", "teams": {"edges": []}}
            },
            "RunResumeStatus": {"model": {**project, "bucket": None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        }
        return {"data": known[operation]} if operation in known else {"data": {}, "errors": [{"message": f"unknown: {operation}"}]}

    def stop(self) -> None:
        """Go away; connections are refused from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
