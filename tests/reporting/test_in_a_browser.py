"""The page as a browser draws it: no error, no request, no phone on which the page is wider than the screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import records

from lora_merge.reporting.page import report_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy"[^>]*>')
TELL = b"""<script>parent.postMessage(document.documentElement.scrollWidth + " " + innerWidth + " "
+ [...document.querySelectorAll(".panel")].filter(panel => panel.offsetHeight).map(panel => panel.id), "*")</script>
</html>"""
FRAME = """<!doctype html><title></title><iframe src="page.html" style="width: {}px; height: 800px; border: 0"></iframe>
<script>onmessage = event => {{ document.title = event.data }}</script>"""
"""A page in which another has any width; a window is at least 500 pixels wide."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


def opened(file: Path, *words: str) -> tuple[str, str]:
    """The page after the browser drew it, and what the browser had to say."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    command += ["--enable-logging=stderr", *words, "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_nothing_is_wrong_and_everything_is_drawn(file: Path) -> None:
    weights = [*records.dense(6, lost=(3, "mlp.up_proj")), *records.mixture(6, 16, lost=(2, 5))]
    file.write_bytes(report_page(records.record(weights)))
    drawn, said = opened(file)
    assert "CONSOLE" not in said
    assert drawn.count("<rect") == 6 * 16 and drawn.count("</section>") == 8


def test_a_policy_that_is_broken_would_be_heard(file: Path) -> None:
    """Else the test above proved nothing."""
    page = report_page(records.record(records.dense(2))).replace(b"</body>", b"<img src='http://127.0.0.1:9/'></body>")
    file.write_bytes(page)
    assert "CONSOLE" in opened(file)[1]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_the_screen(file: Path, width: int) -> None:
    """What is wider scrolls within. Read by a script, for which the page's own policy is taken out."""
    weights = [*records.dense(4), *records.mixture(4, 256), records.weight("x" * 300)]
    weights += [records.weight(f"model.layers.{layer}.m{column}.weight") for layer in range(4) for column in range(14)]
    page = POLICY.sub(b"", report_page(records.record(weights))).replace(b"</html>", TELL)
    page = page.replace(b"<details>", b"<details open>")
    file.write_bytes(page)
    (file.parent / "frame.html").write_text(FRAME.format(width))
    drawn, _ = opened(file.parent / "frame.html", "--window-size=1400,900", "--virtual-time-budget=5000")
    found = re.search(r"<title>(\d+) (\d+) (.*)</title>", drawn)
    assert found and int(found[1]) <= int(found[2]) == width
    assert found[3] == "panel-survival"
