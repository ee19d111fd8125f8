"""A server on loopback that answers as the Hugging Face hub does, as far as reading a data set needs it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATASET = "owner/name"


class Hub:
    """Serves the files of a folder as the data set `owner/name`; counts the bytes of files that it hands out."""

    def __init__(self, folder: Path) -> None:
        self.num_bytes = 0
        self.num_failures_left = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _send(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), Content_Type="application/json")

            def _entries(self, below: str) -> list[dict[str, object]]:
                paths = sorted((folder / below).rglob("*"))
                return [
                    {
                        "type": "file" if path.is_file() else "directory",
                        "oid": "0" * 40,
                        "size": path.stat().st_size if path.is_file() else 0,
                        "path": path.relative_to(folder).as_posix(),
                    }
                    for path in paths
                ]

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                api, tree = f"/api/datasets/{DATASET}", f"/api/datasets/{DATASET}/tree/main"
                if path in (api, f"{api}/revision/main"):
                    self._json(
                        {"id": DATASET, "_id": "1", "sha": "1" * 40, "private": False, "tags": [], "downloads": 0}
                    )
                elif path.startswith(tree):
                    self._json(self._entries(path.removeprefix(tree).strip("/")))
                elif path.startswith(f"/datasets/{DATASET}/resolve/main/"):
                    self._file(folder / path.removeprefix(f"/datasets/{DATASET}/resolve/main/"))
                else:
                    self._send(404, b"{}", X_Error_Code="EntryNotFound")

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                wanted = json.loads(body)["paths"]
                self._json([entry for entry in self._entries("") if entry["path"] in wanted])

            def _file(self, file: Path) -> None:
                content = file.read_bytes()
                if hub.num_failures_left:
                    hub.num_failures_left -= 1
                    self._send(503, b"busy")
                    return
                begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                part = content[int(begin) : int(end or len(content) - 1) + 1]
                hub.num_bytes += len(part)
                last = int(begin) + len(part) - 1
                self._send(206, part, Content_Range=f"bytes {begin}-{last}/{len(content)}", ETag='"1"')

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
