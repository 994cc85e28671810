"""Headless Chromium on the Prefect UI of a real server.

Chromium is the system's (`apt-get install chromium`, or Google Chrome); `playwright`, a development dependency, drives it and need not download
one of its own.  Pictures go to the folder PESC_TEST_PICTURES, where it is set, else to the test's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
WIDTH, HEIGHT, MOST = 1400, 1000, 6000
"""Pixels of a window, and of the tallest picture."""
FAULTS = """() => {
  const page = document.querySelector('.prose, [data-slot=table-container], table');
  if (!page) return ['there is nothing to read'];
  const right = page.getBoundingClientRect().right + 2, found = [];
  for (const e of page.querySelectorAll('*')) {
    const box = e.getBoundingClientRect(), folded = e.closest('details:not([open])') && !e.closest('summary');
    if (box.right > right && box.width > 0 && !folded && !e.closest('pre, svg')) found.push(`too wide: ${e.tagName} ${e.textContent.slice(0, 60)}`);
  }
  for (const e of page.querySelectorAll('img'))
    if (!e.complete || e.naturalWidth < 50) found.push(`broken picture: ${e.alt}`);
  if (document.body.innerText.includes('Failed to render mermaid')) found.push('a graph that is not drawn');
  const walker = document.createTreeWalker(page, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data;
    if (!walker.currentNode.parentElement.closest('code, pre, svg, style') && /!\\[|\\]\\((data|http|file):|\\|\\s*:?---|\\*\\*|```|<\\/?details/.test(text))
      found.push(`raw markdown: ${text.slice(0, 60)}`);
  }
  return found;
}"""
HEIGHTS = "() => Math.max(document.documentElement.scrollHeight, ...[...document.querySelectorAll('main, [class*=overflow]')].map(e => e.scrollHeight))"


class Browser:
    """One window on the UI of a server.  A context manager."""

    def __init__(self, address: str, pictures: Path, credentials: str | None = None) -> None:
        self.address, self.pictures, self._credentials = address, pictures, credentials
        pictures.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._driver = sync_playwright().start()
        self._chromium = self._driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        self.page = self._chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        self.page.set_default_timeout(60_000)
        return self

    def __exit__(self, *_: object) -> None:
        self._chromium.close()
        self._driver.stop()

    def open(self, path: str, text: str = "") -> Any:
        """A page of the UI, once it shows a text."""
        self.page.goto(f"{self.address}/v2{path}", wait_until="domcontentloaded")
        if text:
            self.page.get_by_text(text).first.wait_for()
        return self.page

    def artifact(self, artifact: str, text: str = "") -> list[str]:
        """Open the page of an artifact, and say what is wrong with how it looks."""
        self.open(f"/artifacts/artifact/{artifact}", text)
        self.page.locator(".prose, table").first.wait_for()
        self.settle()
        return list(self.page.evaluate(FAULTS))

    def settle(self) -> None:
        """Wait until graphs and pictures are drawn."""
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(
            "() => !document.querySelector('[data-slot=skeleton], .animate-pulse') && [...document.images].every(image => image.complete)"
        )
        self.page.wait_for_timeout(700)

    def picture(self, name: str) -> Path:
        """A picture of the whole page, however long."""
        self.page.set_viewport_size({"width": WIDTH, "height": min(MOST, max(HEIGHT, self.page.evaluate(HEIGHTS) + 20))})
        self.settle()
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path)
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        return path
