"""The browser in which tests look at pages: Chromium, by hand or through its driver."""

import contextlib
import shutil

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")

needed = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on PATH")
driver_needed = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no Chromium with its driver on PATH"
)


@contextlib.contextmanager
def driven(folder, size):
    """A browser with a window of a size, such as "1200,1500"; its files are in `folder`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", f"window-size={size}"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'browser'}")
    service = webdriver.ChromeService(executable_path=DRIVER)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()
