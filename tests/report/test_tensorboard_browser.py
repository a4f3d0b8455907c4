"""What a person sees who opens TensorBoard on two runs: a real browser goes through its tabs.

Needs chromium and chromedriver (Debian: chromium, chromium-driver). SST2_XLMR_TEST_SCREENSHOTS names a folder to keep
the screenshots in.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import SAMPLE_DATA, metrics, train_options
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst2_xlmr import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
DEV, DE = SAMPLE_DATA / "dev.tsv", SAMPLE_DATA / "test.de.tsv"
PATIENCE_S = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM or not CHROMEDRIVER, reason="no browser: apt-get install chromium chromium-driver, or the like"
    ),
]

# TensorBoard's tabs are nested shadow trees; these walk through all of them, and leave out what is not shown.
WALK = """
const nodes = [];
(function walk(node) {
  for (const child of node.childNodes) {
    if (child.nodeType === 3) nodes.push(child);
    if (child.nodeType !== 1 || !child.checkVisibility()) continue;
    nodes.push(child);
    if (child.shadowRoot) walk(child.shadowRoot);
    walk(child);
  }
})(document.body);
"""
TEXT = WALK + "return nodes.filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data.trim()).join(' ');"
PICTURES = (
    WALK
    + """
return nodes.filter(n => n.tagName === 'IMG' && n.naturalWidth > 99).map(n => {
  const box = n.getBoundingClientRect();
  return [n.naturalWidth, n.naturalHeight, [box.left, box.top, box.right, box.bottom]];
});
"""
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(url: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
    """Send a request with JSON and return what came back."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return reply.read()


@contextmanager
def server(command: list[str], ready_url: str) -> Iterator[None]:
    """Run a server in a process group of its own, until it answers, and end the whole group."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, close_fds=True
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer(ready_url)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Browser:
    """A headless Chromium, driven in the W3C's WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, driver_url: str, tensorboard_url: str, folder: Path) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1700,1400"]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments}}
        started = answer(f"{driver_url}/session", "POST", {"capabilities": {"alwaysMatch": options}})
        self.url = f"{driver_url}/session/{json.loads(started)['value']['sessionId']}"
        self.tensorboard_url, self.folder = tensorboard_url, folder

    def run(self, script: str) -> Any:
        """Run JavaScript in the page; returns its result."""
        return json.loads(answer(f"{self.url}/execute/sync", "POST", {"script": script, "args": []}))["value"]

    def open(self, tab: str, tags: str = "") -> None:
        """Load TensorBoard anew at a tab, e.g. `timeseries`; that one can be limited to tags (a regular expression)."""
        answer(f"{self.url}/url", "POST", {"url": "about:blank"})
        query = urllib.parse.urlencode({"tagFilter": tags})
        answer(f"{self.url}/url", "POST", {"url": f"{self.tensorboard_url}/?{query}#{tab}"})

    def wait_for(self, *expected: str) -> str:
        """Wait until all of these are to be read on the page; returns its text."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            text = str(self.run(TEXT))
            missing = [part for part in expected if part not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"{missing} not in: {text}"
            time.sleep(0.3)

    def screenshot(self, name: str) -> np.ndarray:
        """Save what the window shows as NAME.png; returns uint8 [height, width, 3]."""
        time.sleep(1.5)  # charts are drawn a moment after their titles
        content = base64.b64decode(json.loads(answer(f"{self.url}/screenshot"))["value"])
        (self.folder / f"{name}.png").write_bytes(content)
        return (matplotlib.image.imread(io.BytesIO(content))[..., :3] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one beside the other, that learn the dev rows by heart at different rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("gentle", 5e-4), ("bold", 3e-3)):
        options = ["--train-file", DEV, "--dev-file", DEV, "--epochs", 12, "--batch-size", 16, "--lr", lr]
        options += ["--dropout", 0, "--head-dropout", 0, "--log-every", 5, "--eval-file", f"de={DE}"]
        train.main(train_options(tiny_encoder, SAMPLE_DATA, folder / name, *options))
    return folder


@pytest.fixture(scope="module")
def browser(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = Path(os.environ.get("SST2_XLMR_TEST_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    driver, board = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    tensorboard = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1"]
    with (
        server([*tensorboard, "--port", board.rpartition(":")[2]], board),
        server([str(CHROMEDRIVER), f"--port={driver.rpartition(':')[2]}"], f"{driver}/status"),
    ):
        opened = Browser(driver, board, folder)
        yield opened
        answer(opened.url, "DELETE")


def last(run: Path, split: str) -> dict[str, Any]:
    return [entry for entry in metrics(run) if entry.get("split") == split][-1]


def coloured(pixels: np.ndarray) -> int:
    """Return how many pixels are neither grey nor the orange of TensorBoard's own bars."""
    values = pixels.astype(int)
    is_orange = (abs(values - (245, 124, 0)) < 30).all(-1)
    return int(((values.max(-1) - values.min(-1) > 40) & ~is_orange).sum())


def test_time_series(browser: Browser, runs: Path) -> None:
    browser.open("timeseries", "^dev/accuracy|^train/")
    accuracies = {name: f"{last(runs / name, 'dev')['accuracy']:.4g}" for name in ("gentle", "bold")}
    assert len(set(accuracies.values())) == 2
    titles = [f"train /{tag}" for tag in ("loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "memory_gb")]
    text = browser.wait_for("dev /accuracy", *titles, *accuracies.values())
    table = text.split("dev /accuracy")[1].split("Smoothed Value Step")[1].split("train /")[0]
    for name, accuracy in accuracies.items():
        assert table.split(f"{name}/tensorboard")[1].split()[1:3] == [accuracy, "120"], "the last value and its step"
    assert coloured(browser.screenshot("time-series")[200:, 300:1100]) > 1000


def test_scalars(browser: Browser) -> None:
    browser.open("scalars")
    browser.wait_for("dev/accuracy", "dev/ece", "de/macro_f1", "gentle/tensorboard", "bold/tensorboard")
    assert coloured(browser.screenshot("scalars")[200:, 380:]) > 300


def test_images(browser: Browser, runs: Path) -> None:
    browser.open("images")
    browser.wait_for("accuracy by file", "de/confusion", "gentle/tensorboard", "step 120")
    deadline = time.monotonic() + PATIENCE_S
    while len(shown := browser.run(PICTURES)) < 4 and time.monotonic() < deadline:
        time.sleep(0.3)
    assert len(shown) == 4, "two of each run"
    page = browser.screenshot("images")
    events = EventAccumulator(str(runs / "bold" / "tensorboard")).Reload()
    for tag in ("accuracy by file", "de/confusion"):
        image = events.Images(tag)[-1]
        size = (image.width, image.height)
        left, top, right, bottom = next(map(round, box) for *natural, box in shown if tuple(natural) == size)
        cut = page[top:bottom, left:right]
        assert cut.size and coloured(cut) > 0.01 * cut[..., 0].size, "bars and cells are shaded"
        assert len(np.unique(cut.reshape(-1, 3), axis=0)) > 50, "there are letters and numbers on them"


def test_text(browser: Browser, runs: Path) -> None:
    browser.open("text")
    wrong = round(40 * (1 - last(runs / "bold", "de")["accuracy"]))
    text = browser.wait_for("de/mistakes", f"{wrong} of 40 rows are mistaken", "probability", "predicted")
    sentences = [line.split("\t")[0] for line in DE.read_text(encoding="utf-8").splitlines()[1:]]
    read = " ".join(text.split())
    assert sum(sentence in read for sentence in sentences) >= wrong
    browser.screenshot("text")


def test_pr_curves(browser: Browser) -> None:
    browser.open("pr_curves")
    browser.wait_for("dev/pr_positive", "de/pr_positive", "gentle/tensorboard", "step 120")
    assert coloured(browser.screenshot("pr-curves")[200:, 380:]) > 200


def test_hparams(browser: Browser, runs: Path) -> None:
    browser.open("hparams")
    shown = {name: f"{last(runs / name, 'dev')['accuracy']:#.5g}" for name in ("gentle", "bold")}
    text = browser.wait_for("Trial ID", "batch_size", "encoder", "lr", "dev/accuracy", *shown.values())
    for name, accuracy in shown.items():
        row = text.split(f"{name}/tensorboard")[-1].split("/tensorboard")[0].split()
        lr = {"gentle": "0.00050000", "bold": "0.0030000"}[name]
        assert row[:6] == ["16.000", "tiny", "12.000", lr, "0.0000", accuracy]
    browser.screenshot("hparams")
