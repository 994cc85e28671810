"""A real moto server that writes down its requests and can be told to be slow or to fail.

python -m tests.store.bucket_server PORT FOLDER

FOLDER/requests.jsonl   a line a request: method, path, bytes that came, status, bytes that went, which piece of the file
FOLDER/delay            seconds that each request for a file of a remote takes longer, while this is there
FOLDER/busy             how many of the next requests are answered with HTTP 503
Conditional writes are done one at a time: moto looks and writes in two steps, where S3 does it in one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

ONE_AT_A_TIME = threading.Lock()
WRITING = threading.Lock()


class Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


def watched(app, folder: Path):
    def serve(environ, start_response):
        path = environ["PATH_INFO"]
        part = next((word for word in environ.get("QUERY_STRING", "").split("&") if word.startswith("partNumber=")), "")
        record = {
            "method": environ["REQUEST_METHOD"], "path": path, "came": int(environ.get("CONTENT_LENGTH") or 0),
            "piece": f"{part} {environ.get('HTTP_RANGE', '')}".strip(),
        }  # fmt: skip
        if "/files/" in path:
            with contextlib.suppress(FileNotFoundError, ValueError):
                time.sleep(float((folder / "delay").read_text()))

        def start(status, headers, *rest):
            record["status"] = int(status.split()[0])
            record["went"] = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
            with WRITING, (folder / "requests.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            return start_response(status, headers, *rest)

        if is_busy(folder):
            start("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        with ONE_AT_A_TIME if environ.get("HTTP_IF_NONE_MATCH") else contextlib.nullcontext():
            return app(environ, start)

    return serve


def is_busy(folder: Path) -> bool:
    with WRITING, contextlib.suppress(FileNotFoundError, ValueError):
        left = int((folder / "busy").read_text())
        (folder / "busy").write_text(str(left - 1))
        return left > 0
    return False


if __name__ == "__main__":
    run_simple(
        "127.0.0.1",
        int(sys.argv[1]),
        watched(DomainDispatcherApplication(create_backend_app), Path(sys.argv[2])),
        threaded=True,
        request_handler=Quiet,
    )
