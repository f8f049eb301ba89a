"""Stands in for Google Cloud Storage: its JSON API over HTTP on this machine, as far as the clients of a run use it.

    with FakeStore("bucket") as store:
        subprocess.run(..., env={**os.environ, **store.environment})

It follows the rules that a run depends on: an object is there as a whole or not at all, has a generation that grows
with every write, and is listed as soon as it was written; there are no folders, only names with slashes.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """An object. `generation`: grows with every write; `written`: seconds since 1970."""

    content: bytes
    generation: int
    written: float


class FakeStore:
    """A store with one bucket.

    Attributes:
      objects: by name.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.objects: dict[str, Stored] = {}
        self.lock = threading.RLock()
        self._generation = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", 0), handler)

    def __enter__(self) -> FakeStore:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What its clients read: Google's own and gcsfs, and TensorStore. Nobody has to log in."""
        address = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            # It has no buckets of other kinds, about which it could be asked in another protocol.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "project",
            # Nor is there a machine of Google's to ask who this is.
            "NO_GCE_CHECK": "true",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def write(self, name: str, content: bytes) -> Stored:
        with self.lock:
            self._generation += 1
            self.objects[name] = Stored(content, self._generation, time.time())
            return self.objects[name]

    def described(self, name: str) -> dict[str, Any]:
        """What the API says of an object."""
        stored = self.objects[name]
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.written)) + ".000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.bucket,
            "size": str(len(stored.content)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(stored.content).digest()).decode(),
            "timeCreated": at,
            "updated": at,
            "contentType": "application/octet-stream",
        }


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, or was killed, is no failure of the store's."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one client."""

    protocol_version = "HTTP/1.1"
    store: FakeStore

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _parsed(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, {"error": {"code": status, "message": why}})

    def _object(self, path: str) -> str:
        return urllib.parse.unquote(path.rpartition("/o/")[2])

    def _refused(self, name: str, query: dict[str, str]) -> bool:
        """Whether the object is not of the generation that the client expects; then it is told so."""
        found = self.store.objects.get(name)
        generation = found.generation if found else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            self._refuse(412, "another generation")
            return True
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            self._answer(304)
            return True
        return False

    def do_GET(self) -> None:
        path, query = self._parsed()
        with self.store.lock:
            if "/o/" in path:
                self._read(self._object(path), query, is_content=query.get("alt") == "media")
            elif path.endswith("/o"):
                self._list(query)
            elif path.endswith(f"/b/{self.store.bucket}"):
                self._answer(200, {"kind": "storage#bucket", "name": self.store.bucket, "location": "HERE"})
            else:
                self._refuse(404, f"nothing at {path}")

    def _read(self, name: str, query: dict[str, str], is_content: bool) -> None:
        if name not in self.store.objects:
            return self._refuse(404, f"no object {name}")
        if self._refused(name, query):
            return None
        if not is_content:
            return self._answer(200, self.store.described(name))
        stored = self.store.objects[name]
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(stored.generation)}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self._answer(200, stored.content, headers)
        size = len(stored.content)
        first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
        if first >= size:
            return self._refuse(416, "beyond its end")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._answer(206, stored.content[first : last + 1], headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names, folders = [], set()
        for name in sorted(self.store.objects):
            is_wanted = name.startswith(prefix) and query.get("startOffset", "") <= name
            if not is_wanted or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                names.append(name)
        items = [self.store.described(name) for name in names]
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def do_POST(self) -> None:
        path, query = self._parsed()
        body = self._body()
        with self.store.lock:
            if path.startswith("/upload/"):
                self._upload(query, body)
            elif moved := re.fullmatch(r".*/o/(.+)/(moveTo|copyTo|rewriteTo)/(?:b/[^/]+/)?o/(.+)", path):
                self._copy(urllib.parse.unquote(moved[1]), moved[2], urllib.parse.unquote(moved[3]))
            else:
                self._refuse(404, f"nothing at {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().strip(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        name = query.get("name", "")
        if query.get("uploadType") == "resumable":
            name = name or json.loads(body)["name"]
            link = f"http://{self.headers['Host']}/upload/session?name={urllib.parse.quote(name, safe='')}"
            self._answer(200, b"", {"Location": link})
            return
        if query.get("uploadType") == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, part, _ = body.split(b"--" + boundary)
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            # The line break before the boundary is no content.
            body = re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1])
        if not self._refused(name, query):
            self.store.write(name, body)
            self._answer(200, self.store.described(name))

    def do_PUT(self) -> None:
        """The content of a resumable upload, in one part or in several."""
        _, query = self._parsed()
        body = self._body()
        name, given = query["name"], self.headers.get("Content-Range", "")
        with self.store.lock:
            parts = self.store.__dict__.setdefault("parts", {})
            parts[name] = parts.get(name, b"") + body
            if given.endswith("/*"):
                self._answer(308, b"", {"Range": f"bytes=0-{len(parts[name]) - 1}"})
            else:
                self.store.write(name, parts.pop(name))
                self._answer(200, self.store.described(name))

    def _copy(self, source: str, how: str, target: str) -> None:
        if source not in self.store.objects:
            self._refuse(404, f"no object {source}")
            return
        self.store.write(target, self.store.objects[source].content)
        if how == "moveTo":
            del self.store.objects[source]
        described = self.store.described(target)
        self._answer(200, {"done": True, "resource": described} if how == "rewriteTo" else described)

    def do_DELETE(self) -> None:
        path, query = self._parsed()
        name = self._object(path)
        with self.store.lock:
            if self._refused(name, query):
                return
            if self.store.objects.pop(name, None) is None:
                self._refuse(404, f"no object {name}")
            else:
                self._answer(204)
