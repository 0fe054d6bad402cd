"""Which routes a key opens: the list of those that need no admin. Whatever is added elsewhere is for admins only.

Without keys, whoever reaches the server may use it; but only from this machine may they change anything.

Programs send a key as ``Authorization: Bearer``. For the page at ``/`` it is the password of HTTP Basic, which browsers
ask for and then send by themselves; as they reach a server without keys by themselves. So another site's page could
make them do what only their user may. Whatever is not asked by Bearer is refused if it comes from another origin, which
the browser says (``Sec-Fetch-Site``, ``Origin``; the rule of Go's `CrossOriginProtection
<https://pkg.go.dev/net/http#CrossOriginProtection>`_), and on an address of this machine also if it names another host:
a site may point its own name here (DNS rebinding).
"""

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from serve.gate.exchange import Exchange
from serve.gate.keys import Key, Keys, Role
from serve.gate.refusal import Refusal
from serve.routes import PAGE

PUBLIC = frozenset({("GET", "/health")})
"""Open without a key: probes of load balancers and orchestrators have none, and it tells up or down only."""

MODELS = "/v1/models"
MODEL = f"{MODELS}/{{model}}"
"""Stands for the route of every one."""

OPENED: Mapping[Role, frozenset[tuple[str, str]]] = {
    Role.INFERENCE: frozenset(
        {
            *(("GET", path) for path in PAGE),
            ("GET", MODELS),
            ("GET", MODEL),
            ("GET", "/version"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
        }
    ),
    Role.MONITOR: frozenset({("GET", "/metrics"), ("GET", "/version")}),
}
"""Besides `PUBLIC`; an admin's key opens all."""

_BEARER = ((b"www-authenticate", b"Bearer"),)
_BASIC = ((b"www-authenticate", b'Basic realm="qpack", charset="UTF-8"'),)
"""Makes a browser ask for the key."""


def caller(exchange: Exchange, keys: Keys) -> Key | None:
    """Return the key of a request to any route but `PUBLIC` ones, None where it needs none.

    Raises:
        Refusal: 401 without a live key; 403 where the key does not open the route, or another site's page asks.
    """
    method, path = exchange.scope["method"], exchange.scope["path"]
    route = (method, MODEL if path.startswith(f"{MODELS}/") else path)
    scheme, token = _token(exchange.headers.get("authorization", ""))
    key = keys.find(token) if token else None
    if key is None and not keys.required:
        if scheme != "bearer":
            _require_own_site(exchange)
        _require_own_name(exchange)
        if not any(route in routes for routes in OPENED.values()):
            _require_local(exchange)
        return None
    challenge = _BASIC if path in PAGE else _BEARER
    if not token:
        raise Refusal(401, "an API key is needed: send it as Authorization: Bearer KEY", headers=challenge)
    if key is None:
        raise Refusal(401, "the API key is none of this server's, or was revoked", headers=challenge)
    if scheme != "bearer":
        _require_own_site(exchange)
    if key.role is not Role.ADMIN and route not in OPENED[key.role]:
        raise Refusal(403, f"this key is for {key.role}, which does not open {method} {path}")
    return key


def _token(authorization: str) -> tuple[str, str]:
    """The scheme of the header, and the key in it: all of Bearer (RFC 6750), the password of Basic (RFC 7617)."""
    scheme, _, credentials = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return "bearer", credentials.strip()
        case "basic":
            try:
                return "basic", base64.b64decode(credentials, validate=True).decode().partition(":")[2]
            except ValueError:
                return "basic", ""
        case other:
            return other, ""


def _require_own_site(exchange: Exchange) -> None:
    """Raise 403 where a page of another origin makes a browser ask; a link to here, which its user follows, is none."""
    headers = exchange.headers
    if site := headers.get("sec-fetch-site"):
        own = site in ("same-origin", "none")
    else:
        own = headers.get("origin") in (None, f"http://{headers.get('host')}", f"https://{headers.get('host')}")
    followed = exchange.scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if not own and not followed:
        raise Refusal(403, "a page of another site asks in your name: send a key as Authorization: Bearer KEY")


def _require_own_name(exchange: Exchange) -> None:
    """Raise 403 where an address that only this machine reaches is asked for by another machine's name."""
    server = exchange.scope.get("server")
    host = exchange.headers.get("host", "")
    if server and is_loopback(server[0]) and not is_loopback(_hostname(host)):
        raise Refusal(403, f"without API keys this answers to names of this machine only, not to {host!r}")


def _require_local(exchange: Exchange) -> None:
    """Raise 403 unless a program on this machine asks."""
    client = exchange.scope.get("client")
    if client is None or not is_loopback(client[0]):
        raise Refusal(403, "without API keys this is open to programs on the server's machine only (qpack keys add)")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, and nobody else can send to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
