"""Servers for tests that would otherwise need a network, each on a free port of 127.0.0.1 for as long as its `with`.

    with model_hub({"huggyllama/llama-7b": directory}) as hub:      # HF_ENDPOINT=hub.url
    with package_index(directory_of_wheels) as index:               # PIP_INDEX_URL=index.url
    with static_files(directory) as files:                          # files.url + "/name"

`as` gives a Served. A file need not arrive well: hold={its name: n} sends n bytes and nothing more until the `with`
ends, cut={its name: n} hangs up after n bytes, and flip={its name} sends its last byte wrong.
"""
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what "main" is in every repository of the model hub
LFS = (".safetensors", ".bin", ".gguf", ".model")  # the hub keeps these in LFS, and tells their SHA-256


class Served(NamedTuple):
    """A running server."""
    url: str
    requests: list  # ["GET /path?query", ...], as they came in
    held: threading.Event  # set when a file has reached its `hold`


@contextlib.contextmanager
def model_hub(repos, **faults):
    """The part of the hub's protocol by which huggingface_hub lists and downloads models. repos: {id: directory}."""
    def respond(handler, path):
        api = path.startswith("/api/models/")
        name = path[len("/api/models/"):] if api else path[1:]
        repo = next((repo for repo in repos if name == repo or name.startswith(repo + "/")), None)
        if repo is None:
            return handler.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        directory, rest = Path(repos[repo]), name[len(repo):].strip("/").split("/", 2)
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return handler.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api and rest[0] in ("", "revision"):
            siblings = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"],
                         **({"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {})}
                        for entry in _tree(directory)]
            return handler.send_json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})
        if api and rest[0] == "tree":
            return handler.send_json(_tree(directory))
        entry = {entry["path"]: entry for entry in _tree(directory)}.get(rest[2] if len(rest) > 2 else "")
        if rest[0] != "resolve" or entry is None:
            return handler.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers.update({"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])})
        return handler.send_file(directory / entry["path"], headers)

    with _serve(respond, **faults) as served:
        yield served


@contextlib.contextmanager
def package_index(directory, **faults):
    """A simple index (PEP 503) of the wheels in `directory`. It tells no hashes, so pip takes a file as it comes."""
    directory = Path(directory)

    def respond(handler, path):
        wheels = [file.name for file in sorted(directory.glob("*.whl"))]
        if path.startswith("/simple/") and path.endswith("/"):
            project = path[len("/simple/"):-1]
            links = [f'<a href="/wheels/{name}">{name}</a>' for name in wheels
                     if re.sub(r"[-_.]+", "-", name.split("-")[0]).lower() == project]
            return handler.send(200 if links else 404, "\n".join(links).encode(), {"Content-Type": "text/html"})
        name = path.removeprefix("/wheels/")
        return handler.send_file(directory / name) if name in wheels else handler.send(404)

    with _serve(respond, **faults) as served:
        yield served._replace(url=served.url + "/simple")


@contextlib.contextmanager
def static_files(directory, **faults):
    """The files of `directory` and below, as they are."""
    directory = Path(directory).resolve()

    def respond(handler, path):
        file = (directory / path.lstrip("/")).resolve()
        inside = file.is_file() and file.is_relative_to(directory)
        return handler.send_file(file) if inside else handler.send(404)

    with _serve(respond, **faults) as served:
        yield served


@contextlib.contextmanager
def _serve(respond, hold={}, cut={}, flip=()):
    """Answers each GET and HEAD by respond(handler, path), in a thread of its own."""
    requests, held, ended = [], threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            with contextlib.suppress(ConnectionError):  # the client was killed; some tests do that
                respond(self, unquote(urlsplit(self.path).path))

        do_HEAD = do_GET

        def send(self, status, body=b"", headers=(), name=None):
            """The answer; `name` is what hold, cut and flip go by."""
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in flip:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.wfile.write(body[:hold.get(name, cut.get(name))])
            self.wfile.flush()
            if name in hold:
                held.set()
                ended.wait()

        def send_json(self, value):
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send_file(self, file, headers=()):
            self.send(200, file.read_bytes(), {"Content-Type": "application/octet-stream", **dict(headers)}, file.name)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}", requests, held)
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _tree(directory):
    """The entries of the hub's tree listing: path, size, git's blob id, and for large files LFS's SHA-256."""
    entries = []
    for file in sorted(directory.rglob("*")):
        if file.is_file() and not file.relative_to(directory).parts[0].startswith(".cache"):
            data = file.read_bytes()
            entry = {"type": "file", "path": file.relative_to(directory).as_posix(), "size": len(data),
                     "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if file.suffix in LFS:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
    return entries
