"""Pictures as PNG files: what they show, in which letters, and that only those who draw pay for it."""

from __future__ import annotations

import io
import sys
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, Patch
from matplotlib.figure import Figure
from running import printed_by

from sst2_xlmr.report.tensorboard import confusion_picture

BLUE = (8, 48, 107)  # the darkest shade


def pixels(png: bytes) -> np.ndarray:
    return (matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)


@pytest.fixture
def drawn(monkeypatch: Patch) -> dict[str, tuple[float, float]]:
    """The texts of the pictures that are drawn -> where they stand, in the axes' units."""
    texts: dict[str, tuple[float, float]] = {}
    savefig = Figure.savefig

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        texts.update({text.get_text(): text.get_position() for text in figure.findobj(matplotlib.text.Text)})
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return texts


@pytest.mark.parametrize("classes", [1, 20, 21, 1000])
def test_confusion_pictures(classes: int) -> None:
    confusion = np.diag(np.arange(classes) + 1)
    picture = pixels(confusion_picture(confusion, [f"a class called {n}" for n in range(classes)], "dev, step 1"))
    assert max(picture.shape[:2]) < 2000
    is_blue = (picture[..., 2] > picture[..., 0]) & (picture[..., 0] < 230)
    size = 100 * max(3, min(0.75 * classes, 15))
    for axis in (0, 1):
        assert is_blue.any(axis).sum() == pytest.approx(size, abs=8), "no class is left out"
    if classes <= 20:
        assert (picture == BLUE).all(-1).sum() == pytest.approx(size**2 / classes, rel=0.25), "in the full shade"


def test_true_labels_are_rows_and_predictions_columns(drawn: dict[str, tuple[float, float]]) -> None:
    """A matrix that is not symmetric: everything is taken for the second of three classes."""
    picture = pixels(confusion_picture(np.array([[0, 7, 0], [0, 8, 0], [0, 9, 0]]), ["a", "b", "c"], "dev"))
    is_blue = (picture == BLUE).all(-1)
    assert is_blue.any(0).sum() == pytest.approx(100, abs=3), "one column is shaded"
    assert is_blue.any(1).sum() == pytest.approx(300, abs=10), "from top to bottom"
    assert [drawn[f"{count}\n100.0%"] for count in (7, 8, 9)] == [(1, 0), (1, 1), (1, 2)]
    assert (drawn["predicted"][0], drawn["true"][1]) == (0.5, 0.5), "predictions are named above, labels at the side"


@pytest.mark.filterwarnings("error")
def test_counts_shares_and_names(drawn: dict[str, tuple[float, float]]) -> None:
    """No box stands for a letter that the font does not have, and no warning comes."""
    words = "größer $x_1$_100% отрицательный αρνητικό سلبي שלילי नकारात्मक เชิงลบ 负面 부정적인 👍"
    names = [*words.split(), "л" * 40, "a\nb"]
    confusion = np.diag([1234, 0, 3, *[4] * (len(names) - 3)])
    confusion[0, 2] = 1
    confusion_picture(confusion, names, "dev 负面")
    assert {"1,234\n99.9%", "1\n0.1%", "3\n100.0%", "0"} <= drawn.keys()
    assert {"dev ??", *words.split()[:4], "л" * 31 + "…", "a\nb"} <= drawn.keys()
    assert {name for name in drawn if name.startswith("class ")} == {f"class {number}" for number in range(4, 11)}


def test_settings_are_left_alone() -> None:
    """And whoever draws nothing does not wait for matplotlib."""
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 30, "axes.facecolor": "black"}):
        theirs = confusion_picture(np.eye(2, dtype=int), ["a", "b"], "dev")
    assert theirs == confusion_picture(np.eye(2, dtype=int), ["a", "b"], "dev"), "the user's settings change nothing"
    assert dict(matplotlib.rcParams) == before
    program = (
        "import sys, train, numpy; from sst2_xlmr.report.tensorboard import confusion_picture as draw;"
        "print('matplotlib' in sys.modules); draw(numpy.eye(2), ['a', 'b'], '');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert printed_by(ROOT, sys.executable, "-c", program).split() == ["False", "False"]
