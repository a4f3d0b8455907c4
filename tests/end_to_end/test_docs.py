"""What the documentation shows is run, where that is quick."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from reference import needs_torchtext

from sst2_xlmr.model.classifier import load_classifier

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@needs_torchtext
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_service_answers(tiny_encoder: Path, tmp_path: Path) -> None:
    from sst2_xlmr.export.torchscript import save_torchscript

    page = (ROOT / "docs" / "from-csv-to-service.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    settings = (folder / "config.json").read_text().replace("XLMRobertaModel", "XLMRobertaForSequenceClassification")
    (folder / "config.json").write_text(settings)
    save_torchscript(*load_classifier(folder, torch.device("cpu"), bf16=False), tmp_path / "classifier.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "service.py").write_text(program.replace("8000", str(port)))
    texts = ["Not bad at all.", "映画", ""]
    with subprocess.Popen([sys.executable, "service.py"], cwd=tmp_path, stderr=subprocess.DEVNULL) as service:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            asked = urllib.request.Request(f"http://127.0.0.1:{port}", json.dumps(texts).encode())
            with urllib.request.urlopen(asked, timeout=10) as answer:
                found = json.load(answer)
        finally:
            service.terminate()
    assert len(found) == len(texts)
    assert all(entry["label"] in "ab" and 0.5 <= entry["probability"] <= 1 for entry in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])@?((?:scripts|sst2_xlmr|sample_data|tests)/[\w./-]+\w)(?![\w.*-])", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
