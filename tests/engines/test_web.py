"""The page of `hfgpt serve --web` and `hfgpt chat --web` in headless Chromium."""

import json

import pytest
from server import CONTEXT, save_model, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.engine

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """A page in Chromium."""

    def __init__(self, driver, url: str):
        from selenium.webdriver.support.wait import WebDriverWait

        self.driver, self.wait = driver, WebDriverWait(driver, 60)
        driver.get_log("performance")
        driver.get(url)
        self.wait.until(lambda _: self.areas())

    def areas(self):
        return [area for area in self.driver.find_elements("tag name", "textarea") if area.is_displayed()]

    def write(self, text: str):
        self.wait_for(lambda: self.areas() and self.areas()[0].is_enabled())
        self.areas()[0].send_keys(text)

    def messages(self) -> list[str]:
        return [found.text for found in self.driver.find_elements("css selector", "[data-testid='bot']")]

    def text(self) -> str:
        return self.driver.find_element("tag name", "body").text

    def wait_for(self, condition) -> bool:
        return self.wait.until(lambda _: condition())

    def contacted(self) -> set[str]:
        """The hosts of all requests of the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [found["params"]["request"]["url"] for found in messages if found["method"].endswith("WillBeSent")]
        return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("chat"), "alpaca")


def test_a_conversation(path, driver):
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    message = {"role": "user", "content": "Who are you?"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**ids, max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    with serving("chat", path, "--web", "--greedy", "--max-new-tokens", "40") as (url, _):
        page = Browser(driver, url)
        page.write("Who are you?\n")
        page.wait_for(lambda: [text.split() for text in page.messages()] == [expected.split()])
        page.write("a" * CONTEXT + "\n")
        page.wait_for(lambda: "shorten it" in page.text())
        page.write("Who are you now?\n")  # the page still answers
        page.wait_for(lambda: len(page.messages()) == 2 and page.messages()[1])
        assert page.contacted() == {url.removeprefix("http://")}


def test_a_continuation(tmp_path, driver):
    path = save_model(tmp_path / "model", None)
    with serving("serve", path, "--port", "0", "--web") as (url, _):
        page = Browser(driver, url)
        page.write("Text")
        next(button for button in driver.find_elements("tag name", "button") if button.text == "Continue").click()
        page.wait_for(lambda: len(page.areas()[1].get_attribute("value")) == len("Text") + 100)
        assert page.areas()[1].get_attribute("value").startswith("Text")
        assert page.contacted() == {url.removeprefix("http://")}
