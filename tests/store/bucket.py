"""A bucket of a real S3 server (moto) in a process of its own, and what has been asked of it."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class BucketServer:
    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Bucket:
    """One bucket, empty at first."""

    server: BucketServer
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/pesc"

    @property
    def files(self):
        import s3fs

        return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def names(self) -> list[str]:
        """Everything in it, relative to the remote."""
        return sorted(path.removeprefix(f"{self.name}/pesc/") for path in self.files.find(self.name))

    def requests(self) -> list[dict]:
        lines = (self.server.folder / "requests.jsonl").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["path"].startswith(f"/{self.name}")]

    def moved(self, method: str) -> Counter[str]:
        """SHA-256 -> how often a file of the remote, or one of its pieces, was sent (PUT) or fetched (GET)."""
        counts: Counter[tuple[str, str]] = Counter()
        for record in self.requests():
            found = re.search(r"/files/../([0-9a-f]{64})$", record["path"])
            if found and record["method"] == method and record["status"] < 300:
                counts[found[1], record["piece"]] += 1
        most: Counter[str] = Counter()
        for (sha256, _), count in counts.items():
            most[sha256] = max(most[sha256], count)
        return most

    def moved_bytes(self, method: str) -> int:
        sizes = {"PUT": "came", "GET": "went"}[method]
        return sum(record[sizes] for record in self.requests() if "/files/" in record["path"] and record["method"] == method)

    def slow(self, seconds: float | None) -> None:
        """Each request for a file takes so much longer; None: as fast as it can."""
        path = self.server.folder / "delay"
        path.unlink(missing_ok=True) if seconds is None else path.write_text(str(seconds))


def start_server(folder: Path) -> BucketServer:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.bucket_server", str(port), str(folder)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, **CREDENTIALS},
        )
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return BucketServer(port, folder, process)
        except OSError:
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < end, "the S3 server did not start"
            time.sleep(0.05)


def new_bucket(server: BucketServer) -> Bucket:
    bucket = Bucket(server, f"b{secrets.token_hex(6)}")
    bucket.slow(None)
    bucket.files.mkdir(bucket.name)
    return bucket
