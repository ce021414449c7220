"""A proxy before a SuperLink that passes on some paths alone, as the server block of docs/flower.md does."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from tests.support.flower_keys import Certificates

# Of the connection to either side, not of the message.
OWN_HEADERS = {"connection", "host", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class PathProxy:
    """Listens on 127.0.0.1 with a SuperLink's certificate until the context ends; `port` is where.

    `passed` and `refused` are the paths that were asked for.
    """

    def __init__(self, port: int, superlink: str, certificates: Certificates, path: str) -> None:
        self.passed: set[str] = set()
        self.refused: set[str] = set()
        trust = ssl.create_default_context(cafile=str(certificates.authority))
        client = httpx.Client(base_url=f"https://{superlink}", verify=trust, timeout=60, trust_env=False)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if not self.path.startswith(path):
                    proxy.refused.add(self.path)
                    self._answer(403, [], b"")
                    return
                proxy.passed.add(self.path)
                headers = [(name, value) for name, value in self.headers.items() if name.lower() not in OWN_HEADERS]
                answer = client.post(self.path, content=body, headers=headers)
                self._answer(answer.status_code, answer.headers.multi_items(), answer.content)

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in OWN_HEADERS:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Write nothing."""

        self._client, self._server = client, ThreadingHTTPServer(("127.0.0.1", port), Handler)
        own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.load_cert_chain(certificates.certificate, certificates.key)
        self._server.socket = own.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> PathProxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._client.close()
