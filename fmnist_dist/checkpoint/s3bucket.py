"""The objects of one S3 bucket: how each is written, read, listed and deleted, in requests.

See `s3` for what the storage promises. Everything here runs on the thread of the client.
"""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from posixpath import commonpath
from typing import Any

from fmnist_dist import limits
from fmnist_dist.checkpoint.s3client import Patience, S3Client, S3Failure, together
from fmnist_dist.checkpoint.s3errors import Meaning

_PART_BYTES = 16 * 2**20  # of one request, up or down; S3 takes at least 5 MiB and 10,000 parts
_PARTS = 10_000
_WHOLE_BYTES = 32 * 2**20  # up to here one put
_AT_ONCE = 4  # requests of one operation: more is not faster, and copies more at a time
_CHUNK_BYTES = 2**18
_AT_A_STRETCH_BYTES = 2**20  # sent without a look at other requests
_UPLOAD_TRIES = 3  # of a whole upload that another one had got in the way of
_DELETED_AT_ONCE = 1_000
_IF_ABSENT = {"IfNoneMatch": "*"}


class Bucket:
    """One bucket. Every method raises `S3Failure`; keys and prefixes are those of the store.

    `single_writer` makes put-if-absent out of a look and a put, where the store has none.
    """

    def __init__(self, name: str, client: S3Client, *, single_writer: bool) -> None:
        self._name = name
        self._client = client
        self._single_writer = single_writer

    async def create(self, key: str, data: memoryview) -> None:
        """Put an object where there is none; `Meaning.TAKEN` is raised where there is one."""
        patience = Patience.of(len(data))
        if self._single_writer and await self._exists(key, patience):
            raise S3Failure(Meaning.TAKEN, "it exists")
        send = self._put if len(data) <= _WHOLE_BYTES else self._upload
        try:
            await send(key, data, patience, _IF_ABSENT)
        except S3Failure as failure:
            if failure.meaning is not Meaning.UNSUPPORTED or not self._single_writer:
                raise
            await send(key, data, patience, {})

    async def read(self, key: str) -> bytes:
        """Read by ranges: the first tells the size, the others follow while it still comes."""
        patience = Patience.of(0)  # until the size is known: most of what is read is small
        known: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        buffer = io.BytesIO()

        async def fetch(start: int) -> None:
            await self._client.attempt(
                lambda: self._range(key, start, buffer, known), patience, size=_PART_BYTES
            )

        async def rest() -> None:
            size = await known
            patience.extend(size)
            starts = range(_PART_BYTES, size, _PART_BYTES)
            await together([partial(fetch, start) for start in starts], at_once=_AT_ONCE - 1)

        both: list[Callable[[], Awaitable[None]]] = [partial(fetch, 0), rest]
        try:
            await together(both, at_once=len(both))
        except S3Failure as failure:
            if failure.meaning is Meaning.EMPTY:
                return b""
            raise
        return buffer.getvalue()  # no copy: it is as long as it was made

    async def names(self, prefix: str) -> list[str]:
        """Return what lies under a prefix, one level deep.

        Asked without a delimiter: some stores go on naming "folders" that hold nothing any more. In
        a run's folders it costs little: an old checkpoint is one object.
        """
        patience = Patience.of(0)
        keys = [upload["Key"] async for upload in self._unfinished(prefix, patience)]
        async for page in self._objects(prefix, patience):
            keys += page
        inside = (key.removeprefix(prefix) for key in keys if not key.endswith("/"))
        return sorted({name.partition("/")[0] for name in inside})

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, and abort uploads to their keys: lost answers may have left some."""
        if not keys:
            return
        patience = Patience.of(0)
        await self._delete(keys, patience)
        async for upload in self._unfinished(commonpath(keys), patience):
            if upload["Key"] in keys:
                await self._abort({"Bucket": self._name, **upload})

    async def delete_all(self, prefix: str) -> None:
        """Delete all objects under a prefix, and abort what is being uploaded to there."""
        patience = Patience.of(0)
        async for page in self._objects(prefix, patience):
            await self._delete(page, patience)
        async for upload in self._unfinished(prefix, patience):
            await self._abort({"Bucket": self._name, **upload})

    async def _delete(self, keys: Sequence[str], patience: Patience) -> None:
        """Delete objects: one, or in one request for each 1,000 of them, the most that S3 takes."""
        if len(keys) == 1:
            await self._delete_one(keys[0], patience)
            return
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            batch = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
            wanted = {"Objects": batch, "Quiet": True}
            answer = await self._client.call(
                "delete_objects", patience, {"Bucket": self._name, "Delete": wanted}
            )
            for error in answer.get("Errors", ()):
                refused = error.get("Code") == "AccessDenied"
                meaning = Meaning.REFUSED if refused else Meaning.WRONG
                raise S3Failure(meaning, f"the store answered {error.get('Code')}")

    async def _delete_one(self, key: str, patience: Patience) -> None:
        try:
            await self._client.call("delete_object", patience, self._at(key))
        except S3Failure as failure:
            if failure.meaning is not Meaning.MISSING:
                raise

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._name, "Key": key}

    async def _exists(self, key: str, patience: Patience) -> bool:
        try:
            await self._client.call("head_object", patience, self._at(key))
        except S3Failure as failure:
            if failure.meaning is Meaning.MISSING:
                return False
            raise
        return True

    async def _put(
        self, key: str, data: memoryview, patience: Patience, condition: Mapping[str, str]
    ) -> None:
        await self._send("put_object", {**self._at(key), **condition}, data, patience)

    async def _send(
        self, method: str, arguments: Mapping[str, Any], data: memoryview, patience: Patience
    ) -> dict[str, Any]:
        """Send bytes; the one copy of them lasts as long as they are under way."""

        def send() -> Awaitable[dict[str, Any]]:
            body = bytes(data) if len(data) <= _AT_A_STRETCH_BYTES else io.BytesIO(data)
            return self._client.request(method, {**arguments, "Body": body})

        return await self._client.attempt(send, patience, size=len(data), is_upload=True)

    async def _upload(
        self, key: str, data: memoryview, patience: Patience, condition: Mapping[str, str]
    ) -> None:
        for _ in range(_UPLOAD_TRIES - 1):
            try:
                return await self._upload_once(key, data, patience, condition)
            except S3Failure as failure:
                if failure.meaning is not Meaning.CONFLICT:
                    raise
        return await self._upload_once(key, data, patience, condition)

    async def _upload_once(
        self, key: str, data: memoryview, patience: Patience, condition: Mapping[str, str]
    ) -> None:
        began = await self._client.call("create_multipart_upload", patience, self._at(key))
        upload = {**self._at(key), "UploadId": began["UploadId"]}
        size = max(_PART_BYTES, -(-len(data) // _PARTS))

        async def part(number: int) -> dict[str, Any]:
            piece = data[(number - 1) * size : number * size]
            answer = await self._send(
                "upload_part", {**upload, "PartNumber": number}, piece, patience
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        numbers = range(1, -(-len(data) // size) + 1)
        try:
            parts = await together([partial(part, each) for each in numbers], at_once=_AT_ONCE)
            whole = {**upload, "MultipartUpload": {"Parts": parts}}
            await self._complete(whole, patience, condition)
        except BaseException:  # a cancelled one leaves nothing behind either
            with contextlib.suppress(S3Failure):  # out of reach: a sweep finds it
                await self._abort(upload)
            raise

    async def _complete(
        self, upload: Mapping[str, Any], patience: Patience, condition: Mapping[str, str]
    ) -> None:
        try:
            await self._client.call(
                "complete_multipart_upload",
                patience,
                {**upload, **condition},
                again={Meaning.TRANSIENT},  # after a conflict all parts have to be sent again
            )
        except S3Failure as failure:
            if failure.meaning is Meaning.NO_UPLOAD and await self._exists(upload["Key"], patience):
                # It was complete already, and the answer was lost.
                raise S3Failure(Meaning.TAKEN, "it exists") from failure
            raise

    async def _abort(self, upload: Mapping[str, Any]) -> None:
        patience = Patience.until(limits.STORAGE_REQUEST_SECONDS)
        try:
            await self._client.call("abort_multipart_upload", patience, upload)
        except S3Failure as failure:
            if failure.meaning not in {Meaning.NO_UPLOAD, Meaning.MISSING}:
                raise

    async def _range(
        self, key: str, start: int, buffer: io.BytesIO, known: "asyncio.Future[int]"
    ) -> None:
        """Read one range into its place, and tell the size of the whole."""
        wanted = f"bytes={start}-{start + _PART_BYTES - 1}"
        answer = await self._client.request("get_object", {**self._at(key), "Range": wanted})
        body, position = answer["Body"], start
        try:
            size = int(answer["ContentRange"].rpartition("/")[2])
            if not known.done():
                buffer.seek(size - 1)
                buffer.write(b"\0")
                known.set_result(size)
            while chunk := await body.read(_CHUNK_BYTES):
                buffer.seek(position)
                buffer.write(chunk)
                position += len(chunk)
        finally:
            body.close()  # and the connection with it, unless all was read
        if position != min(start + _PART_BYTES, size):
            raise ConnectionError(f"the answer ended after {position - start} bytes")

    async def _objects(self, prefix: str, patience: Patience) -> AsyncIterator[list[str]]:
        """Yield the keys under a prefix, page by page (of at most 1,000)."""
        more: dict[str, str] | None = {}
        while more is not None:
            wanted = {"Bucket": self._name, "Prefix": prefix, **more}
            page = await self._client.call("list_objects_v2", patience, wanted)
            yield [each["Key"] for each in page.get("Contents", ())]
            token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
            more = {"ContinuationToken": token} if token else None

    async def _unfinished(self, prefix: str, patience: Patience) -> AsyncIterator[dict[str, str]]:
        """Yield the uploads under a prefix that were begun, and neither completed nor aborted."""
        more: dict[str, str] | None = {}
        while more is not None:
            wanted = {"Bucket": self._name, "Prefix": prefix, **more}
            try:
                page = await self._client.call("list_multipart_uploads", patience, wanted)
            except S3Failure as failure:
                if failure.meaning in {Meaning.UNSUPPORTED, Meaning.REFUSED}:
                    return  # not to be had here: the bucket's own rules end them
                raise
            for each in page.get("Uploads", ()):
                if each["Key"].startswith(prefix):
                    yield {"Key": each["Key"], "UploadId": each["UploadId"]}
            more = None
            if page.get("IsTruncated"):
                more = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker")}
