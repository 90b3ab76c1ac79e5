"""A mirror that fails, lies or stalls is retried where that can help, and never believed."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from published import Answer, Mirror, as_bytes, data_files, flipped, packed, sends, small_files

from fmnist_dist.data import web
from fmnist_dist.data.files import SourceUnavailableError
from fmnist_dist.errors import DataDamagedError

FILES = small_files()
TABLE = data_files(FILES)
IMAGES = "train-images-idx3-ubyte"
QUICK = web.Patience(silence_seconds=5.0, total_seconds=30.0, num_tries=3, pause_seconds=0.01)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror(FILES).serve() as running:
        yield running


def test_the_web_source_returns_the_decoded_files(mirror: Mirror) -> None:
    assert as_bytes(web.download(TABLE, mirror=mirror.url, patience=QUICK)) == FILES
    assert sorted(mirror.requests) == sorted(f"/{name}.gz" for name in FILES)


def test_a_file_with_another_md5_is_refused(mirror: Mirror) -> None:
    mirror.answers[f"/{IMAGES}.gz"] = [sends(b"<html>please log in</html>")]
    with pytest.raises(SourceUnavailableError, match=rf"{IMAGES}\.gz sent 26 bytes with MD5"):
        web.download(TABLE, mirror=mirror.url, patience=QUICK)


def test_a_file_with_the_right_md5_but_other_content_is_refused(mirror: Mirror) -> None:
    other = FILES | {IMAGES: flipped(FILES[IMAGES], at=99)}
    table = [
        type(good)(name=good.name, sha256=good.sha256, gz_md5=bad.gz_md5)
        for good, bad in zip(TABLE, data_files(other), strict=True)
    ]
    mirror.answers[f"/{IMAGES}.gz"] = [sends(packed(other[IMAGES]))]
    with pytest.raises(DataDamagedError, match=IMAGES):
        web.download(table, mirror=mirror.url, patience=QUICK)


def test_a_404_is_final(mirror: Mirror) -> None:
    del mirror.answers[f"/{IMAGES}.gz"]
    with pytest.raises(SourceUnavailableError, match="HTTP status 404"):
        web.download(TABLE, mirror=mirror.url, patience=QUICK)
    assert mirror.requests.count(f"/{IMAGES}.gz") == 1


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()
    handler.close_connection = True


@pytest.mark.parametrize(
    "failure",
    [sends(b"", status=503), sends(b"half", claim=4000), hangs_up],
    ids=["status 503", "cut off", "hangs up"],
)
def test_what_may_pass_is_tried_again(mirror: Mirror, failure: Answer) -> None:
    good = mirror.answers[f"/{IMAGES}.gz"]
    mirror.answers[f"/{IMAGES}.gz"] = [failure, failure, *good]
    assert as_bytes(web.download(TABLE, mirror=mirror.url, patience=QUICK)) == FILES
    assert mirror.requests.count(f"/{IMAGES}.gz") == 3


def test_a_server_that_stays_silent_is_given_up(mirror: Mirror) -> None:
    def stay_silent(_: BaseHTTPRequestHandler) -> None:
        mirror.closing.wait(20)

    mirror.answers[f"/{IMAGES}.gz"] = [stay_silent]
    patience = web.Patience(silence_seconds=0.1, num_tries=2, pause_seconds=0.01)
    with pytest.raises(SourceUnavailableError, match=rf"{IMAGES}\.gz: .*timed out"):
        web.download(TABLE, mirror=mirror.url, patience=patience)
    assert mirror.requests.count(f"/{IMAGES}.gz") == 2


def test_a_server_that_trickles_is_given_up(mirror: Mirror) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not mirror.closing.wait(0.02):
            handler.wfile.write(b".")

    mirror.answers[f"/{IMAGES}.gz"] = [trickle]
    patience = web.Patience(silence_seconds=5.0, total_seconds=0.3)
    with pytest.raises(SourceUnavailableError, match="time for this source is used up"):
        web.download(TABLE, mirror=mirror.url, patience=patience)
