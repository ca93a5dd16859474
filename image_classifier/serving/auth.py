"""Who may ask: API keys, how often each client may, under which host names, and from which pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from image_classifier.errors import ConfigError
from image_classifier.serving.request_limits import Refusal
from image_classifier.text import printable

log = logging.getLogger(__name__)

# What needs no key: the page without its answers, what the API looks like, probes.
_OPEN = re.compile(r"/(page/.*|healthz|readyz|v2/health/(live|ready)|favicon\.ico|docs|openapi\.json)?")
_MOST_CLIENTS = 10_000  # whose requests are counted
_LEAST_CHARACTERS = 16  # of a key


@dataclass(frozen=True)
class AccessSettings:
    """The keys of `access`.

    Args:
        keys_file: A file of API keys, one a line, maybe after a name for the log; each request must bring one of them. null: none is needed.
        per_minute: Requests that one client, by its key or else its address, may send in a minute; null: any number.
        burst: How many of them at once.
        allowed_hosts: Host names to answer to, * for any; null: this machine's own where only it can ask, else any.
        cors_origins: Pages of other sites that may ask, such as https://example.org; none by default.
        proxies: Addresses or networks of proxies in front, whose X-Forwarded-For says who asks; of others it says nothing.
    """

    keys_file: str | None = None
    per_minute: float | None = None
    burst: int = 20
    allowed_hosts: list[str] | None = None
    cors_origins: list[str] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.per_minute is not None and not 0 < self.per_minute <= 1e6:
            raise ConfigError(f"access.per_minute must be above 0, not {self.per_minute}")
        if not 1 <= self.burst <= 1_000_000:
            raise ConfigError(f"access.burst must be at least 1, not {self.burst}")
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ConfigError(
                    f"access.cors_origins knows no {origin!r}",
                    "write an origin such as https://example.org, without a path and without *",
                )

        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ConfigError(
                    f"access.proxies knows no {proxy!r}", "write addresses or networks: 10.0.0.7, 10.0.0.0/8"
                ) from error

    def trusted_proxies(self) -> list[str]:
        """The proxies, those of IPv4 also as a socket for both kinds of addresses names them."""
        networks = [ipaddress.ip_network(proxy) for proxy in self.proxies]
        mapped = [
            f"::ffff:{network.network_address}/{96 + network.prefixlen}" for network in networks if network.version == 4
        ]
        return [*map(str, networks), *mapped]

    def keys(self) -> dict[bytes, str]:
        """The hash of each key and what the log calls it; ConfigError where the file cannot be read or a key is too short."""
        if self.keys_file is None:
            return {}
        path = Path(self.keys_file).expanduser()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"access.keys_file={str(path)!r} cannot be read ({getattr(error, 'strerror', None) or error})"
            ) from error
        named = [
            (" ".join(name), key)
            for *name, key in map(str.split, lines)
            if key and not "".join((*name, key)).startswith("#")
        ]
        if not named:
            raise ConfigError(f"access.keys_file={str(path)!r} holds no key", "write one a line: openssl rand -hex 24")
        if any(len(key) < _LEAST_CHARACTERS or not (key.isascii() and key.isprintable()) for _, key in named):
            raise ConfigError(
                f"a key in {str(path)!r} is shorter than {_LEAST_CHARACTERS} characters or not plain ASCII",
                "openssl rand -hex 24 makes one",
            )
        hashed = [(_hash(key.encode()), printable(name)) for name, key in named]
        return {value: name or f"key-{value.hex()[:8]}" for value, name in hashed}


def is_open(path: str) -> bool:
    """Whether a path needs no key, wherever there are keys."""
    return _OPEN.fullmatch(path) is not None


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class _Bucket:
    tokens: float
    at: float


class AccessPolicy:
    """Decides over each request before its body is read; nothing here takes longer for a wrong key than for a right one."""

    def __init__(self, asked: AccessSettings, host: str) -> None:
        self._asked, self._keys, self._said = asked, asked.keys(), ""
        self._per_s = None if asked.per_minute is None else asked.per_minute / 60
        self._burst = asked.burst
        own = ["localhost", "127.0.0.1", "[::1]", host.lower()] if is_loopback(host) else ["*"]
        self._hosts = [name.lower() for name in (own if asked.allowed_hosts is None else asked.allowed_hosts)]
        self._origins = set(asked.cors_origins)
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self._keys)

    def reread(self) -> None:
        """Look whether there are other keys now; those of a file that is not as it should be stay, and the log says why once."""
        try:
            found, said = self._asked.keys(), ""
        except ConfigError as error:
            found, said = self._keys, str(error)
        if said and said != self._said:
            log.error("the keys stay as they are: %s", said)
        elif found != self._keys:
            log.info("there are other keys now: %d, were %d", len(found), len(self._keys))
        self._keys, self._said = found, said

    def check(self, method: str, path: str, headers: Mapping[bytes, bytes], client: str) -> str:
        """What the log calls the key, "" where none is needed; Refusal where this request may not be made."""
        self._check_host(headers.get(b"host", b"").decode("latin-1").lower())
        self._check_site(method, headers)
        if is_open(path):
            return ""
        who = _hash(_key_of(headers)) if self._keys else client.encode()
        known = self._name(who) if self._keys else ""
        self._check_rate(client.encode() if known is None else who)  # whoever tries keys is counted by the address
        if known is None:
            raise Refusal(401, "unauthorized", "this server needs an API key: send it as the header X-API-Key")
        return known

    def cors(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What an answer tells the browser of another site's page: nothing unless that site is allowed."""
        origin = headers.get(b"origin", b"")
        if not self._origins:
            return []
        allowed = [(b"access-control-allow-origin", origin)] if origin.decode("latin-1") in self._origins else []
        exposed = [(b"access-control-expose-headers", b"x-request-id, retry-after")] if allowed else []
        return [(b"vary", b"origin"), *allowed, *exposed]

    def _check_host(self, host: str) -> None:
        """A page of another site whose name was made to lead here (DNS rebinding) still sends its own name."""
        name = re.sub(r":\d+$", "", host)
        if "*" not in self._hosts and name not in self._hosts:
            raise Refusal(403, "forbidden", f"this server does not answer to the host name {name[:100]!r}")

    def _check_site(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Browsers say where a page comes from by Sec-Fetch-Site where they trust the connection, else only by Origin; others say neither."""
        if method in ("GET", "HEAD", "OPTIONS"):
            return
        origin = headers.get(b"origin", b"")
        own = not origin or origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
        site = headers.get(b"sec-fetch-site", b"none" if own else b"cross-site")
        if site not in (b"same-origin", b"none") and origin.decode("latin-1") not in self._origins:
            raise Refusal(403, "forbidden", "pages of other sites may not ask this server")

    def _name(self, hashed: bytes) -> str | None:
        found = None
        for key, name in self._keys.items():  # all of them, always
            found = name if hmac.compare_digest(key, hashed) else found
        return found

    def _check_rate(self, who: bytes) -> None:
        """A token bucket a client; the clock is one that never jumps."""
        if self._per_s is None:
            return
        now = time.monotonic()
        bucket = self._buckets.pop(who, None) or _Bucket(self._burst, now)
        bucket.tokens = min(float(self._burst), bucket.tokens + (now - bucket.at) * self._per_s)
        bucket.at = now
        self._buckets[who] = bucket
        while len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            raise Refusal(429, "rate_limited", "too many requests from this client", (1 - bucket.tokens) / self._per_s)
        bucket.tokens -= 1


def _key_of(headers: Mapping[bytes, bytes]) -> bytes:
    bearer = headers.get(b"authorization", b"")
    return headers.get(b"x-api-key") or (bearer[7:].strip() if bearer[:7].lower() == b"bearer " else b"")


def preflight(asked: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """What a browser is told that asks whether a page of an allowed site may send a request with our headers."""
    methods = ", ".join(asked).encode()
    return [
        (b"access-control-allow-methods", methods),
        (b"access-control-allow-headers", b"content-type, x-api-key, authorization, x-request-id"),
        (b"access-control-max-age", b"600"),
    ]
