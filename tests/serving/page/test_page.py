"""The page in headless Chromium, found by roles and names as a screen reader finds it.

Before a real gate, registry and check of uploads, and a stand-in for vLLM that says ``MODEL says PROMPT``.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import factors
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from browser import CHROMIUM, chromium
from gated import BASE, Site, site
from playwright.sync_api import Browser, Locator, Page, expect
from playwright.sync_api import Error as PlaywrightError

import qpack
from serve.gate.keys import Keys, Role
from serve.registry import Registry, Version

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

UNKNOWN = "\N{EN DASH}"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def base(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / BASE
    qpack.convert(llama, directory)
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter's folder, beside files of a training that are no part of it."""
    folder = factors.write(tmp_path_factory.mktemp("adapters") / "my support", factors.draw(base))
    (folder / "README.md").write_text("about")
    (folder / "checkpoint-1").mkdir()
    return folder


@pytest.fixture(scope="module")
def filled(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that has ``support`` with two versions, the second live, and ``billing``. Copied by each test."""
    folder = tmp_path_factory.mktemp("filled")
    other = factors.write(folder / "other", factors.draw(base, seed=1))
    with Registry.open(folder / "registry", base=base) as opened:
        for name, source in (("support", adapter), ("support", other), ("billing", adapter)):
            opened.add(name, source, by="ann")
    return folder / "registry"


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Iterator[Registry]:
    shutil.copytree(filled, tmp_path / "registry")
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def old(registry: Registry) -> Version:
    return registry.versions("support")[0]


@pytest.fixture
def new(registry: Registry) -> Version:
    return registry.versions("support")[1]


@pytest.fixture
def running(registry: Registry) -> Iterator[Site]:
    with site(registry.directory, registry=registry) as made:
        yield made


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens the page of a site; at the end nothing may have been asked of another server, or gone wrong unseen."""
    stack, wrong = ExitStack(), []

    def opened(running: Site, *, stopped_clock: bool = False, **options: Any) -> Page:
        context = browser.new_context(**options)
        stack.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda one: None if one.url.startswith(running.url) else wrong.append(one.url))
        if stopped_clock:
            page.clock.install()
        page.goto(running.url)
        expect(page.get_by_role("heading", level=1)).to_have_text(BASE)
        return page

    with stack:
        yield opened
    # Refusals of the API are in the console too, whatever a page does about them.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def line(page: Page, version: Version) -> Locator:
    """The row of a version, which begins with its name and digits."""
    return page.get_by_role("row", name=re.compile(f"^{version.id.replace('@', ' ?@')}"))


def cells(page: Page, version: Version) -> dict[str, str]:
    """The row of a version, by the headings."""
    headings = page.get_by_role("columnheader").all_inner_texts()
    row = line(page, version)
    found = row.get_by_role("rowheader").or_(row.get_by_role("cell")).all_inner_texts()
    return dict(zip(headings, found, strict=True))


def drop(page: Page, *paths: Path) -> None:
    """Drag files or folders from the desktop onto the zone."""
    zone = page.get_by_text("Drop the folder of an adapter here")
    zone.scroll_into_view_if_needed()
    box = zone.bounding_box()
    assert box
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        where = {"x": box["x"] + 5, "y": box["y"] + 5, "data": data}
        session.send("Input.dispatchDragEvent", {"type": kind, **where})


def ask(page: Page, prompt: str, *models: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for box in page.get_by_role("checkbox", checked=True, name=re.compile("^(?!Let)")).all():
        box.uncheck()
    for model in models:
        page.get_by_role("checkbox", name=model, exact=True).check()
    page.get_by_role("button", name="Ask").click()


def test_versions_with_their_states_and_figures(
    running: Site, registry: Registry, old: Version, new: Version, visit: Open
) -> None:
    registry.canary("support", {old.digest: 5})
    registry.pin("support", old.digest, True)
    page = visit(running)
    row = cells(page, old)
    assert row["state"] == "canary 5 % pinned"
    assert (row["rank"], row["size"]) == ("4", "17.1 kB")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d by ann", row["added"])
    assert (row["requests/s"], row["first token"]) == (UNKNOWN, UNKNOWN), "nothing is known of the past"
    assert cells(page, new)["state"] == "live"
    expect(page.get_by_role("rowheader", name=f"support answered by {new.id}")).to_be_visible()
    running.ask("one two three", new.id, stream=True)
    slow = page.evaluate_handle(
        "() => { fetch('v1/completions', {method: 'POST', headers: {'content-type': 'application/json'},"
        f" body: JSON.stringify({{model: '{new.id}', prompt: 'slow ' + 'word '.repeat(60)}})}}) }}"
    )
    busy = line(page, new)
    expect(busy).to_contain_text("live in a slot")
    row = cells(page, new)
    assert row["running"] == "1"
    assert 0 < float(row["requests/s"]) < 1
    assert 0 < float(row["tokens/s"]) < 5
    assert re.fullmatch(r"\d+ ms", row["first token"])
    assert cells(page, old)["tokens/s"] == "0"
    tile = page.locator("dl.tiles > div", has_text="slots taken").get_by_role("definition")
    expect(tile).to_have_text("1 of 2")
    slow.dispose()


def test_rates_are_differences_of_the_last_half_minute(running: Site, visit: Open) -> None:
    measured = visit(running).evaluate(
        """async () => {
          const { History } = await import("/page/figures.js");
          const at = (seconds, counts) => ({ seconds, models: { a: counts, b: { requests: 7 } } });
          const history = new History();
          const said = [history.of("a")];
          history.add(at(100, { requests: 5, output_tokens: 50, first_tokens: 4, first_token_seconds: 2 }));
          said.push(history.of("a"));
          history.add(at(110, { requests: 15, output_tokens: 150, first_tokens: 8, first_token_seconds: 6 }));
          said.push(history.of("a"), history.of("unknown"), history.all());
          history.add(at(135, { requests: 15, output_tokens: 150, first_tokens: 8, first_token_seconds: 6 }));
          said.push(history.of("a"));
          history.forget();
          said.push(history.of("a"));
          return said;
        }"""
    )
    unknown = {"requests": None, "tokens": None, "first": None}
    growing = {"requests": 1, "tokens": 10, "first": 1}
    still = {"requests": 0, "tokens": 0, "first": None}
    assert measured == [unknown, unknown, growing, still, growing, still, unknown]


def test_an_adapter_is_uploaded_by_a_drop(running: Site, registry: Registry, adapter: Path, visit: Open) -> None:
    page = visit(running)
    drop(page, adapter)
    files = page.get_by_role("list", name="Files to upload").get_by_role("listitem")
    expect(files).to_have_text([re.compile(r"adapter_config\.json, \d+ B"), re.compile("adapter_model.safetensors, ")])
    name = page.get_by_role("textbox", name="Name")
    expect(name).to_have_value("my-support")
    expect(name).to_be_focused()
    page.keyboard.press("Enter")
    answer = page.get_by_role("status").filter(has_text="passed the check: rank 4")
    expect(answer).to_be_visible()
    [version] = registry.versions("my-support")
    expect(answer).to_contain_text(version.id)
    assert registry.alias("my-support").live == version
    expect(line(page, version)).to_be_visible()
    expect(page.get_by_role("checkbox", name="my-support", exact=True)).to_be_visible()
    # The files alone, of a name that they don't have; it is to be reached by its id only.
    drop(page, *sorted(adapter.glob("adapter_*")))
    page.get_by_role("textbox", name="Name").fill("quiet")
    page.get_by_role("checkbox", name="Let the name point at it").uncheck()
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("row", name="quiet has no live version")).to_be_visible()
    assert "quiet" not in registry.aliases()


def test_a_refusal_is_shown_in_full(running: Site, registry: Registry, base: Path, tmp_path: Path, visit: Open) -> None:
    page = visit(running)
    tensors = factors.draw(base)
    bad = factors.write(tmp_path / "bad", tensors, use_dora=True)
    with running.client() as client:
        files = {file.name: file.read_bytes() for file in sorted(bad.iterdir())}
        upload = [("file", (name, content)) for name, content in files.items()]
        message = client.post("/v1/adapters/bad", files=upload).json()["error"]["message"]
    assert "qpack merge" in message
    page.get_by_label("Files of an adapter", exact=True).set_input_files(sorted(bad.iterdir()))
    page.get_by_role("textbox", name="Name").fill("bad")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("status").filter(has_text="refused")).to_have_text(f"refused: {message}")
    expect(page.get_by_role("list", name="Files to upload").get_by_role("listitem")).to_have_count(2)
    assert not registry.versions("bad")
    # What is no adapter does not go at all.
    page.get_by_label("Files of an adapter", exact=True).set_input_files(Path(__file__))
    expect(page.get_by_role("status").filter(has_text="none of an adapter's files")).to_be_visible()


def test_promoting_rolling_back_and_removing_by_keyboard(
    running: Site, registry: Registry, old: Version, new: Version, visit: Open
) -> None:
    page = visit(running)
    said = page.get_by_role("region", name="Adapters", exact=True).get_by_role("status")

    def press(button: str) -> None:
        control = page.get_by_role("button", name=button, exact=True)
        control.focus()
        page.keyboard.press("Enter")

    press(f"Promote {old.id}")
    expect(said).to_have_text(f"{old.id} is live")
    assert registry.alias("support").live == old
    expect(page.get_by_role("button", name=f"Promote {old.id}")).to_be_hidden()
    press("Roll back support")
    expect(said).to_have_text(f"support is answered by {new.id} again")
    assert registry.alias("support").live == new
    press(f"Pin {old.id}")
    expect(page.get_by_role("button", name=f"Unpin {old.id}")).to_be_focused()
    assert registry.find("support", old.digest).pinned

    press(f"Remove {old.id}")
    question = page.get_by_role("dialog", name=f"Remove {old.id}?")
    expect(question.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(question).to_be_hidden()
    expect(page.get_by_role("button", name=f"Remove {old.id}")).to_be_focused()
    assert old.id in {version.id for version in registry.versions()}
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(said).to_have_text(f"removed {old.id}")
    expect(line(page, old)).to_have_count(0)
    expect(page.get_by_role("region", name="Table of adapters")).to_be_focused()
    assert registry.versions("support") == (new,)
    press("Roll back support")
    expect(said).to_have_text(f"support: no version was live before {new.id}")


def test_one_prompt_to_several_models_side_by_side(
    running: Site, registry: Registry, new: Version, visit: Open
) -> None:
    page = visit(running)
    page.get_by_label("System prompt").fill("be brief")
    ask(page, "slow one two three", BASE, "support", "billing")
    answer = page.get_by_role("article", name="support").get_by_role("log")
    expect(answer).to_have_text(re.compile(f"^{new.id} says"))
    assert answer.get_attribute("aria-busy") == "true", "it is shown while it comes"
    assert "three" not in answer.inner_text()
    expect(page.get_by_role("status").filter(has_text="3 of 3 answered")).to_be_visible()
    [billing] = registry.versions("billing")
    for model, version in ((BASE, BASE), ("support", new.id), ("billing", billing.id)):
        article = page.get_by_role("article", name=model)
        expect(article.get_by_role("log")).to_have_text(f"{version} says slow one two three ")
        expect(article.get_by_role("log")).to_have_attribute("aria-busy", "false")
        expect(article.locator(".version")).to_have_text(version)
        expect(article).to_contain_text(re.compile(r"[\d.]+ (ms|s) to the first token · [\d.]+ tokens/s · 6 tokens"))
    tops = {page.get_by_role("article", name=name).bounding_box()["y"] for name in (BASE, "support", "billing")}  # type: ignore[index]
    assert len(tops) == 1
    assert {body["model"] for body in running.engine.asked} == {BASE, new.id, billing.id}
    for body in running.engine.asked:
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert (body["max_tokens"], body["temperature"], body["stream"]) == (128, 0, True)


def test_answers_can_be_stopped_and_say_what_failed(running: Site, visit: Open) -> None:
    page = visit(running)
    ask(page, "slow " + "word " * 60, "support")
    expect(page.get_by_role("article", name="support").get_by_role("log")).to_contain_text("says")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status").filter(has_text="0 of 1 answered, stopped")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    deadline = time.monotonic() + 10
    while running.engine.aborted != 1:
        assert time.monotonic() < deadline, "the engine goes on for nobody"
        time.sleep(0.01)
    ask(page, "crash-later b c", "support")
    expect(page.get_by_role("alert")).to_have_text("the answer broke off, ask again")
    ask(page, "bad", "support")
    expect(page.get_by_role("alert")).to_have_text("no such thing")


def test_without_a_chat_template_models_go_on_with_the_text(registry: Registry, visit: Open) -> None:
    with site(registry.directory, registry=registry, chat=False) as running:
        page = visit(running)
        page.get_by_label("Prompt", exact=True).fill("once upon")
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        expect(page.get_by_role("log")).to_have_text(f"{BASE} says once upon ")
        assert [body["prompt"] for body in running.engine.asked] == ["once upon"]


def test_an_inference_key_opens_the_playground_only(running: Site, registry: Registry, visit: Open) -> None:
    with closing(Keys(registry.directory)) as keys:
        _, token = keys.add("a", models=["support"])
        _, admin = keys.add("ops", Role.ADMIN)
    with pytest.raises(PlaywrightError, match="ERR_INVALID_AUTH_CREDENTIALS"):  # it asks its user, who isn't there
        visit(running)
    password = {"username": "me", "password": token}
    page = visit(running, http_credentials=password)
    expect(page.get_by_role("checkbox", name="support", exact=True)).to_be_checked()
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["Playground"]
    expect(page.get_by_role("checkbox", name="billing")).to_have_count(0)
    ask(page, "hello", "support")
    expect(page.get_by_role("log")).to_contain_text("says hello")
    page = visit(running, http_credentials={"username": "", "password": admin})
    expect(page.get_by_role("heading", level=2)).to_have_text(["Adapters", "Upload", "Playground"])
    page.get_by_role("button", name="Roll back support").click()
    expect(page.get_by_role("region", name="Adapters", exact=True).get_by_role("status")).to_contain_text(
        "is answered by"
    )


def test_it_says_when_the_server_is_gone_and_rests_when_nobody_looks(running: Site, visit: Open) -> None:
    page = visit(running, stopped_clock=True)
    state = page.get_by_role("banner").get_by_role("status")
    expect(state).to_have_text("the server answers")
    page.context.set_offline(True)
    page.clock.run_for(2000)
    expect(state).to_have_text("the server does not answer; trying again")
    page.context.set_offline(False)
    page.clock.run_for(2000)
    expect(state).to_have_text("the server answers")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    look = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
    look += " document.dispatchEvent(new Event('visibilitychange')) }"
    page.evaluate(look, True)
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request("**/v1/adapters"):
        page.evaluate(look, False)
    with page.expect_request("**/v1/adapters"):
        page.clock.run_for(2000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_that_axe_finds_wrong(running: Site, adapter: Path, scheme: str, visit: Open) -> None:
    """Contrast, names, roles, landmarks, as axe-core measures them, with everything in use; and it fits a phone."""
    page = visit(running, color_scheme=scheme, reduced_motion="reduce")
    drop(page, adapter)
    ask(page, "crash-later b c", "support", "billing")
    expect(page.get_by_role("alert")).to_have_count(2)
    page.get_by_role("button", name="Roll back billing").click()
    expect(page.get_by_role("region", name="Adapters", exact=True).locator(".failed")).to_be_visible()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.get_by_role("button", name="Remove all billing").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_all_controls_are_reached_by_tab_with_a_mark(running: Site, visit: Open) -> None:
    page = visit(running)
    seen: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const on = document.activeElement;"
            " return [on.ariaLabel ?? on.innerText ?? on.name ?? '', getComputedStyle(on).outlineStyle] }"
        )
        if page.evaluate("document.activeElement === document.body"):
            break
        assert outline != "none", name
        seen.append(name or page.evaluate("document.activeElement.name"))
    assert seen[0] == "Skip to the playground"
    for wanted in ("Roll back support", "Choose a folder", "Choose files", "name", "Upload", "prompt", "Ask"):
        assert wanted in seen
