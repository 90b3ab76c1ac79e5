"""Small stand-ins for published data: four IDX files, and a real web server that serves them."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from fmnist_dist.data.dataset import DatasetSpec, decode_idx
from fmnist_dist.data.files import Contents, DataFile
from fmnist_dist.data.sources import Origin

Answer = Callable[[BaseHTTPRequestHandler], None]


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 30), ("t10k", 10)):
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(random.integers(0, 256, (count, 28, 28)))
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(random.integers(0, 10, count))
    return files


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def data_files(files: Mapping[str, bytes]) -> tuple[DataFile, ...]:
    return tuple(
        DataFile(
            name=name,
            sha256=hashlib.sha256(data).hexdigest(),
            gz_md5=hashlib.md5(packed(data)).hexdigest(),
        )
        for name, data in files.items()
    )


def small_spec(origin: Origin) -> DatasetSpec:
    return DatasetSpec(
        title="Small",
        origin=origin,
        decode=decode_idx,
        class_names=tuple("0123456789"),
        image_shape=(1, 28, 28),
        mean=(0.5,),
        std=(0.25,),
    )


def as_bytes(contents: Contents) -> dict[str, bytes]:
    return {name: content.tobytes() for name, content in contents.items()}


def flipped(data: bytes, *, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Fetch:
    """A source that hands out `small_files()` and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Contents:
        self.count += 1
        files = small_files()
        return {name: np.frombuffer(bytearray(files[name]), np.uint8) for name in files}


def never() -> Contents:
    raise AssertionError("fetched, although the cache was whole")


def write_folder(folder: Path, files: Mapping[str, bytes], *, gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (f"{name}.gz" if gz else name)).write_bytes(packed(data) if gz else data)
    return folder


def sends(body: bytes, *, status: int = 200, claim: int | None = None) -> Answer:
    """Answer with `body`, claiming to send `claim` bytes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if claim is None else claim))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


class Mirror:
    """Answers each path with the next of its answers, the last one for ever; counts requests."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.answers = {f"/{name}.gz": [sends(packed(data))] for name, data in files.items()}
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.url = ""

    @contextmanager
    def serve(self) -> Iterator["Mirror"]:
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                answers = mirror.answers.get(self.path, [sends(b"", status=404)])
                answer = answers[0] if len(answers) == 1 else answers.pop(0)
                try:
                    answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}/"
            try:
                yield self
            finally:
                self.closing.set()
                server.shutdown()
                thread.join()
