"""Both hubs' listings over HTTP, for the hubs' own libraries: what they would download, and no file of it."""

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import urlsplit

COMMIT = "f332072aa78be7aecdf3ee76d5c247082da564a6"


class FakeHub:
    """A hub that has one model, whose `files` are said to have these sizes."""

    def __init__(self, name: str, files: Mapping[str, int]) -> None:
        self.name, self.files = name, dict(files)
        self.downloads: list[str] = []  # the files that were asked for
        self.listings = 0

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> Any:
        """The JSON for a GET; None for what is not there."""
        if path == f"/api/models/{self.name}/revision/main":
            return {"id": self.name, "sha": COMMIT, "siblings": []}
        if path == f"/api/models/{self.name}/tree/{COMMIT}":
            self.listings += 1
            return [{"type": "file", "path": p, "size": s, "oid": f"{n:040x}"} for n, (p, s) in enumerate(self.items())]
        if path == f"/api/v1/models/{self.name}/repo/files":
            self.listings += 1
            files = [{"Path": p, "Size": s, "Type": "blob"} for p, s in self.items()]
            return {"Code": 200, "Success": True, "Data": {"Files": files}}
        return None

    def items(self) -> list[tuple[str, int]]:
        """The files, one of them of no use here."""
        return [*self.files.items(), ("assets/showcase.jpg", 5_000_000)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        answer = self.hub.answer(path)
        if answer is None and ("/resolve/" in path or path.endswith("/repo")):
            self.hub.downloads.append(path)
        body = json.dumps(answer).encode()
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Of Hugging Face's files."""
        file = urlsplit(self.path).path.partition(f"/resolve/{COMMIT}/")[2]
        self.send_response(200 if file in self.hub.files else 404)
        self.send_header("ETag", f'"{list(self.hub.files).index(file):040x}"' if file in self.hub.files else "")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(self.hub.files.get(file, 0)))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass
