"""A real Chromium without a window, driven by selenium, that fetches nothing by itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from support import apt

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it refuses to run as root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def _find() -> tuple[str, str] | None:
    browser = next((path for path in map(shutil.which, NAMES) if path), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def browser_and_driver() -> tuple[str, str]:
    """Where Chromium and its driver are; installed by apt where that is possible.

    Without them a test is skipped on a developer's machine; in CI, or among the slow tests, it fails.
    """
    apt.install("chromium", "chromium-driver", unless=_find)
    found = _find()
    if found is not None:
        return found
    reason = "expected chromium and chromedriver, found none; install the packages chromium and chromium-driver"
    if os.environ.get("CI") == "true" or os.environ.get("RUN_SLOW") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own; the window is 1,280 x 900 pixels."""
    browser, driver = browser_and_driver()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
            options.add_argument(flag)
        chrome = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield chrome
        finally:
            chrome.quit()


def requested_addresses(chrome: webdriver.Chrome) -> list[str]:
    """Everything that pages have asked for since this was last called; not what the browser shows of itself."""
    messages = (json.loads(entry["message"])["message"] for entry in chrome.get_log("performance"))
    sent = (message["params"] for message in messages if message["method"] == "Network.requestWillBeSent")
    return [request["request"]["url"] for request in sent if not request["documentURL"].startswith("chrome")]


def emulate(chrome: webdriver.Chrome, *, scheme: str = "light", media: str = "screen", width: int = 1280) -> None:
    """Another colour scheme, medium, or width of a screen; a narrow one is a phone."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    size: dict[str, Any] = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
