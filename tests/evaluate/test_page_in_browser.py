"""The report's page as a browser lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pesc.evaluate.config import FilledReportConfig
from pesc.evaluate.report import build
from pesc.stage import StageContext
from tests.evaluate.test_report import inputs  # noqa: F401  (a fixture)

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in")
PROBE = """<pre id="probe"></pre><script>
const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
const texts = []; while (walker.nextNode()) texts.push(walker.currentNode.data);
document.getElementById("probe").textContent = JSON.stringify({
  svgs: [...document.querySelectorAll("svg")].map(box),
  drawn: [...document.querySelectorAll("svg")].map(s => [...s.querySelectorAll("path, use, image")].filter(e => e.getBoundingClientRect().width > 0).length),
  figures: document.querySelectorAll("figure").length, links: [...document.querySelectorAll("a")].map(a => box(a)[1]),
  dead: [...document.querySelectorAll("a[href^='#']")].filter(a => !document.getElementById(a.getAttribute("href").slice(1))).map(a => a.href),
  overflow: document.documentElement.scrollWidth - window.innerWidth, background: getComputedStyle(document.body).backgroundColor, texts: texts,
});
</script>"""


@pytest.fixture
def page(tmp_path, inputs):  # noqa: F811
    """A page with everything on it: three arms, training, routing, data, proof, samples, two holes."""
    out = tmp_path / "out"
    out.mkdir()
    expected = (*(address for address in inputs if address.startswith("evaluate")), "evaluate[base/gsm8k]", "evaluate[sparse/piqa]")
    config = FilledReportConfig(control_arm="control", expected=expected)
    digests = {address: f"{number:064x}" for number, address in enumerate(inputs)}
    build(StageContext("report", config, inputs, out, tmp_path / "work", digests=digests))
    return out / "report.html"


def look(page: Path, folder: Path, width: int) -> dict:
    """What a browser window of this width shows."""
    copy = folder / f"probe-{width}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400",
        "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    [found] = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return json.loads(html.unescape(found))


@pytest.mark.parametrize("width", [1100, 520])
def test_every_plot_is_there_and_nothing_is_broken(page, tmp_path, width):
    seen = look(page, tmp_path, width)
    assert len(seen["svgs"]) == seen["figures"] == 8
    assert all(wide > 300 and high > 60 for wide, high in seen["svgs"]), seen["svgs"]
    assert all(count > 10 for count in seen["drawn"]), seen["drawn"]
    assert seen["dead"] == []
    assert all(height > 0 for height in seen["links"])
    assert seen["overflow"] <= 0, "the page itself does not scroll sideways; wide tables do"
    odd = [text for text in seen["texts"] if re.search(r"\b(nan|NaN|None|inf|undefined|Undefined)\b", text)]
    assert odd == []
    assert sum(text == "no result" for text in seen["texts"]) == 2


def test_a_broken_page_is_found(page, tmp_path):
    text = page.read_text()
    start = text.index("<svg")
    text = text[:start] + '<svg style="width:0; height:0">' + text[text.index(">", start) + 1 :]
    page.chmod(0o644)
    page.write_text(text.replace("<td>3,000</td>", "<td>nan</td>", 1).replace('href="#rules"', 'href="#gone"'))
    seen = look(page, tmp_path, 1100)
    assert min(wide for wide, _ in seen["svgs"]) < 300
    assert "nan" in seen["texts"]
    assert len(seen["dead"]) == 1
