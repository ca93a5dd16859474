"""The images of a request: parts of a form, base64 in JSON, or addresses where those are allowed. Kept in memory; no name of a client's is a path."""

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

_NAME_CHARACTERS = 200
_FETCHES = 32  # at once, of all requests: so that one of them, of slow addresses, takes not all
_MOST_ADDRESSES = 8  # in one request, each of which may bring as much as an image may
_STEP = 2**16  # bytes of a body that are looked at before others have their turn
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WRAPS = b" \t\r\n"  # what base64 may be wrapped with
_COMMAS = (
    32  # of one image in JSON, more than it can need: a list of millions takes gigabytes and a minute to be refused
)


TopK = Annotated[int, Field(ge=1)]
_TOP_K: TypeAdapter[int] = TypeAdapter(TopK)


class ImageInput(BaseModel):
    """One image of a JSON request: its bytes as base64 (also as a data: URL), or where it lies."""

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
    """One image as it came: the client's name for it, and its bytes or the words why there are none."""

    __slots__ = ("content", "error", "name")

    def __init__(self, name: str, content: bytes = b"", error: str = "") -> None:
        self.name, self.content, self.error = name, content, error


class _InMemory(MultiPartParser):
    """Files of a form stay in memory: the body, which has a limit, is there already."""

    spool_max_size: ClassVar[int] = 2**62  # type: ignore[misc]


class Uploads:
    """Reads the images of requests."""

    def __init__(self, limits: RequestLimits, web: WebClient | None, max_image_bytes: int) -> None:
        self._limits, self._web, self._max_image_bytes = limits, web, max_image_bytes
        self._fetchers = ThreadPoolExecutor(_FETCHES, "fetch")

    async def of(self, headers: Headers, body: bytearray, share: MemoryLease) -> tuple[list[Upload], int | None]:
        """The images of a body, at least one, and how many classes an answer is to list where it says so; Refusal where it holds none.

        What is fetched for it is counted in its share.
        """
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await self._of_form(headers, body)
        if kind == "application/json":
            return await self._of_json(body, share)
        raise Refusal(
            415, "unsupported_media_type", "send multipart/form-data with files named images, or application/json"
        )

    async def _of_form(self, headers: Headers, body: bytearray) -> tuple[list[Upload], int | None]:
        async def stream() -> AsyncGenerator[bytes, None]:
            for start in range(0, len(body), _STEP):
                yield bytes(memoryview(body)[start : start + _STEP])
                await asyncio.sleep(0)
            body.clear()

        most = self._limits.max_images
        try:
            form = await _InMemory(headers, stream(), max_files=most + 1, max_fields=8, max_part_size=1000).parse()
        except MultiPartException as error:
            if "Too many files" in error.message:
                raise self._too_many() from None
            raise Refusal(400, "bad_request", f"the form cannot be read ({printable(error.message)[:200]})") from None
        except (
            ValueError,
            KeyError,
            LookupError,
        ) as error:  # what parts of forms can hold that the parser does not expect
            raise Refusal(400, "bad_request", f"the form cannot be read ({printable(str(error))[:200]})") from None
        top_k = _top_k_of([(name, value) for name, value in form.multi_items() if isinstance(value, str)])
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refusal(400, "bad_request", "the form holds no file: send images=@FILE")
        if len(files) > most:
            raise self._too_many()
        return [
            self._upload(_name(file.filename, place), file.file.read()) for place, file in enumerate(files, 1)
        ], top_k

    async def _of_json(self, body: bytearray, share: MemoryLease) -> tuple[list[Upload], int | None]:
        most = _COMMAS * (1 + self._limits.max_images)
        if _commas(body, most) > most:
            raise Refusal(413, "too_large", "the JSON has more values than a request can have")
        try:
            asked = PredictRequest.model_validate_json(body)
            body.clear()
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise Refusal(
                422,
                "invalid",
                f"the JSON is not as it should be: {place or 'all of it'}: {printable(first['msg'])[:200]}",
            ) from None
        if len(asked.images) > self._limits.max_images:
            raise self._too_many()
        if sum(item.url is not None for item in asked.images) > _MOST_ADDRESSES:
            raise Refusal(413, "too_large", f"more than {_MOST_ADDRESSES} addresses in one request")
        web = None if self._web is None else replace(self._web)  # of its own, to end with this request
        try:
            async with asyncio.timeout(self._limits.answer_s), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._of_item(item, place, web, share))
                    for place, item in enumerate(asked.images, 1)
                ]
        except TimeoutError:
            raise Refusal(
                503, "too_late", f"the images were not there within {self._limits.answer_s:g} s", 1.0
            ) from None
        except ExceptionGroup as error:
            raise error.exceptions[0] from None
        finally:
            if web is not None:
                web.stop()
        return [task.result() for task in tasks], asked.top_k

    async def _of_item(self, item: ImageInput, place: int, web: WebClient | None, share: MemoryLease) -> Upload:
        if (item.base64 is None) == (item.url is None):
            raise Refusal(422, "invalid", f"images.{place - 1} must have either base64 or url")
        if item.base64 is not None:
            name = _name(item.name, place)
            text = item.base64.partition(",")[2] if item.base64.startswith("data:") else item.base64
            try:
                return self._upload(
                    name, await asyncio.to_thread(_decoded, text) if len(text) > _STEP else _decoded(text)
                )
            except (binascii.Error, ValueError) as error:
                return Upload(name, error=f"not base64 ({error})")
        return await self._fetched(item.name, str(item.url), place, web, share)

    async def _fetched(self, given: str, url: str, place: int, web: WebClient | None, share: MemoryLease) -> Upload:
        name = _name(given or file_name(url), place)
        if web is None:
            raise Refusal(
                403, "forbidden", "this server fetches no addresses (its owner may allow it: fetch.enabled=true)"
            )
        if not is_url(url):
            return Upload(name, error="not an http:// or https:// address")
        loop = asyncio.get_running_loop()
        try:
            return Upload(
                name, await loop.run_in_executor(self._fetchers, web.image, url, self._max_image_bytes, share.take)
            )
        except UnreadableImage as error:
            return Upload(name, error=error.reason.removesuffix(ALLOWING))

    def _upload(self, name: str, content: bytes) -> Upload:
        """The image, unless it is larger than the model's process would look at."""
        if len(content) > self._max_image_bytes:
            return Upload(name, error=f"larger than {self._max_image_bytes / 2**20:.3g} MiB")
        return Upload(name, content)

    def _too_many(self) -> Refusal:
        return Refusal(413, "too_large", f"more than {self._limits.max_images} images in one request")


def _commas(body: bytearray, most: int) -> int:
    """How many there are, or as many as are too many."""
    found = 0
    for start in range(0, len(body), _STEP):
        found += body.count(b",", start, start + _STEP)
        if found > most:
            break
    return found


def _top_k_of(texts: list[tuple[str, str]]) -> int | None:
    """The one text that a form may hold beside its files."""
    top_k = None
    for name, text in texts:
        if name != "top_k":
            raise Refusal(
                422, "invalid", f"the form has the text {name[:100]!r}: it takes files (images=@FILE) and top_k"
            )
        try:
            top_k = _TOP_K.validate_python(text)
        except ValidationError:
            raise Refusal(422, "invalid", "top_k must be a whole number from 1") from None
    return top_k


def _decoded(text: str) -> bytes:
    """The bytes that base64 stands for, in either alphabet, wrapped or not; in steps, between which other threads run."""
    if ("-" in text or "_" in text) and ("+" in text or "/" in text):
        raise ValueError("two alphabets")
    parts, rest, ended = [], b"", False
    for start in range(0, len(text), _STEP):
        plain = rest + text[start : start + _STEP].encode("ascii").translate(_URL_SAFE, _WRAPS)
        if (ended and plain) or plain.endswith(b"==="):
            raise ValueError("padding inside")
        whole = len(plain) - len(plain) % 4
        parts.append(base64.b64decode(plain[:whole], validate=True))
        rest, ended = plain[whole:], ended or plain[:whole].endswith(b"=")
    return b"".join([*parts, base64.b64decode(rest, validate=True)])


def _name(given: str | None, place: int) -> str:
    """The client's name for an image, for its eyes only: no folders, nothing that moves a terminal's cursor."""
    last = (given or "").replace("\\", "/").rpartition("/")[2]
    clean = printable(last.encode("utf-8", "replace").decode()).strip()[:_NAME_CHARACTERS]
    return clean or f"image-{place}"
