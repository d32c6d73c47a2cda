"""A real browser without a window: what it says while it opens a page, and how the page is laid out in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = ("chromedriver", "chromium.chromedriver")
SECONDS = 300
"""For one answer of the browser: a machine may be busy."""
LOOKS = Path(__file__).with_name("looks.js").read_text()


@contextmanager
def open_browser(folder: Path) -> Iterator[Any]:
    """A browser of this machine, which reaches no network; the test is skipped where there is none.

    Args:
        folder: an empty one, for its profile.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser, driver = (next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS))
    if browser is None or driver is None:
        pytest.skip("needs chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (
        *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={folder}"),
        *("host-resolver-rules=MAP * ~NOTFOUND", "force-device-scale-factor=1", "hide-scrollbars"),
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        found.set_page_load_timeout(SECONDS)
        found.set_script_timeout(SECONDS)
        found.command_executor.client_config.timeout = SECONDS
        # It has opened a page of its own.
        found.get("about:blank")
        for log in ("browser", "performance"):
            found.get_log(log)
        yield found
    finally:
        found.quit()


def show(browser: Any, page: Path, *, width: int, height: int, dark: bool) -> None:
    """Open a page on a screen of that size, with everything that can be unfolded unfolded."""
    size = {"width": width, "height": height, "screenWidth": width, "screenHeight": height}
    device = {"deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | device)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
    unfold = "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
    browser.execute_script(unfold)
    pictures = (
        "return Promise.all([...document.images].map((each) => each.decode().catch(() => null))).then(() => true)"
    )
    assert browser.execute_script(pictures)


def complaints(browser: Any, page: Path) -> list[str]:
    """What the browser said since the last call, what it asked for beside the page, and what the layout lacks."""
    said = [f"{entry['level']}: {entry['message']}" for entry in browser.get_log("browser")]
    asked, own = [], page.as_uri()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            asked += [] if url.startswith("data:") or url.partition("#")[0] == own else [f"asked for {url}"]
        elif message["method"] == "Network.loadingFailed":
            asked.append(f"a request failed: {message['params']['errorText']}")
    return said + asked + browser.execute_script(LOOKS)
