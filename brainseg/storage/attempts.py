"""Attempts: run a whole operation on an object store again until it is done, is refused for good, or its time is over.

boto3 retries requests, but never a body that breaks off, and it counts attempts where a caller needs a bound in seconds. So
its own retries are off (`standard` mode, one attempt), and this module is the only one that tries again. It is also the only
one that imports boto3, when the first `s3://` is touched; endpoint, region and credentials are whatever boto3 finds.
"""

import functools
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from brainseg.errors import StorageError
from brainseg.storage.place import one_line

T = TypeVar("T")

SLOWEST_BYTES_PER_S = 1_000_000
"""A large body gets a second a megabyte on top of the deadline: a slow line is no dead one."""


@dataclass(frozen=True)
class Patience:
    """How long a whole operation may take, and how long one connection may stay silent.

    No attempt begins that could outlast the deadline by being silent; or, where somebody else keeps the time (`is_watched`),
    by taking a second longer than the last one.
    """

    deadline_s: float
    connect_s: float
    read_s: float
    is_watched: bool = False

    def reserve_s(self, last_s: float) -> float:
        """Seconds that must be left for another attempt to begin, if the last one took so long."""
        silent_s = self.connect_s + self.read_s
        return min(silent_s, last_s + 1) if self.is_watched else silent_s


PATIENT = Patience(deadline_s=60, connect_s=5, read_s=20)
HURRIED = Patience(deadline_s=8, connect_s=3, read_s=4, is_watched=True)
"""For the preflight: a person waits for it."""


class DamagedError(Exception):
    """What arrived is not what the store promised: too short, too late, or other bytes."""


@dataclass
class Attempt:
    """One attempt at an operation: its client, and the time that the operation has left."""

    patience: Patience
    number: int = 1
    started: float = field(default_factory=time.monotonic)
    size_bytes: int = 0

    @property
    def client(self) -> Any:
        """The process's client for this patience."""
        return client(os.getpid(), self.patience)

    @property
    def is_first(self) -> bool:
        """Whether nothing can have come of this operation yet. Later, an earlier attempt may have, its answer lost."""
        return self.number == 1

    def allow(self, size_bytes: int) -> None:
        """Give the operation the time that a body of this size may take."""
        self.size_bytes = max(self.size_bytes, size_bytes)

    def left_s(self) -> float:
        """Seconds until the deadline."""
        allowed = self.patience.deadline_s + self.size_bytes / SLOWEST_BYTES_PER_S
        return self.started + allowed - time.monotonic()


_NEVER: Any = object()


def whole(doing: str, uri: str, call: Callable[[Attempt], T], patience: Patience = PATIENT, *, missing: Any = _NEVER) -> T:
    """Run one whole operation, again while it fails for passing reasons; `missing` is the answer for an absent object."""
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError  # botocore translates most of them, not those of TLS in mid-body

    attempt = Attempt(patience)
    while True:
        began = time.monotonic()
        try:
            return call(attempt)
        except (BotoCoreError, ClientError, HTTPError, DamagedError, OSError, ValueError) as error:
            if missing is not _NEVER and code_of(error) in ("404", "NoSuchKey", "NoSuchUpload"):
                return missing  # type: ignore[no-any-return]
            wait_s = random.uniform(0.5, 1.0) * min(5.0, 0.05 * 2**attempt.number)
            if not is_passing(error) or attempt.left_s() < wait_s + patience.reserve_s(time.monotonic() - began):
                raise StorageError(one_line(doing, uri, _reason(error, attempt))) from error
            attempt.number += 1
            time.sleep(wait_s)


# ---- what an error means ---------------------------------------------------------------------------------------------

_PASSING_CODES = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "InternalError",
        "ServiceUnavailable",
        "BadDigest",
        "IncompleteBody",
        "OperationAborted",
        "ConditionalRequestConflict",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    }
)
_PASSING_ERRORS = frozenset(
    {
        "DamagedError",
        "HTTPError",
        "HTTPClientError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "ReadTimeoutError",
        "FlexibleChecksumError",
        "ResponseParserError",
        "ConnectionError",
        "TimeoutError",
    }
)
_REFUSED = "the store refuses access with these credentials"
_EXPIRED = "the session token has expired or is not valid: sign in again"
_ELSEWHERE = "the bucket lies in another region: set AWS_REGION or the profile's region"
_PLAIN_WORDS = {
    "404": "there is no such object",
    "NoSuchKey": "there is no such object",
    "NoSuchBucket": "there is no such bucket",
    "InvalidBucketName": "this is not the name of a bucket",
    "403": _REFUSED,
    "AccessDenied": _REFUSED,
    "AllAccessDisabled": _REFUSED,
    "AccountProblem": _REFUSED,
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the store rejects the signature: the secret key is wrong, or the region",
    "400": "the store calls the request bad: the session token may have expired, or the region be another one",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "301": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "RequestTimeTooSkewed": "this machine's clock and the store's differ too much",
    "InvalidObjectState": "the object is in cold storage: restore it first",
    "NoCredentialsError": "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
    "PartialCredentialsError": "the credentials are incomplete: an access key needs its secret key",
    "EndpointConnectionError": "nothing answers at {endpoint}: is AWS_ENDPOINT_URL right?",
    "ConnectTimeoutError": "nothing answers at {endpoint}: is AWS_ENDPOINT_URL right?",
    "ReadTimeoutError": "{endpoint} takes connections and does not answer",
    "SSLError": "{endpoint} has no certificate that is trusted here: set AWS_CA_BUNDLE, or use http:// if it speaks no TLS",
    "ConnectionClosedError": "{endpoint} closes the connection without an answer",
}
_ADDRESSES = re.compile(r"\?\S*|(?<=//)[^/@\s]*@")
"""What an address may carry that nobody should read: a query with a signature, a password before the host."""


def code_of(error: BaseException) -> str:
    """The store's own error code, or the name of the client's exception."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else type(error).__name__


def plain_words(code: str) -> str:
    """What a store's error code means to the person who has to do something about it."""
    return _PLAIN_WORDS.get(code, f"the store says {code}")


def is_passing_code(code: str) -> bool:
    """Whether a store that answers with this code may do what it is asked when it is asked again."""
    return code in _PASSING_CODES


def refusal() -> type[Exception]:
    """What boto3 raises where a store answered, and said no. A function, since boto3 is imported when it is needed."""
    from botocore.exceptions import ClientError

    return ClientError  # type: ignore[no-any-return]


def status_of(error: BaseException) -> int:
    """The HTTP status of a store's refusal; 0 for an error of the client."""
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: a broken connection or body, a busy or failing store."""
    if status_of(error):
        busy = status_of(error) in (408, 429) or (status_of(error) >= 500 and status_of(error) != 501)
        return busy or is_passing_code(code_of(error))
    if code_of(error) == "SSLError":
        return "CERTIFICATE_VERIFY_FAILED" not in str(error) and "WRONG_VERSION_NUMBER" not in str(error)
    return any(kind.__name__ in _PASSING_ERRORS for kind in type(error).__mro__)


def _reason(error: BaseException, attempt: Attempt) -> str:
    """The error in plain words, without secrets or signed addresses, and how often it was met."""
    words = _PLAIN_WORDS.get(code_of(error)) or _ADDRESSES.sub("", str(error))
    if "{endpoint}" in words:
        words = words.format(endpoint=_endpoint(attempt.client))
    if attempt.number == 1:
        return words
    return f"{words} ({attempt.number} attempts in {time.monotonic() - attempt.started:.0f} s)"


def _endpoint(made: Any) -> str:
    parts = urlsplit(str(made.meta.endpoint_url))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


# ---- the client ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _session(process: int) -> tuple[Any, Any]:
    """The process's botocore session, which knows the settings, and boto3's around it."""
    import boto3
    from botocore.session import get_session

    core = get_session()
    return core, boto3.session.Session(botocore_session=core)


@functools.lru_cache(maxsize=4)
def client(process: int, patience: Patience) -> Any:
    """The process's S3 client for one patience; `process` is its id, so that a fork makes its own."""
    from botocore.config import Config

    core, session = _session(process)
    timeouts = {"connect_timeout": patience.connect_s, "read_timeout": patience.read_s}
    checksums = {} if _chooses_checksums(core) else {"request_checksum_calculation": "when_required"}
    retries = {"mode": "standard", "total_max_attempts": 1}
    config = Config(retries=retries, max_pool_connections=32, tcp_keepalive=True, **timeouts, **checksums)
    made = session.client("s3", config=config)
    made.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    return made


def forget_clients() -> None:
    """Make the next operation look for endpoint and credentials anew."""
    client.cache_clear()
    _session.cache_clear()


def is_encrypted(attempt: Attempt) -> bool:
    """Whether the way to the store carries checks of its own (TLS), so that no byte changes on it unseen."""
    return str(attempt.client.meta.endpoint_url).startswith("https://")


def is_aws(attempt: Attempt) -> bool:
    """Whether the endpoint is AWS's own."""
    host = urlsplit(str(attempt.client.meta.endpoint_url)).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _chooses_checksums(core: Any) -> bool:
    """Whether the user has said when to add checksums; stores other than AWS may refuse boto3's default."""
    name = "request_checksum_calculation"
    return f"AWS_{name.upper()}" in os.environ or name in core.get_scoped_config()


def adds_checksums(attempt: Attempt) -> bool:
    """Whether the client proves by a checksum of its own what it puts."""
    return str(attempt.client.meta.config.request_checksum_calculation) == "when_supported"


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """Say a batch deletion's MD5, which stores from before 2025 insist on."""
    import base64
    import hashlib

    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()
