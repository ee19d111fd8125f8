"""A server on loopback that answers as the Hugging Face hub does, as far as uploading small files of a model needs it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "owner/encoder"
TOKEN = "hf_secret"


class ModelHub:
    """Keeps what is created and committed with the right token."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.committed: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, {"error": "Invalid username or password."})
                    return
                match self.path.removeprefix("/api/"):
                    case "repos/create":
                        hub.created.append(json.loads(body))
                        self._answer(200, {"url": f"{hub.endpoint}/{REPOSITORY}"})
                    case "validate-yaml":
                        self._answer(200, {"errors": [], "warnings": []})
                    case path if path == f"models/{REPOSITORY}/preupload/main":
                        files = [
                            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for file in json.loads(body)["files"]
                        ]
                        self._answer(200, {"files": files})
                    case path if path == f"models/{REPOSITORY}/commit/main":
                        for line in map(json.loads, body.splitlines()):
                            if line["key"] == "file":
                                hub.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                        address = f"{hub.endpoint}/{REPOSITORY}/commit/1"
                        self._answer(200, {"commitUrl": address, "commitOid": "1", "hookOutput": ""})
                    case _:
                        self._answer(404, {"error": f"unknown: {self.path}"})

            def _answer(self, status: int, value: object) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
