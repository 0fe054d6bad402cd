"""Who may open the page and what a browser may be made to do by others, over HTTP as browsers speak it."""

import base64
import re
from pathlib import Path

import pytest
from gated import Site

import serve.page
from serve.gate.keys import Keys, Role
from serve.routes import PAGE

FOLDER = Path(serve.page.__file__).parent


def basic(password: str, user: str = "anyone") -> str:
    """What a browser sends when it was given a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def status(running: Site, method: str, path: str, **headers: str) -> int:
    with running.client(**{name.replace("_", "-"): value for name, value in headers.items()}) as client:
        return client.request(method, path).status_code


def test_every_file_of_the_page_is_served_and_none_is_from_elsewhere(running: Site) -> None:
    ours = {file.name for file in FOLDER.iterdir() if file.suffix not in (".py", "") and file.name != "index.html"}
    assert {path.removeprefix("/page/") for path in PAGE} == ours | {"/", "house.css"}
    with running.client() as client:
        texts = {path: client.get(path).raise_for_status().text for path in PAGE}
    linked = re.findall(r'(?:src|href)="([^#][^"]*)"', texts["/"])
    imported = {f"page/{name}" for text in texts.values() for name in re.findall(r'from "\./(.+)"', text)}
    assert {f"/{name}" for name in [*linked, *imported]} == set(PAGE) - {"/"}
    for path, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path


def test_files_have_their_types_and_a_policy(running: Site) -> None:
    with running.client() as client:
        for path in PAGE:
            headers = client.get(path).headers
            kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}.get(path.rpartition(".")[2])
            assert headers["content-type"] == f"{kind or 'text/html'}; charset=utf-8"
            assert headers["x-content-type-options"] == "nosniff"
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy


def test_a_file_that_the_browser_has_is_not_sent_again(running: Site) -> None:
    with running.client() as client:
        first = client.get("/page/page.js")
        assert first.headers["cache-control"] == "no-cache"
        for tag in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
            again = client.get("/page/page.js", headers={"if-none-match": tag})
            assert (again.status_code, again.content) == (304, b"")
        assert client.get("/page/page.js", headers={"if-none-match": '"other"'}).status_code == 200
        assert first.headers["etag"] != client.get("/page/api.js").headers["etag"]


def test_a_browser_is_asked_for_the_key(running: Site, keys: Keys) -> None:
    """On the page and its files; a program's request for anything else makes no browser ask its user."""
    keys.add("a")
    with running.client() as client:
        for path in PAGE:
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Basic realm="qpack", charset="UTF-8"'
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_a_key_is_a_password_of_any_user(running: Site, keys: Keys) -> None:
    _, inference = keys.add("inference")
    _, monitor = keys.add("monitor", Role.MONITOR)
    _, admin = keys.add("admin", Role.ADMIN)
    for path in PAGE:
        for token in (inference, admin):
            for user in ("anyone", "", "Jörg"):
                assert status(running, "GET", path, authorization=basic(token, user)) == 200
        assert status(running, "GET", path, authorization=basic(monitor)) == 403
    assert status(running, "GET", "/v1/adapters", authorization=basic(admin)) == 200
    assert status(running, "GET", "/v1/adapters", authorization=basic(inference)) == 403
    for wrong in (basic("x"), basic(inference[:-1]), basic("", inference), f"Basic {inference}", "Basic", "Basic /w=="):
        assert status(running, "GET", "/", authorization=wrong) == 401
    keys.revoke("inference")
    assert status(running, "GET", "/", authorization=basic(inference)) == 401


@pytest.mark.parametrize("with_keys", [False, True])
def test_other_sites_get_nothing_done(running: Site, keys: Keys, with_keys: bool) -> None:
    """A browser sends the password, and reaches a server without keys, by itself, whatever page makes it do so."""
    token = keys.add("admin", Role.ADMIN)[1] if with_keys else ""
    own = {"authorization": basic(token)} if with_keys else {}
    here = running.url.removeprefix("http://")
    _, port = here.split(":")
    neighbour = f"http://127.0.0.1:{int(port) % 65535 + 1}"
    foreign = [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},  # another port of this machine
        {"sec_fetch_site": "cross-site", "origin": f"http://{here}"},
        *({"origin": origin} for origin in ("https://evil.example", neighbour, "null", "http://[")),
    ]
    for headers in foreign:
        for method, path in (("POST", "/v1/adapters"), ("POST", "/invocations"), ("POST", "/v1/completions")):
            assert status(running, method, path, **own, **headers) == 403, (path, headers)
        assert status(running, "GET", "/metrics", **own, **headers) == 403, headers
    assert not running.engine.asked
    for headers in ({"sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"}, {"origin": running.url}, {}):
        assert status(running, "POST", "/v1/adapters", **own, **headers) == 200, headers
    # A proxy may have given the request another host: the browser has said what matters.
    proxied = {"sec_fetch_site": "same-origin", "origin": "https://qpack.example"}
    assert status(running, "POST", "/v1/adapters", **own, **proxied) == 200
    # A link from elsewhere opens the page.
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert status(running, "GET", "/", **own, **link) == 200
    assert status(running, "POST", "/v1/adapters", **own, **link) == 403, "a form that sends itself"


def test_other_sites_are_refused_in_openais_shape(running: Site) -> None:
    with running.client(origin="https://evil.example") as client:
        error = client.post("/v1/adapters").json()["error"]
    assert (error["code"], error["type"]) == (403, "PermissionDeniedError")
    assert "page of another site" in error["message"]


def test_a_key_that_a_program_sends_is_its_own(running: Site, keys: Keys) -> None:
    """No page can make a browser send it without asking the server first, which says no."""
    _, token = keys.add("admin", Role.ADMIN)
    bearer = {"authorization": f"Bearer {token}", "origin": "https://app.example", "sec_fetch_site": "cross-site"}
    assert status(running, "POST", "/v1/adapters", **bearer) == 200
    preflight = {"origin": "https://app.example", "access_control_request_method": "POST"}
    assert status(running, "OPTIONS", "/v1/adapters", **preflight) == 401


def test_without_keys_only_names_of_this_machine_are_answered_to(running: Site) -> None:
    """A site that points its own name here is the same origin to the browser (DNS rebinding)."""
    port = running.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", "[::1]:80", "127.0.0.2"):
        for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/adapters")):
            assert status(running, method, path, host=host) == 200, host
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "192.0.2.7", "[", ""):
        for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/adapters"), ("GET", "/metrics")):
            assert status(running, method, path, host=host) in (400, 403), host
        assert status(running, "GET", "/health", host="evil.example") == 200


def test_with_keys_any_name_will_do(running: Site, keys: Keys) -> None:
    _, token = keys.add("a")
    assert status(running, "GET", "/", authorization=basic(token), host="qpack.example") == 200
