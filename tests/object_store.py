"""An S3 server for tests, which can lose answers as a network does."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

Answer = Callable[[str, list[tuple[str, str]]], Any]


@dataclass
class Bucket:
    """A bucket on a server of this process.

    Attributes:
        url: Where it is.
        environment: What a program needs in its environment to write to it.
        lose_answer: Says of which requests, given their WSGI environment, the answer is replaced by an error 500.
        lost: How many answers were lost.
    """

    url: str
    environment: dict[str, str]
    lose_answer: Callable[[dict[str, Any]], bool] = lambda request: False
    lost: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def between(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return an application that stands between the client and the server."""

        def application(request: dict[str, Any], answer: Answer) -> Iterable[bytes]:
            with self._lock:
                lose = self.lose_answer(request)
                self.lost += lose
            if not lose:
                return app(request, answer)
            list(app(request, lambda *_: lambda _: None))
            answer("500 Internal Server Error", [("Content-Length", "0")])
            return []

        return application


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """Run a server with one bucket."""
    app = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto, an S3 server for tests, is not installed")
    boto3 = pytest.importorskip("boto3")
    from werkzeug.serving import make_server

    bucket = Bucket("s3://bucket", {})
    served = bucket.between(app.DomainDispatcherApplication(app.create_backend_app))
    server = make_server("127.0.0.1", 0, served, threaded=True, request_handler=app.MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    bucket.environment = {**keys, "AWS_REGION": "us-east-1", "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true"}
    # All servers of a process share their content.
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="bucket")
    yield bucket
    server.shutdown()
    server.server_close()
