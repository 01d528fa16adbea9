"""The page in a real browser: what a person sees, types and clicks, and its security."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from foretaste.serving.api import create_app
from foretaste.serving.metrics import Admission, Metrics
from foretaste.serving.service import Service
from foretaste.serving.settings import ServerSettings, access_of
from foretaste.serving.slot import ModelSlot
from foretaste.serving.state import LiveEvent, LiveEvents, open_live_events
from foretaste.serving.versions import Versions
from tests.worlds import HOSTILE, is_space, write_film_bundle

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # a card that fades in has no visible text at first
    "--window-size=1280,800",
)
TOKEN = "let me in"


class Page:
    """The page in the browser."""

    def __init__(self, driver: webdriver.Chrome, address: str, events: LiveEvents) -> None:
        self.driver, self.address, self.events = driver, address, events

    def open(self, path: str = "/") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.address + path)
        self.wait(lambda: self.driver.execute_script("return document.body.dataset.ready"))

    def wait(self, until: Callable[[], object]) -> object:
        """Wait for it; a row that the page has drawn again meanwhile is looked up again."""
        redrawn = [StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, 60, 0.05, ignored_exceptions=redrawn)
        return waiting.until(lambda _: until())

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def ids(self, css: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.dataset.item)",
            css,
        )

    def cards(self) -> list[str]:
        return self.ids("#cards > li")

    def heading(self) -> str:
        return self.find("#answer-title").text

    def type_into(self, css: str, text: str) -> None:
        self.find(css).clear()
        self.find(css).send_keys(text)

    def texts(self, css: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", css
        )

    def hits(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, f"{css} button")

    def focused(self) -> str:
        script = "const a = document.activeElement; return a.getAttribute('aria-label') || a.id"
        return self.driver.execute_script(script)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def tab_to(self, name: str) -> None:
        for _ in range(40):
            self.press(Keys.TAB)
            if self.focused() == name:
                return
        raise AssertionError(f"40 tabs do not lead to {name!r}")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver is installed: the page's tests are left out")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=Driver(chromedriver))
    yield opened
    opened.quit()


@contextmanager
def serve_films(folder: Path, **settings: object) -> Iterator[tuple[str, LiveEvents]]:
    bundle = write_film_bundle(folder / "films")
    chosen, events = ServerSettings(**settings), open_live_events(str(folder / "e.sqlite"))
    slot = ModelSlot(Versions(bundle))
    metrics = Metrics()
    service = Service(slot, events, chosen, bundle=bundle, metrics=metrics)
    admission = Admission(chosen, metrics, lambda _: None)
    app = create_app(service, settings=chosen, access=access_of(chosen), admission=admission)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", events
    finally:
        server.should_exit = True
        thread.join()
        events.close()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LiveEvents]]:
    with serve_films(tmp_path_factory.mktemp("page")) as served:
        yield served


@pytest.fixture
def page(driver: webdriver.Chrome, films: tuple[str, LiveEvents]) -> Iterator[Page]:
    shown = Page(driver, *films)
    yield shown
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    complaints = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    assert complaints == []
    for user in range(50):
        shown.events.forget(str(user))


def test_at_first_every_visitor_sees_popular_items_and_the_figures_of_the_model(page: Page) -> None:
    page.open()
    assert page.heading() == "What most people choose"
    assert set(page.cards()[:2]) == {"101", "116"}
    assert "item-kNN" in page.find("#model").text
    report = page.find("#report").text
    assert "NDCG" in report
    assert "0.250" in report
    assert "0.200 – 0.300" in report


def test_a_user_is_searched_and_gets_a_list_with_reasons(page: Page) -> None:
    page.open()
    page.type_into("#user", "3")
    page.wait(lambda: page.texts("#user-hits button")[:2] == ["3", "30"])
    page.hits("#user-hits")[1].click()
    page.wait(lambda: page.heading() == "For user 30")
    cards = page.cards()
    seen = page.ids("#history > li")
    assert len(seen) == 8
    assert not set(cards) & set(seen)
    assert not any(is_space(item) for item in cards[:5])
    assert "Because you watched Heist" in page.find(".card").text
    assert page.find(".card .badge").text == "model"
    assert "10 recommendations" in page.find("#status").get_attribute("textContent")
    assert "#user=30" in page.driver.current_url


def test_a_history_is_clicked_together_and_the_list_follows(page: Page) -> None:
    page.open()
    page.find("#as-visitor").click()
    for query, kind_is_space in (("Space 7", True), ("Heist 8", False)):
        page.type_into("#item", query)
        page.wait(lambda: len(page.hits("#item-hits")) == 1)
        page.hits("#item-hits")[0].click()
        page.wait(lambda wanted=query: wanted in page.find("#history > li").text)
        if kind_is_space:
            page.wait(lambda: all(is_space(item) for item in page.cards()[:5]))
    page.wait(lambda: {is_space(item) for item in page.cards()[:8]} == {True, False})
    page.find("#history button[aria-label='Remove Space 7']").click()
    page.wait(lambda: not any(is_space(item) for item in page.cards()[:5]))
    assert page.find("#answer-note .badge").text == "fold-in"


def test_trying_a_card_changes_the_list_and_stores_nothing(page: Page) -> None:
    page.events.add([LiveEvent(user_id="1", item_id="120", timestamp_s=2_000_000)])
    page.open("/#user=1")
    first, total = page.cards()[0], page.find("#history-title").text
    page.find(".card .add").click()
    page.wait(lambda: first not in page.cards())
    assert page.find("#history > li.tried").get_attribute("data-item") == first
    assert page.find("#history-title").text == total.replace("10", "11")
    assert "with 1 live event, with 1 tried here and stored" in page.find("#answer-note").text
    page.wait(lambda: page.focused() == "answer-title")
    page.find("#forget").click()
    page.wait(lambda: page.cards()[0] == first)
    page.find(".card .add").click()
    page.wait(lambda: page.ids("#history > li.tried") == [first])
    page.find("#history > li.tried button").click()
    page.wait(lambda: page.cards()[0] == first)
    assert page.ids("#history > li.live") == ["120"]
    assert [event.item_id for event in page.events.of_user("1", limit=9)] == ["120"]
    page.find(".card .add").click()
    page.wait(lambda: page.ids("#history > li.tried") == [first])
    page.type_into("#user", "3")
    page.press(Keys.ENTER)
    page.wait(lambda: page.heading() == "For user 3" and not page.ids("#history > li.tried"))


def choose(page: Page, css: str, value: str) -> None:
    Select(page.find(css)).select_by_value(value)


def test_rules_narrow_the_list_and_say_when_little_is_left(page: Page) -> None:
    page.open()
    assert {is_space(item) for item in page.cards()} == {True, False}
    choose(page, "#only", "genres")
    choose(page, "#only-value", "Crime")
    page.wait(lambda: len(page.cards()) == 10 and not any(map(is_space, page.cards())))
    choose(page, "#only", "year")
    page.find("#only-from").send_keys("2006", Keys.TAB)  # film 101 is of 1980, and so on
    page.wait(lambda: sorted(page.cards()) == ["127", "128", "129", "130"])
    assert "no more than 4 may stand in this list" in page.find("#answer-note").text
    choose(page, "#only", "")
    page.wait(lambda: len(page.cards()) == 10)


def test_a_cap_and_variety_mix_the_list(page: Page) -> None:
    page.open("/#user=1")
    assert all(map(is_space, page.cards()[:6]))
    choose(page, "#per", "genres")
    page.wait(lambda: len(page.cards()) == 4)  # two in space, two heists
    assert sum(map(is_space, page.cards())) == 2
    choose(page, "#per", "")
    page.wait(lambda: len(page.cards()) == 10)
    page.find("#variety").send_keys(*[Keys.ARROW_RIGHT] * 9)
    page.wait(lambda: not is_space(page.cards()[1]))
    assert is_space(page.cards()[0])


def test_similar_items_are_shown_for_any_title(page: Page) -> None:
    page.open("/#user=2")
    first = page.cards()[0]
    page.find(".card .more").click()
    page.wait(lambda: len(page.ids("#similar > li")) == 6)
    assert first not in page.ids("#similar > li")
    assert not any(is_space(item) for item in page.ids("#similar > li"))
    assert page.find("#similar-title").text.startswith("Similar to Heist")
    assert page.focused() == "similar-title"


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.open()
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Skip to the recommendations"
    page.tab_to("as-visitor")
    page.press(Keys.SPACE)
    page.wait(lambda: page.find("#as-visitor").get_attribute("aria-pressed") == "true")
    page.tab_to("item")
    page.press("Heist 9")
    page.wait(lambda: len(page.hits("#item-hits")) == 1)
    page.press(Keys.ARROW_DOWN)
    assert page.focused() == "Add Heist 9"
    page.press(Keys.ENTER)
    page.wait(lambda: page.ids("#history > li") == ["124"])
    page.wait(lambda: page.focused() == "item")
    best = page.wait(lambda: page.find(".card .more").get_attribute("aria-label"))
    page.tab_to(str(best))
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused() == "similar-title")
    page.open()
    page.find("#user").send_keys("5", Keys.ENTER)
    page.wait(lambda: page.heading() == "For user 5" and page.focused() == "answer-title")


def test_a_title_that_is_a_script_stays_text(page: Page) -> None:
    page.open()
    page.find("#as-visitor").click()
    page.type_into("#item", "script>")
    page.wait(lambda: len(page.hits("#item-hits")) == 1)
    assert HOSTILE in page.find("#item-hits").text
    page.hits("#item-hits")[0].click()
    page.wait(lambda: page.ids("#history > li") == ["102"])
    page.wait(lambda: HOSTILE in page.find("#cards").text)  # as a reason
    assert page.driver.title == "foretaste"
    assert page.driver.find_elements(By.CSS_SELECTOR, "main script, main b") == []


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_down_and_not_sideways(page: Page, width: int) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    page.open("/#user=1")
    page.find("#item").send_keys("Very")  # one title is 110 letters without a blank
    page.wait(lambda: len(page.hits("#item-hits")) == 1)
    page.find(".card .more").click()
    page.wait(lambda: page.ids("#similar > li"))
    wide = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide == width
    lowest = page.driver.execute_script(
        "return Math.min(...[...document.querySelectorAll('.acts button')]"
        ".map((one) => one.getBoundingClientRect().height))"
    )
    assert lowest >= 40  # pixels: wide enough for a thumb


def test_everything_a_person_can_use_has_a_name(page: Page) -> None:
    page.open("/#user=1")
    nameless = page.driver.execute_script(
        "return [...document.querySelectorAll('button, a, input, select')].filter((one) =>"
        " !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []


def test_what_goes_wrong_is_said(page: Page) -> None:
    page.open()
    page.find("#user").send_keys("x" * 200, Keys.ENTER)
    page.wait(lambda: page.heading().startswith("For user xxx"))
    page.driver.execute_script("window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.find("#as-visitor").click()
    page.wait(lambda: "does not answer" in page.find("#alert").text)


def test_the_api_page_lists_every_route(page: Page) -> None:
    page.driver.get(page.address + "/docs")
    page.wait(lambda: "/v1/events" in page.find("#docs").text)
    assert "/v1/items/{item_id}/similar" in page.find("#docs").text


def test_a_server_with_a_token_asks_for_it(driver: webdriver.Chrome, tmp_path: Path) -> None:
    with serve_films(tmp_path, token=TOKEN) as (address, events):
        page = Page(driver, address, events)
        driver.get(address)
        page.wait(lambda: page.find("#token-dialog").is_displayed())
        page.find("#token").send_keys("wrong", Keys.ENTER)
        page.wait(lambda: page.find("#token-dialog").is_displayed())
        page.wait(lambda: page.find("#token").get_attribute("value") == "")
        page.find("#token").send_keys(TOKEN, Keys.ENTER)
        page.wait(lambda: len(page.cards()) == 10)
        driver.get_log("browser")  # the browser notes each 401
