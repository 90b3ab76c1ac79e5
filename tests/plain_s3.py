"""A run on S3 as a plain client sees it: a `Storage` that owes nothing to the one under test."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Protocol

from botocore.exceptions import ClientError

from fmnist_dist.checkpoint.storage import AlreadyExistsError, MissingError


class Server(Protocol):
    def client(self) -> Any:
        """Return a plain client of botocore."""


class PlainStorage:
    """`Storage` below a URL, each verb a request or two, without retries."""

    def __init__(self, server: Server, url: str) -> None:
        self.url = url
        self._bucket, self._prefix = split(url)
        self._client: Any = server.client()

    def create(self, path: str, data: bytes | memoryview) -> None:
        try:
            self._client.put_object(**self._at(path), Body=bytes(data), IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
            raise AlreadyExistsError(path) from error

    def read(self, path: str) -> bytes:
        try:
            return bytes(self._client.get_object(**self._at(path))["Body"].read())
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchKey":
                raise
            raise MissingError(path) from error

    def list(self, folder: str) -> list[str]:
        prefix = f"{self._prefix}{folder}/"
        return sorted({key.removeprefix(prefix).split("/")[0] for key in self._keys(prefix)})

    def delete(self, *paths: str) -> None:
        for path in paths:
            self._client.delete_object(**self._at(path))

    def delete_folder(self, folder: str) -> None:
        for key in self._keys(f"{self._prefix}{folder}/"):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def replace(self, path: str, data: bytes) -> None:
        """Put other bytes in the place of an object, as damage does."""
        self._client.put_object(**self._at(path), Body=data)

    def written_at(self, path: str) -> datetime:
        when: datetime = self._client.head_object(**self._at(path))["LastModified"]
        return when

    def paths(self) -> tuple[str, ...]:
        """Return the paths of all objects."""
        return tuple(key.removeprefix(self._prefix) for key in self._keys(self._prefix))

    def _keys(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix
        )
        for page in pages:
            yield from (each["Key"] for each in page.get("Contents", []))

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{path}"}


def split(url: str) -> tuple[str, str]:
    """Return the bucket of an s3:// URL and the prefix of the keys below it."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/" if prefix else ""
