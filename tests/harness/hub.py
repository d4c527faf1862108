"""
A stand-in for the Hugging Face hub: what its client asks of one to list and download a repository.

A path is answered by `instead` where that returns something, and whole otherwise. A file that `cut_off` names loses its
connection in the middle the first time; what is left of it can be asked for by range.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

Answer = tuple[int, bytes, dict[str, str]]

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving_hub(
    repositories: Mapping[str, Mapping[str, bytes]],
    *,
    instead: Callable[[str], Answer | None] = lambda _: None,
    cut_off: str = "",
) -> Iterator[tuple[str, list[str]]]:
    """Serve files by repository and path at the revisions `main` and v1. Give the URL and the paths asked for."""
    asked: list[str] = []
    to_cut = {cut_off} - {""}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            asked.append(path)
            status, body, headers = instead(path) or _found(path, repositories)
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if start and status == 200:
                asked.append(f"{path} from {start}")
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[start:]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and any(path.endswith(name) for name in to_cut):
                to_cut.clear()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _found(path: str, repositories: Mapping[str, Mapping[str, bytes]]) -> Answer:
    for name, files in repositories.items():
        if path.startswith(f"api/models/{name}"):
            return _listed(name, files, path.removeprefix(f"api/models/{name}").strip("/"))
        if path.startswith(f"{name}/resolve/"):
            _, _, file = path.removeprefix(f"{name}/resolve/").partition("/")
            if file in files:
                etag = hashlib.sha256(files[file]).hexdigest()
                return 200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
    return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}


def _listed(name: str, files: Mapping[str, bytes], rest: str) -> Answer:
    kind, _, revision = rest.partition("/")
    if kind in {"tree", "revision"} and revision.partition("/")[0] not in ("main", "v1", SHA):
        return 404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"}
    if kind == "tree":
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        return 200, json.dumps(entries).encode(), {"Content-Type": "application/json"}
    siblings = [{"rfilename": path} for path in files]
    body = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
    return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}
