"""What must never be shown: a user, a password or a query that somebody wrote into a URL.

Credentials belong into the environment or into the files of the provider's own tools. Where they
stand in a URL all the same, what is printed, logged or recorded of it goes through here.
"""

import re

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.:-]*://)(?P<rest>.*)", re.DOTALL)
# Not the punctuation of the sentence that it stands in: "http://host:9: refused" names a port.
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+?(?=[.,:;!?)]*(?:[\s'\"<>]|$))")


def masked_url(url: str) -> str:
    """Return a URL (or a path, as it is) with `***` for all that can be a secret."""
    match = _URL.fullmatch(url)
    if match is None:
        return url
    rest, mark, _ = match["rest"].partition("?")
    rest, query = (rest, "?***") if mark else (rest, "")
    host, slash, path = rest.partition("/")
    if "@" in rest:  # a secret key may hold a slash
        rest = f"***@{rest.rpartition('@')[2]}"
    elif ":" in host and not host.rpartition(":")[2].isdigit():
        rest = f"***{slash}{path}"
    return f"{match['scheme']}{rest}{query}"


def masked(text: str) -> str:
    """Return a message of somebody else's with every URL in it masked."""
    return _IN_TEXT.sub(lambda match: masked_url(match[0]), text)
