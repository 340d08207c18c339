"""A server of files on this machine, which may cut its answers."""

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Gives files below /d4rl/, from any byte on."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        """Path -> content."""
        self.seen = []
        """(path, Range) of each request."""
        self.cut = 0
        """Bytes after which each answer ends; 0 = none."""
        self.with_ranges = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/d4rl"

    def handle_error(self, *_):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.seen.append((self.path, asked))
        content = server.files.get(self.path)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.with_ranges else 0
        status = 404 if content is None else 416 if start and start >= len(content) else 206 if start else 200
        body = content[start:] if status in (200, 206) else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status in (206, 416):
            self.send_header("Content-Range", f"bytes */{len(content)}")
        self.end_headers()
        self.wfile.write(body[: server.cut] if server.cut else body)
        if server.cut:
            self.close_connection = True

    def log_message(self, *_):
        pass
