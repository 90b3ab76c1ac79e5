"""The proxy does to a plain client what its tests of storage rely on, and counts it."""

import re
from typing import Any

import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session
from faulty_proxy import Fault, FaultyProxy
from seaweed import BUCKET, READER, REGION, WRITER, Key, Seaweed

BODY = bytes(range(256)) * 40
SHORT_SECONDS = 0.5


def client(endpoint: str, key: Key = WRITER, *, seconds: float = 20.0) -> Any:
    return Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=key.access,
        aws_secret_access_key=key.secret,
        config=Config(retries={"total_max_attempts": 1}, read_timeout=seconds),
    )


def code_of(error: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    answer = error.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def test_without_faults_everything_passes(s3_proxy: FaultyProxy) -> None:
    there = client(s3_proxy.endpoint)
    where = {"Bucket": BUCKET, "Key": "proxy/a b+c/x=1"}
    there.put_object(**where, Body=BODY, IfNoneMatch="*")
    assert there.get_object(**where)["Body"].read() == BODY
    assert there.get_object(**where, Range="bytes=5-9")["Body"].read() == BODY[5:10]
    assert there.head_object(**where)["ContentLength"] == len(BODY)
    with pytest.raises(ClientError) as taken:
        there.put_object(**where, Body=BODY, IfNoneMatch="*")
    assert code_of(taken) == (412, "PreconditionFailed")
    listed = there.list_objects_v2(Bucket=BUCKET, Prefix="proxy/a b+c/")
    assert [each["Key"] for each in listed["Contents"]] == ["proxy/a b+c/x=1"]
    there.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": where["Key"]}]})
    with pytest.raises(ClientError) as gone:
        there.get_object(**where)
    assert code_of(gone) == (404, "NoSuchKey")


@pytest.mark.slow
def test_each_fault_happens_as_often_as_it_should_and_to_what_it_should(
    seaweed: Seaweed, s3_proxy: FaultyProxy
) -> None:
    there = client(s3_proxy.endpoint, seconds=SHORT_SECONDS)

    def put(key: str, **how: str) -> None:
        there.put_object(Bucket=BUCKET, Key=f"faults/{key}", Body=BODY, **how)

    def get(key: str) -> bytes:
        return there.get_object(Bucket=BUCKET, Key=f"faults/{key}")["Body"].read()

    with s3_proxy.during(Fault("error", "PUT", "/b$", status=503, code="SlowDown", skip=1)) as it:
        put("a")
        put("b")
        with pytest.raises(ClientError) as slow_down:
            put("b")
        put("b")
    assert code_of(slow_down) == (503, "SlowDown")
    assert it.happened == 1
    for kind, is_there in (("cut", False), ("lost", True), ("late", True), ("stalled", False)):
        with s3_proxy.during(Fault(kind, "PUT", f"/{kind}$")), pytest.raises(BotoCoreError):
            put(kind)
        s3_proxy.settle()
        assert (f"faults/{kind}" in seaweed.objects(f"s3://{BUCKET}")) == is_there, kind
    for kind in ("truncated", "hanging"):
        with s3_proxy.during(Fault(kind, "GET", "/a$")) as it, pytest.raises(BotoCoreError):
            get("a")
        assert it.happened == 1
        assert get("a") == BODY
    with s3_proxy.during(Fault("slow", "GET", "/a$", rate=50_000)):
        assert get("a") == BODY
    with s3_proxy.during(Fault("deaf", "PUT")) as it:
        put("a", IfNoneMatch="*")
    assert it.happened == 1
    with pytest.raises(ClientError) as taken:
        put("a", IfNoneMatch="*")
    assert code_of(taken) == (412, "PreconditionFailed")
    assert len([each for each in s3_proxy.requests if re.fullmatch(r"PUT \S+/a", each)]) == 3


def test_a_key_that_may_only_read_and_one_that_nobody_knows(seaweed: Seaweed) -> None:
    seaweed.client().put_object(Bucket=BUCKET, Key="keys/x", Body=BODY)
    reader = client(seaweed.endpoint, READER)
    assert reader.get_object(Bucket=BUCKET, Key="keys/x")["Body"].read() == BODY
    with pytest.raises(ClientError) as denied:
        reader.put_object(Bucket=BUCKET, Key="keys/y", Body=BODY)
    assert code_of(denied) == (403, "AccessDenied")
    with pytest.raises(ClientError) as unknown:
        seaweed.client(Key(access="AKIDNOBODY", secret="x")).list_objects_v2(Bucket=BUCKET)
    assert code_of(unknown) == (403, "InvalidAccessKeyId")


def test_a_killed_server_comes_back_with_what_it_held(seaweed: Seaweed) -> None:
    seaweed.client().put_object(Bucket=BUCKET, Key="kill/x", Body=BODY)
    seaweed.kill()
    try:
        with pytest.raises(BotoCoreError):
            seaweed.client().get_object(Bucket=BUCKET, Key="kill/x")
    finally:
        seaweed.start()
    assert seaweed.objects(f"s3://{BUCKET}/kill") == {"x": BODY}
