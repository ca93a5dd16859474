"""The images of a request: files of a form, base64 in JSON, or URLs where those are allowed.

All of it stays in memory, and a client's file name is never used as a path.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from image_classifier.errors import UnreadableImage
from image_classifier.serving.request_limits import MemoryLease, Refusal, RequestLimits
from image_classifier.sources.web import ALLOWING, WebClient, file_name, is_url
from image_classifier.text import printable

_MAX_NAME_LENGTH = 200
_MAX_REASON_LENGTH = 200
_FETCH_THREADS = 32  # shared by all requests
_MAX_URLS = 8  # in one request, so that slow URLs of one client cannot take all threads
_STEP_BYTES = 2**16  # of a body that is handled before other requests have their turn
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_LINE_BREAKS = b" \t\r\n"  # base64 may be wrapped with these
_MAX_COMMAS = 32  # per image in JSON, more than it needs: refusing a list of millions would take gigabytes and a minute


TopK = Annotated[int, Field(ge=1)]
_TOP_K: TypeAdapter[int] = TypeAdapter(TopK)


class ImageInput(BaseModel):
    """One image of a JSON request: its bytes as base64 (also as a data: URL), or its URL."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=1000)] = ""
    base64: str | None = None
    url: Annotated[str | None, Field(max_length=4000)] = None


class PredictRequest(BaseModel):
    """A JSON request."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[ImageInput], Field(min_length=1), FailFast()]
    top_k: Annotated[TopK | None, Field(strict=True)] = None


class Upload:
    """One image: the client's name for it, and its bytes or the reason why there are none."""

    __slots__ = ("content", "error", "name")

    def __init__(self, name: str, content: bytes = b"", error: str = "") -> None:
        self.name = name
        self.content = content
        self.error = error


class _InMemoryParser(MultiPartParser):
    """Starlette's form parser without temporary files: the body, which has a limit, is in memory already."""

    spool_max_size: ClassVar[int] = 2**62  # type: ignore[misc]


class Uploads:
    """Reads the images of requests."""

    def __init__(self, limits: RequestLimits, web: WebClient | None, max_image_bytes: int) -> None:
        self._limits = limits
        self._web = web
        self._max_image_bytes = max_image_bytes
        self._fetchers = ThreadPoolExecutor(_FETCH_THREADS, "fetch")

    async def parse(self, headers: Headers, body: bytearray, lease: MemoryLease) -> tuple[list[Upload], int | None]:
        """Return the images of a body, at least one, and its `top_k`, if any; fetched bytes are counted in the lease.

        Raises:
            Refusal: The body holds no image or cannot be read.
        """
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await self._parse_form(headers, body)
        if kind == "application/json":
            return await self._parse_json(body, lease)
        raise Refusal(
            415, "unsupported_media_type", "send multipart/form-data with files named images, or application/json"
        )

    async def _parse_form(self, headers: Headers, body: bytearray) -> tuple[list[Upload], int | None]:
        async def stream() -> AsyncGenerator[bytes, None]:
            for start in range(0, len(body), _STEP_BYTES):
                yield bytes(memoryview(body)[start : start + _STEP_BYTES])
                await asyncio.sleep(0)
            body.clear()

        max_images = self._limits.max_images
        parser = _InMemoryParser(headers, stream(), max_files=max_images + 1, max_fields=8, max_part_size=1000)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if "Too many files" in error.message:
                raise self._too_many() from None
            raise _bad_form(error.message) from None
        except (ValueError, LookupError) as error:  # raised for parts that the parser does not expect
            raise _bad_form(str(error)) from None
        top_k = _top_k_of([(name, value) for name, value in form.multi_items() if isinstance(value, str)])
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refusal(400, "bad_request", "the form has no file: send images=@FILE")
        if len(files) > max_images:
            raise self._too_many()
        images = [
            self._checked(_display_name(file.filename, number), file.file.read())
            for number, file in enumerate(files, 1)
        ]
        return images, top_k

    async def _parse_json(self, body: bytearray, lease: MemoryLease) -> tuple[list[Upload], int | None]:
        request = self._validated(body)
        body.clear()
        if len(request.images) > self._limits.max_images:
            raise self._too_many()
        if sum(item.url is not None for item in request.images) > _MAX_URLS:
            raise Refusal(413, "too_large", f"more than {_MAX_URLS} URLs in one request")
        # A client of this request's own: it is stopped when the request ends.
        web = None if self._web is None else replace(self._web)
        try:
            async with asyncio.timeout(self._limits.answer_s), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._load(item, number, web, lease))
                    for number, item in enumerate(request.images, 1)
                ]
        except TimeoutError:
            reason = f"the images could not be fetched within {self._limits.answer_s:g} s"
            raise Refusal(503, "too_late", reason, 1.0) from None
        except ExceptionGroup as error:
            raise error.exceptions[0] from None
        finally:
            if web is not None:
                web.stop()
        return [task.result() for task in tasks], request.top_k

    def _validated(self, body: bytearray) -> PredictRequest:
        max_commas = _MAX_COMMAS * (1 + self._limits.max_images)
        if _count_commas(body, max_commas) > max_commas:
            raise Refusal(413, "too_large", "the JSON has more values than a request needs")
        try:
            return PredictRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = printable(first["msg"])[:_MAX_REASON_LENGTH]
            raise Refusal(422, "invalid", f"invalid JSON: {f'{where}: ' if where else ''}{reason}") from None

    async def _load(self, item: ImageInput, number: int, web: WebClient | None, lease: MemoryLease) -> Upload:
        """Return one image of a JSON request, the `number`-th from 1."""
        if (item.base64 is None) == (item.url is None):
            raise Refusal(422, "invalid", f"images.{number - 1} needs either base64 or url")
        if item.base64 is None:
            return await self._fetch(item.name, str(item.url), number, web, lease)
        name = _display_name(item.name, number)
        text = item.base64.partition(",")[2] if item.base64.startswith("data:") else item.base64
        try:
            content = await asyncio.to_thread(_decode_base64, text) if len(text) > _STEP_BYTES else _decode_base64(text)
        except (binascii.Error, ValueError) as error:
            return Upload(name, error=f"invalid base64 ({error})")
        return self._checked(name, content)

    async def _fetch(self, given: str, url: str, number: int, web: WebClient | None, lease: MemoryLease) -> Upload:
        name = _display_name(given or file_name(url), number)
        if web is None:
            raise Refusal(403, "forbidden", "this server does not fetch URLs (fetch.enabled=true allows it)")
        if not is_url(url):
            return Upload(name, error="not an http:// or https:// address")
        loop = asyncio.get_running_loop()
        try:
            content = await loop.run_in_executor(self._fetchers, web.image, url, self._max_image_bytes, lease.take)
        except UnreadableImage as error:
            return Upload(name, error=error.reason.removesuffix(ALLOWING))
        return Upload(name, content)

    def _checked(self, name: str, content: bytes) -> Upload:
        """Return the image, without its bytes where it is larger than the worker process would accept."""
        if len(content) > self._max_image_bytes:
            return Upload(name, error=f"larger than {self._max_image_bytes / 2**20:.3g} MiB")
        return Upload(name, content)

    def _too_many(self) -> Refusal:
        return Refusal(413, "too_large", f"more than {self._limits.max_images} images in one request")


def _bad_form(reason: str) -> Refusal:
    return Refusal(400, "bad_request", f"the form cannot be read ({printable(reason)[:_MAX_REASON_LENGTH]})")


def _count_commas(body: bytearray, limit: int) -> int:
    """Return the number of commas; stop counting above the limit."""
    count = 0
    for start in range(0, len(body), _STEP_BYTES):
        count += body.count(b",", start, start + _STEP_BYTES)
        if count > limit:
            break
    return count


def _top_k_of(fields: list[tuple[str, str]]) -> int | None:
    """Return top_k, the only text field of a form."""
    top_k = None
    for name, text in fields:
        if name != "top_k":
            raise Refusal(
                422, "invalid", f"unknown form field {name[:100]!r}: a form has files (images=@FILE) and the text top_k"
            )
        try:
            top_k = _TOP_K.validate_python(text)
        except ValidationError:
            raise Refusal(422, "invalid", "top_k must be a whole number, at least 1") from None
    return top_k


def _decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, wrapped or not, in steps, so that other threads can run in between.

    Raises:
        ValueError: It is not valid base64.
    """
    if ("-" in text or "_" in text) and ("+" in text or "/" in text):
        raise ValueError("it mixes two alphabets")
    decoded = []
    rest = b""
    padded = False
    for start in range(0, len(text), _STEP_BYTES):
        plain = rest + text[start : start + _STEP_BYTES].encode("ascii").translate(_URL_SAFE, _LINE_BREAKS)
        if (padded and plain) or plain.endswith(b"==="):
            raise ValueError("padding before the end")
        # Decode groups of four characters, and keep the rest for the next step.
        end = len(plain) - len(plain) % 4
        decoded.append(base64.b64decode(plain[:end], validate=True))
        padded = padded or plain[:end].endswith(b"=")
        rest = plain[end:]
    return b"".join([*decoded, base64.b64decode(rest, validate=True)])


def _display_name(given: str | None, number: int) -> str:
    """Return the client's name for an image, to show it: without folders and control characters."""
    last = (given or "").replace("\\", "/").rpartition("/")[2]
    clean = printable(last.encode("utf-8", "replace").decode()).strip()[:_MAX_NAME_LENGTH]
    return clean or f"image-{number}"
