"""What is shown of a URL, alone and in a sentence, holds no credentials and what helps."""

import pytest

from fmnist_dist.masking import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://127.0.0.1:9: refused", "http://127.0.0.1:9: refused"),
        ("(s3://bucket/run), or so.", "(s3://bucket/run), or so."),
        ("is http://u:p@h:9000/x right?", "is http://***@h:9000/x right?"),
        ("http://key:secret: no answer", "http://***: no answer"),
        ("http://u:p!@h. Then", "http://***@h. Then"),
        ('at "s3://b/r?token=x", twice', 'at "s3://b/r?***", twice'),
        ("s3://key:se/cret@b and s3://c", "s3://***@b and s3://c"),
    ],
)
def test_urls_in_a_sentence_are_masked_and_the_sentence_stays(text: str, shown: str) -> None:
    assert masked(text) == shown
