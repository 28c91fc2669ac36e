"""S3 with patience: every request of s3fs under one rule of when to try again, for how long, and what to say at last."""

import asyncio
import errno
import io
import os
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from aiobotocore.response import StreamingBody
from aiohttp import ClientError as HttpError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as Unconnected,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync, sync_wrapper
from s3fs import S3FileSystem

PATIENCE = 120.0
"""Seconds for which a request is repeated that a server throttles, fails or breaks off."""
PATIENCE_UNREACHED = 10.0
"""The same while no request has succeeded yet: the address is wrong more often than the server is down."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 20.0
PART = 16 << 20
"""Bytes of a part of a multipart upload: 10,000 of them, S3's bound, are 168 GB."""
PARTS_IN_FLIGHT = 4

THROTTLED = ("SlowDown", "RequestLimitExceeded", "TooManyRequests", "Throttling", "ThrottlingException")
AGAIN = ("InternalError", "RequestTimeout", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted")
AGAIN_STATUS = (429, 500, 502, 503, 504, 509)
BROKEN = (
    HTTPClientError,
    Unconnected,
    IncompleteReadError,
    ResponseParserError,
    HttpError,
    ConnectionError,
    TimeoutError,
)
UNIDENTIFIED = (
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    CredentialRetrievalError,
    TokenRetrievalError,
)
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role"


class PatientS3(S3FileSystem):  # type: ignore[misc]
    """s3fs, with its own repetitions and botocore's switched off in favour of one rule, and without cached listings.

    Throttling, server errors and broken connections are tried again with exponential backoff and jitter, for
    `PATIENCE` seconds; once a server asks to slow down, all requests of the process wait. Anything else is told at
    once, as an `OSError` whose text names the cause and the remedy and holds no part of any credential.
    """

    retries = 1
    read_timeout = 60
    connect_timeout = 10

    def __init__(self, **settings: Any) -> None:
        # without checksums that only AWS knows, unless the user's environment asks for them
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 32}
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if f"AWS_{name.upper()}" not in os.environ:
                config[name] = "when_required"
        client = settings.pop("client_kwargs", {})
        if "AWS_REGION" in os.environ and "AWS_DEFAULT_REGION" not in os.environ:
            client = {"region_name": os.environ["AWS_REGION"]} | client  # botocore reads the second only
        config |= settings.pop("config_kwargs", {})
        super().__init__(use_listings_cache=False, config_kwargs=config, client_kwargs=client, **settings)
        self._reached = False
        self._quiet_until = 0.0

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        return await self._patiently(lambda: self._once(method, *akwarglist, **kwargs), kwargs.get("Bucket"))

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        bucket, key, _version = self.split_path(path)
        if start is not None and start == end:
            return b""
        limits = {} if start is None and end is None else {"Range": await self._process_limits(path, start, end)}

        async def fetch() -> bytes:
            body: StreamingBody = (await self._once("get_object", Bucket=bucket, Key=key, **limits))["Body"]
            async with body:
                return bytes(await body.read())

        return bytes(await self._patiently(fetch, bucket))

    async def _once(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        """One request as s3fs makes it, tried once."""
        return await super()._call_s3(method, *akwarglist, **kwargs)

    async def _patiently(self, request: Callable[[], Awaitable[Any]], bucket: str | None) -> Any:
        """A request's answer, however often it must be made."""
        started, tries = time.monotonic(), 0
        while True:
            await asyncio.sleep(max(0.0, self._quiet_until - time.monotonic()))
            try:
                answer = await request()
            except Exception as error:
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2**tries) * random.uniform(0.5, 1.0)
                tries += 1
                spent = time.monotonic() - started
                patience = PATIENCE if self._reached else PATIENCE_UNREACHED
                if not _may_pass(error) or spent + delay > patience:
                    raise explained(error, bucket, f"{tries} tries in {spent:.0f} s") from error
                if _code(error) in THROTTLED or _status(error) in (429, 503):
                    self._quiet_until = time.monotonic() + delay
                await asyncio.sleep(delay)
            else:
                self._reached = True
                return answer


def _response(error: BaseException) -> dict[str, Any]:
    """What the server answered, where it did; s3fs keeps botocore's error as the cause of its own."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            return dict(candidate.response)
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if _response(error):
        return _status(error) in AGAIN_STATUS or _code(error) in (*THROTTLED, *AGAIN)
    return isinstance(error, BROKEN)


def explained(error: Exception, bucket: str | None, effort: str) -> Exception:
    """An error in words that a user can act on.

    Args:
        error: What botocore or s3fs raised.
        bucket: The bucket asked for.
        effort: What was tried.

    Returns:
        Missing files and failed conditions as they are; everything else as an `OSError` without credentials.
    """
    code, status = _code(error), _status(error)
    named = code if code and not code.isdigit() else str(status)
    if code == "NoSuchBucket":
        return OSError(
            errno.EIO, f"there is no bucket '{bucket}': create it, or correct the address or AWS_ENDPOINT_URL"
        )
    if _may_pass(error):
        what = f"the server answers {named}" if status else f"the server is not to be reached ({type(error).__name__})"
        return OSError(errno.EIO, f"{what}, after {effort}: check AWS_ENDPOINT_URL and the network, then run it again")
    if isinstance(error, UNIDENTIFIED):
        return OSError(errno.EACCES, f"there are no usable credentials ({type(error).__name__}): set {CREDENTIALS}")
    if status in (401, 403) or (isinstance(error.__cause__, ClientError) and isinstance(error, PermissionError)):
        return OSError(
            errno.EACCES,
            f"access to bucket '{bucket}' is denied ({named}): check {CREDENTIALS}, and that they may do this there",
        )
    if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return OSError(errno.EIO, f"bucket '{bucket}' lies in another region ({named}): set AWS_REGION to it")
    if status == 412:
        return FileExistsError(errno.EEXIST, "something is there already")
    if status == 501:
        return OSError(errno.ENOSYS, "the server does not know this request")
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and not status):
        return error
    if isinstance(error, BotoCoreError):
        return OSError(errno.EIO, f"the request cannot be made ({type(error).__name__}): check the address")
    return OSError(errno.EIO, f"the server refuses ({named})") if status else error


class Upload(io.RawIOBase):
    """A file on S3 that is written once from beginning to end; parts travel while the next one fills.

    Memory is bounded by `PARTS_IN_FLIGHT` + 1 parts. Nothing is there before `commit`, and nothing is left after
    `abort`; a process that is killed leaves parts that a bucket's lifecycle rule should clean up.

    Args:
        system: Where to.
        path: Bucket and key.
    """

    def __init__(self, system: PatientS3, path: str) -> None:
        bucket, key, _ = system.split_path(path)
        self._system = system
        self._place = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._id: str | None = None
        self._parts: list[Future[Any]] = []
        self._written = 0

    def writable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written

    def write(self, data: Any) -> int:
        """Takes all of `data`, waiting for earlier parts where too many are under way."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PART):
            self._buffer += view[start : start + PART]
            while len(self._buffer) >= PART:
                self._send(bytes(self._buffer[:PART]))
                del self._buffer[:PART]
        self._written += len(view)
        return len(view)

    def commit(self) -> None:
        """Makes the file be there, whole."""
        if self._id is None:
            self._system.call_s3("put_object", Body=bytes(self._buffer), **self._place)
            return
        if self._buffer:
            self._send(bytes(self._buffer))
        parts = [{"PartNumber": n, "ETag": part.result()["ETag"]} for n, part in enumerate(self._parts, start=1)]
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            # an earlier try came through though its answer was lost: then the upload is no more, and the file is there
            if self._system.call_s3("head_object", **self._place)["ContentLength"] != self._written:
                raise

    def abort(self) -> None:
        """Takes back what was sent."""
        for part in self._parts:
            part.cancel()
        if self._id is not None:
            self._call("abort_multipart_upload")

    def _send(self, data: bytes) -> None:
        if self._id is None:
            self._id = str(self._system.call_s3("create_multipart_upload", **self._place)["UploadId"])
        if len(self._parts) >= PARTS_IN_FLIGHT:
            self._parts[-PARTS_IN_FLIGHT].result()
        call = self._system._call_s3(
            "upload_part", PartNumber=len(self._parts) + 1, UploadId=self._id, Body=data, **self._place
        )
        self._parts.append(asyncio.run_coroutine_threadsafe(call, self._system.loop))

    def _call(self, method: str, **kwargs: Any) -> Any:
        return sync(self._system.loop, self._system._call_s3, method, UploadId=self._id, **self._place, **kwargs)
