"""Access control: API keys, rate limits, host names (against DNS rebinding), and pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from image_classifier.errors import ConfigError
from image_classifier.serving.request_limits import Refusal
from image_classifier.text import printable

log = logging.getLogger(__name__)

# Paths that need no key: the page without its answers, the API description, probes.
_OPEN_PATHS = re.compile(r"/(page/.*|healthz|readyz|v2/health/(live|ready)|favicon\.ico|docs|openapi\.json)?")
_MAX_CLIENTS = 10_000  # whose requests are counted; the least recent one is forgotten first
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class AccessSettings:
    """The keys of `access`.

    Args:
        keys_file: A file with one API key per line, optionally after a name for the log. Each request must bring one of
            the keys; null needs none.
        per_minute: Requests per minute that one client (its key, else its address) may send; null sets no limit.
        burst: Requests that a client may send at once.
        allowed_hosts: Host names that the server answers to, * for any; null allows the names of this machine where the
            server listens on a loopback address, else any.
        cors_origins: Other sites whose pages may send requests, such as https://example.org.
        proxies: Addresses or networks of reverse proxies, whose X-Forwarded-For is trusted.
    """

    keys_file: str | None = None
    per_minute: float | None = None
    burst: int = 20
    allowed_hosts: list[str] | None = None
    cors_origins: list[str] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.per_minute is not None and not 0 < self.per_minute <= 1e6:
            raise ConfigError(f"invalid access.per_minute {self.per_minute}", "expected more than 0, at most 1000000")
        if not 1 <= self.burst <= 1_000_000:
            raise ConfigError(f"invalid access.burst {self.burst}", "expected 1 to 1000000")
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ConfigError(
                    f"invalid access.cors_origins {origin!r}",
                    "write an origin such as https://example.org, without a path and without *",
                )
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ConfigError(
                    f"invalid access.proxies {proxy!r}", "write addresses or networks: 10.0.0.7, 10.0.0.0/8"
                ) from error

    def trusted_proxies(self) -> list[str]:
        """Return the proxies; those of IPv4 also in the form that a dual-stack socket reports.

        >>> AccessSettings(proxies=["10.0.0.0/8"]).trusted_proxies()
        ['10.0.0.0/8', '::ffff:10.0.0.0/104']
        """
        networks = [ipaddress.ip_network(proxy) for proxy in self.proxies]
        mapped = [
            f"::ffff:{network.network_address}/{96 + network.prefixlen}" for network in networks if network.version == 4
        ]
        return [*map(str, networks), *mapped]

    def load_keys(self) -> dict[bytes, str]:
        """Return the hash of each key with its name for the log.

        Raises:
            ConfigError: The file cannot be read, or a key is too short.
        """
        if self.keys_file is None:
            return {}
        path = Path(self.keys_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"access.keys_file={str(path)!r} cannot be read ({reason})") from error
        keys = [(" ".join(name), key) for *name, key in _split_lines(lines)]
        if not keys:
            raise ConfigError(
                f"access.keys_file={str(path)!r} holds no key", "write one per line: openssl rand -hex 24"
            )
        if any(len(key) < _MIN_KEY_LENGTH or not (key.isascii() and key.isprintable()) for _, key in keys):
            raise ConfigError(
                f"a key in {str(path)!r} is shorter than {_MIN_KEY_LENGTH} characters or not plain ASCII",
                "make one with: openssl rand -hex 24",
            )
        hashed = [(_hash(key.encode()), printable(name)) for name, key in keys]
        return {value: name or f"key-{value.hex()[:8]}" for value, name in hashed}


def _split_lines(lines: Iterable[str]) -> list[list[str]]:
    """Return the words of each line that is neither empty nor a comment."""
    return [line.split() for line in lines if line.strip() and not line.strip().startswith("#")]


def is_open(path: str) -> bool:
    """Check whether a path needs no key.

    >>> is_open("/healthz"), is_open("/predict")
    (True, False)
    """
    return _OPEN_PATHS.fullmatch(path) is not None


def is_loopback(host: str) -> bool:
    """Check whether only this machine can reach a server that listens on this host.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass
class _Bucket:
    """A token bucket: one token is one request."""

    tokens: float
    updated: float


class AccessPolicy:
    """Accepts or refuses each request before its body is read. A wrong key takes exactly as long as a right one."""

    def __init__(self, settings: AccessSettings, host: str) -> None:
        self._settings = settings
        self._keys = settings.load_keys()
        self._last_error = ""
        self._tokens_per_s = None if settings.per_minute is None else settings.per_minute / 60
        local_names = ["localhost", "127.0.0.1", "[::1]", host.lower()] if is_loopback(host) else ["*"]
        allowed = local_names if settings.allowed_hosts is None else settings.allowed_hosts
        self._hosts = [name.lower() for name in allowed]
        self.cors_origins = frozenset(settings.cors_origins)
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self._keys)

    def reload_keys(self) -> None:
        """Read the keys file again. Where it is invalid the old keys stay, and the reason is logged once."""
        try:
            keys = self._settings.load_keys()
            problem = ""
        except ConfigError as error:
            keys = self._keys
            problem = str(error)
        if problem and problem != self._last_error:
            log.error("the API keys were not changed: %s", problem)
        elif keys != self._keys:
            log.info("the API keys have changed: %d keys, before %d", len(keys), len(self._keys))
        self._keys = keys
        self._last_error = problem

    def check(self, method: str, path: str, headers: Mapping[bytes, bytes], client: str) -> str:
        """Return the key's name for the log, "" where none is needed; raise Refusal where it is not allowed."""
        self._check_host(headers.get(b"host", b"").decode("latin-1").lower())
        self._check_origin(method, headers)
        if is_open(path):
            return ""
        key = _hash(_key_in(headers)) if self._keys else b""
        name = self._find_key(key) if self._keys else ""
        # Clients with a valid key are counted by the key, others by their address: so is whoever guesses keys.
        self._check_rate(key if name else client.encode())
        if name is None:
            raise Refusal(401, "unauthorized", "this server needs an API key: send it in the header X-API-Key")
        return name

    def _check_host(self, host: str) -> None:
        """Refuse unknown host names: in a DNS rebinding attack the name of another site resolves to this machine."""
        name = re.sub(r":\d+$", "", host)
        if "*" not in self._hosts and name not in self._hosts:
            raise Refusal(403, "forbidden", f"this server does not answer to the host name {name[:100]!r}")

    def _check_origin(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse requests that pages of other sites send.

        Browsers send Sec-Fetch-Site where they trust the connection (HTTPS or localhost), else only Origin. Other
        clients send neither.
        """
        if method in ("GET", "HEAD", "OPTIONS"):
            return
        origin = headers.get(b"origin", b"")
        same_origin = not origin or origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
        site = headers.get(b"sec-fetch-site", b"none" if same_origin else b"cross-site")
        if site not in (b"same-origin", b"none") and origin.decode("latin-1") not in self.cors_origins:
            raise Refusal(403, "forbidden", "pages of other sites may not send requests to this server")

    def _find_key(self, hashed: bytes) -> str | None:
        """Return the name of a key; compares all keys, so that the time tells nothing."""
        match = None
        for key, name in self._keys.items():
            match = name if hmac.compare_digest(key, hashed) else match
        return match

    def _check_rate(self, client: bytes) -> None:
        """Take a token from the client's bucket; raise Refusal where it is empty."""
        if self._tokens_per_s is None:
            return
        # The monotonic clock never jumps.
        now = time.monotonic()
        burst = float(self._settings.burst)
        # Removed and added again, so that the least recent client is first.
        bucket = self._buckets.pop(client, None) or _Bucket(burst, now)
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.updated) * self._tokens_per_s)
        bucket.updated = now
        self._buckets[client] = bucket
        while len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) / self._tokens_per_s
            raise Refusal(429, "rate_limited", "too many requests from this client", wait_s)
        bucket.tokens -= 1


def _key_in(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the key in X-API-Key or in a bearer token."""
    bearer = headers.get(b"authorization", b"")
    return headers.get(b"x-api-key") or (bearer[7:].strip() if bearer[:7].lower() == b"bearer " else b"")
