"""eagle-moe web in headless Chromium: an image is uploaded, a question asked, an expert switched
off and the question asked again; mistakes are told on the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle_moe.chat.session import ChatSession
from eagle_moe.limits import Limits
from eagle_moe.web.desk import Desk, load_reference
from eagle_moe.web.pictures import BUILT_IN, choose_examples, reference_images

for module in ("gradio", "selenium"):
    pytest.importorskip(module, reason=f"{module} is not installed")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if CHROMIUM is None or DRIVER is None:
    pytest.skip("there is no chromium with its chromedriver", allow_module_level=True)

SECONDS = 40
"""Until something on the page is taken for missing; machines of tests are busy."""
BOT = "#chat .bot [data-testid=bot]"


@pytest.fixture(scope="module")
def address(
    tiny_model: Any, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    from eagle_moe.web.server import serve_page
    from tests.served import in_thread

    session = ChatSession(tiny_model, tiny_processor)
    reference = load_reference(session, reference_images(BUILT_IN, 2), "the example pictures")
    desk = Desk(session, reference, Limits(), tmp_path_factory.mktemp("desk"), 4)
    with in_thread(serve_page(desk, choose_examples(BUILT_IN), "127.0.0.1")) as client:
        yield f"http://127.0.0.1:{client.port}"


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    """On the page; what it requests is logged."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_page_load_timeout(SECONDS)
        driver.set_window_size(400, 800)
        driver.get(address)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def find(browser: Any) -> Callable[..., list[Any]]:
    """`find(css, count)`: the elements, as soon as there are so many."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css: str, count: int = 1) -> list[Any]:
        def enough(driver: Any) -> list[Any] | None:
            found: list[Any] = driver.find_elements(By.CSS_SELECTOR, css)
            return found if len(found) >= count else None

        found: list[Any] = WebDriverWait(browser, SECONDS).until(enough, f"{count} of {css}")
        return found

    return find


def ask(find: Callable[..., list[Any]], text: str, picture: Path | None) -> None:
    from selenium.webdriver.common.keys import Keys

    if picture is not None:
        find("#question input[type=file]")[0].send_keys(str(picture))
        find("#question .thumbnail-item")
    find("#question [data-testid=submit-button]")  # no other answer is being written
    box = find("#question textarea")[0]
    box.send_keys(text)
    box.send_keys(Keys.ENTER)


def test_asked_with_and_without_an_expert(browser, find, tmp_path, make_image) -> None:
    make_image().save(tmp_path / "picture.png")
    find("#chat button.example", 5)
    ask(find, "what is it", tmp_path / "picture.png")
    find(BOT)
    find("#question [data-testid=submit-button]")  # written to the end
    find("#chat .user img[alt='picture.png']")
    boxes = find("#experts input[type=checkbox]")
    assert [box.get_attribute("name") for box in boxes] == ["clip", "convnext"]
    boxes[0].click()
    find("#again")[0].click()
    answers = [answer.text.split("\n")[0] for answer in find(BOT, 2)]
    assert answers == ["every expert", "without clip"]
    find("#weigh")[0].click()
    assert len(find("#added tr", 2)) == 2
    pictures = find("#added img", 3)
    assert all(picture.get_attribute("alt") for picture in pictures)


def test_a_mistake_is_told_on_the_page_and_the_question_kept(browser, find, tmp_path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "text.png").write_text("this is no picture")
    ask(find, "what is it", tmp_path / "text.png")
    toast = find("[data-testid=toast-text]")[0]
    assert "text.png: is not an image that Pillow can read" in toast.text
    box = find("#question textarea")[0]
    WebDriverWait(browser, SECONDS).until(lambda _: box.get_attribute("value") == "what is it")


def test_the_page_is_labelled_and_as_wide_as_a_phone(browser, find) -> None:
    assert find("#question textarea")[0].get_attribute("aria-label") == "Question"
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= browser.execute_script("return window.innerWidth")


def test_nothing_was_asked_of_another_machine(browser, address) -> None:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith(address) for url in sent)
    assert [url for url in sent if not url.startswith((address, "data:", "blob:"))] == []
