"""Which routes a key opens: the list of those that need no admin. Whatever is added elsewhere is for admins only.

Without keys, whoever reaches the server may use it; but only from this machine may they change anything, and only if no
web page of another origin makes their browser do it.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from serve.gate.exchange import Exchange
from serve.gate.keys import Key, Keys, Role
from serve.gate.refusal import Refusal

PUBLIC = frozenset({("GET", "/health")})
"""Open without a key: probes of load balancers and orchestrators have none, and it tells up or down only."""

MODELS = "/v1/models"
MODEL = f"{MODELS}/{{model}}"
"""Stands for the route of every one."""

OPENED: Mapping[Role, frozenset[tuple[str, str]]] = {
    Role.INFERENCE: frozenset(
        {
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

_CHALLENGE = ((b"www-authenticate", b"Bearer"),)


def caller(exchange: Exchange, keys: Keys) -> Key | None:
    """Return the key of a request to any route but `PUBLIC` ones, None where it needs none.

    Raises:
        Refusal: 401 without a live key, 403 where the key does not open the route.
    """
    method, path = exchange.scope["method"], exchange.scope["path"]
    route = (method, MODEL if path.startswith(f"{MODELS}/") else path)
    if not keys.required:
        if not any(route in routes for routes in OPENED.values()):
            _require_local(exchange)
        return None
    scheme, _, token = exchange.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Refusal(401, "an API key is needed: send it as Authorization: Bearer KEY", headers=_CHALLENGE)
    key = keys.find(token.strip())
    if key is None:
        raise Refusal(401, "the API key is none of this server's, or was revoked", headers=_CHALLENGE)
    if key.role is not Role.ADMIN and route not in OPENED[key.role]:
        raise Refusal(403, f"this key is for {key.role}, which does not open {method} {path}")
    return key


def _require_local(exchange: Exchange) -> None:
    """Raise 403 unless a program on this machine asks, of a name of this machine, on its own account."""
    client = exchange.scope.get("client")
    host = urlsplit(f"//{exchange.headers.get('host', '')}").hostname or ""
    origin = exchange.headers.get("origin")
    same_origin = origin is None or urlsplit(origin).netloc == exchange.headers.get("host")
    if client is None or not is_loopback(client[0]) or not is_loopback(host) or not same_origin:
        raise Refusal(403, "without API keys this is open to programs on the server's machine only (qpack keys add)")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, and nobody else can send to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
