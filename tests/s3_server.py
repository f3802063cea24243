"""A real S3 server of this test's own: moto's, in a process on a free port. Counts the objects that were asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "bucket"
PORT_LINE = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")
GET_LINE = re.compile(r'"GET /' + BUCKET + r"/(\S+?)(?:\?\S*)? HTTP")


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server with an empty bucket."""

    endpoint: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which fsspec finds it."""
        return {
            "FSSPEC_S3": json.dumps({"endpoint_url": self.endpoint}),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A boto3 client of it."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id="test", aws_secret_access_key="test",
            region_name="us-east-1",
        )  # fmt: skip

    def upload(self, folder: Path, name: str) -> str:
        """Copy a dataset folder there; returns its URL."""
        client = self.client()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder).as_posix()}")
        return f"s3://{BUCKET}/{name}"

    def gets(self, ending: str) -> Counter[str]:
        """How often each object was asked for whose name ends so."""
        found = GET_LINE.findall(self.log.read_text())
        return Counter(name for name in found if name.endswith(ending))


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server, and end it with its tests."""
    log = folder / "s3.log"
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while (found := PORT_LINE.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
        server = S3Server(endpoint=f"http://127.0.0.1:{found.group(1)}", log=log)
        urllib.request.urlopen(server.endpoint).close()
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.terminate()
        process.wait()
