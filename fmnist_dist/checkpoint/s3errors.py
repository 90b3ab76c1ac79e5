"""What an error of an S3 client means: taken, missing, to be tried again, or refused for good.

s3fs turns the errors of botocore into those of the operating system; the code that the server gave
is in their cause. What people are told is written here: a server's own words may quote a key.
"""

import socket
from enum import Enum, auto

from aiohttp import ClientError as ConnectionFailure
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from fmnist_dist.masking import masked

_KEYS = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE and its "
    "files"
)
_RIGHTS = (
    "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there, or use other "
    "credentials"
)
_REGION = "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL if it is not on AWS"

# What no further try can change, and what a user can do about it.
_ADVICE = {
    "InvalidAccessKeyId": f"the access key is unknown there: {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key is wrong: {_KEYS}",
    "ExpiredToken": f"the credentials have expired: {_KEYS}",
    "InvalidToken": f"the session token is wrong: {_KEYS}",
    "TokenRefreshRequired": f"the credentials have expired: {_KEYS}",
    "AccessDenied": f"these credentials may not do that: {_RIGHTS}",
    "AllAccessDisabled": f"these credentials may not do that: {_RIGHTS}",
    "AccountProblem": "there is something wrong with the account",
    "Forbidden": f"these credentials may not do that: {_RIGHTS}",
    "403": f"these credentials may not do that: {_RIGHTS}",
    "NoSuchBucket": "there is no such bucket: make it, or correct the URL",
    "InvalidBucketName": "that is no bucket's name: correct the URL",
    "RequestTimeTooSkewed": "the clocks differ too much: set this machine's clock (NTP)",
    "AuthorizationHeaderMalformed": f"the bucket is in another region: {_REGION}",
    "IllegalLocationConstraintException": f"the bucket is in another region: {_REGION}",
    "PermanentRedirect": f"the bucket is in another region: {_REGION}",
    "301": f"the bucket is in another region: {_REGION}",
    "NotImplemented": "this store cannot do that",
}
_OF_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired", "403"}
_OF_CREDENTIALS |= {"ExpiredToken", "InvalidToken"}
_TRANSIENT_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUS = 500  # and above; below, the request itself is wrong
_SETUP = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.NoAuthTokenError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.InvalidConfigError,
    boto.NoRegionError,
    boto.InvalidRegionError,
    boto.ParamValidationError,
    boto.InvalidDNSNameError,
    boto.MissingDependencyException,
)
_CONNECTION = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ChecksumError,
    ResponseParserError,  # an answer that was cut off, or a proxy's page
    ConnectionFailure,
    TimeoutError,
    socket.gaierror,
    ConnectionError,
)


class Meaning(Enum):
    """What the caller does about an error."""

    TAKEN = auto()  # put-if-absent found something
    CONFLICT = auto()  # another put-if-absent is under way: send it all again
    MISSING = auto()
    EMPTY = auto()  # a range of an object of no bytes
    NO_UPLOAD = auto()  # an upload in parts is complete, or was aborted
    UNSUPPORTED = auto()
    REFUSED = auto()  # trying again changes nothing
    TRANSIENT = auto()
    WRONG = auto()  # the store does not take the request, and will not

    @staticmethod
    def of(error: BaseException) -> "Meaning":
        """Return what an error of s3fs, botocore or aiohttp means."""
        code, status = _answer(error)
        if code in _FIXED:
            return _FIXED[code]
        if code in _ADVICE or isinstance(error, _SETUP):
            return Meaning.REFUSED
        if code in _TRANSIENT_CODES or status >= _TRANSIENT_STATUS:
            return Meaning.TRANSIENT
        if code is None and isinstance(error, (*_CONNECTION, boto.ConnectionError)):
            return Meaning.TRANSIENT
        return Meaning.WRONG


_FIXED = {
    "PreconditionFailed": Meaning.TAKEN,
    "412": Meaning.TAKEN,
    "ConditionalRequestConflict": Meaning.CONFLICT,
    "409": Meaning.CONFLICT,
    "NoSuchKey": Meaning.MISSING,
    "404": Meaning.MISSING,
    "InvalidRange": Meaning.EMPTY,
    "416": Meaning.EMPTY,
    "NoSuchUpload": Meaning.NO_UPLOAD,
    "NotImplemented": Meaning.UNSUPPORTED,
    "501": Meaning.UNSUPPORTED,
}


def is_of_credentials(error: BaseException) -> bool:
    """Whether other credentials may be there by now."""
    return _answer(error)[0] in _OF_CREDENTIALS or isinstance(error, _SETUP)


def line(error: BaseException) -> str:
    """Return an error in one line, with what to do about it where that is known."""
    code, status = _answer(error)
    if code in _ADVICE:
        return f"{_ADVICE[code]} ({code})"
    if code is not None:
        return f"the store answered {code} ({status})"
    match error:
        case boto.NoCredentialsError():
            return f"found no credentials: {_KEYS}"
        case boto.EndpointConnectionError():
            where = "/".join(masked(str(error.kwargs.get("endpoint_url"))).split("/")[:3])
            return f"cannot connect to {where}: is AWS_ENDPOINT_URL right, and the store running?"
        case TimeoutError() if not isinstance(error, ConnectionFailure):
            return "no answer in time"
        case _:
            text = " ".join(masked(str(error)).split())
            return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _answer(error: BaseException) -> tuple[str | None, int]:
    """Return the code and the HTTP status of a server's answer; None, 0: there was none."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", status)), int(status)
    return None, 0
