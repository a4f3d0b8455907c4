"""What the documentation shows is run, where that is quick."""

import contextlib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from sst2_xlmr.cli import parse_args
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import export

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "scripts/bench/NOTES.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.skipif("SST2_XLMR_TEST_NODE_MODULES" not in os.environ, reason="no SST2_XLMR_TEST_NODE_MODULES")
def test_javascript_gives_the_same_labels(model: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```javascript\n(.+?)```", page, re.DOTALL)
    (tmp_path / "classify.mjs").write_text(program.replace("LONGEST = 256", "LONGEST = 64"))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "node_modules").symlink_to(os.environ["SST2_XLMR_TEST_NODE_MODULES"])
    options = ["--format", "onnx", "--from-ids", "--output", str(tmp_path / "classifier-ids.onnx")]
    export.main(["--model", str(model), *options])
    texts = ["Not bad at all.", "Das Essen war kalt.", "word " * 300]
    said = subprocess.check_output(["node", "classify.mjs", "model", *texts], cwd=tmp_path, text=True)
    found = [line.split("\t") for line in said.splitlines()]
    classifier = Classifier.load(model, "fp32", "cpu")
    assert [row[0] for row in found] == classifier.predict(texts)
    assert [float(row[1]) for row in found] == pytest.approx(classifier.probabilities(texts).max(1).tolist(), abs=1e-4)


# By the name of their file or subcommand; a study hands the options that are not its own to train.py.
PROGRAMS = {name: [name] for name in ("train", "predict", "evaluate", "export", "split", "fetch", "bench", "check_gpu")}
PROGRAMS["study"] = ["study", "train"]
PROGRAMS["study_with_trainer"] = ["study_with_trainer", "study", "train"]
PROGRAMS["distill"] = ["distill", "train"]


@functools.cache
def flags_of(program: str) -> set[str]:
    module = program if (ROOT / "scripts" / "bench" / f"{program}.py").is_file() else f"sst2_xlmr.programs.{program}"
    main, said = parse_args if program == "train" else importlib.import_module(module).main, io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", said.getvalue()))


def unknown_flags(text: str) -> list[str]:
    """Return the flags that no program has, of the commands in a page: indented lines, and code within a line."""
    joined, found = re.sub(r"\\\n\s*", "", text), []
    for command in [*re.findall(r"^ {4}(.+)$", joined, re.MULTILINE), *re.findall(r"`([^`\n]+)`", joined)]:
        with contextlib.suppress(ValueError):  # a quotation that is not closed: no command
            words, known = shlex.split(command, comments=True), None
            for word in itertools.chain.from_iterable(word.split() for word in words):
                name = re.sub(r"\.(py|sh|sbatch)$", "", word.rsplit("/", 1)[-1])
                if known is None and name in PROGRAMS and (name != word or "sst2-xlmr" in words[0]):
                    known = set().union(*map(flags_of, PROGRAMS[name]))
                elif word.startswith("--") and known is not None and word.split("=")[0] not in known:
                    found.append(word)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])@?((?:scripts|sst2_xlmr|sample_data|tests)/[\w./-]+\w)(?![\w.*-])", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    assert unknown_flags(text) == []
