"""A proxy that makes an S3 endpoint unreliable, from a fixed seed."""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, SECRET = "testkey", "marked-secret-Zq8sW2"
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please try again.</Message></Error>"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy(ThreadingHTTPServer):
    """Forwards to `upstream`; a share `rate` of the requests, from a fixed seed, is answered badly or not at all.

    Faults: 503 SlowDown, 500, a connection reset before the request is forwarded, and one after, when the answer is
    lost though the request came through. `plan` names the faults of the next requests instead.
    """

    daemon_threads = True

    def __init__(self, upstream, rate=0.0, seed=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream.removeprefix("http://")
        self._lock = threading.Lock()
        self.reset(rate, seed)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self, rate=0.0, seed=0):
        self.rate = rate
        self.plan = []
        self.requests = []
        self.faults = Counter()
        self.sent = 0
        """Bytes of answers to requests for a file or a range of one."""
        self._random = random.Random(seed)

    def handle_error(self, request, client_address):
        """Broken connections are what this is for."""

    def draw(self, method, path, span):
        with self._lock:
            self.requests.append((method, path, span))
            if self.plan:
                fault = self.plan.pop(0)
            else:
                bad = self._random.random() < self.rate
                fault = self._random.choice(["503", "500", "reset", "lost"]) if bad else None
            self.faults[fault] += 1
            return fault

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw(self.command, self.path, self.headers.get("Range"))
        if fault == "reset":
            return self._reset()
        if fault in ("503", "500"):
            text = ERROR.format(code={"503": "SlowDown", "500": "InternalError"}[fault]).encode()
            return self._answer(int(fault), {"Content-Type": "application/xml"}, text)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            result = upstream.getresponse()
            data, headers = result.read(), dict(result.getheaders())
        finally:
            upstream.close()
        if fault == "lost":
            return self._reset()
        self.server.sent += len(data) if self.command == "GET" else 0
        return self._answer(result.status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    def _answer(self, status, headers, data):
        self.send_response_only(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else len(data)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile.close = self.wfile.close = lambda: None

    def log_message(self, *args):
        """Tests are quiet."""
