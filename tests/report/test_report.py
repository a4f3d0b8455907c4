"""The report of a run: the header, a full disk; TensorBoard's files, read back as TensorBoard reads them; plots."""

import contextlib
import dataclasses
import functools
import io
import os
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, SAMPLE_DATA, Capture, Patch, RunTrain, metrics, train_options, user_error
from matplotlib.figure import Figure
from running import events_in, forget_after, printed_by, resume
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sst2_xlmr import train
from sst2_xlmr.cli import parse_args
from sst2_xlmr.config import Config
from sst2_xlmr.data.prepare import Split, prepare
from sst2_xlmr.data.rows import ReadOptions, inspect
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.report import tensorboard
from sst2_xlmr.report.console import Report, header_lines
from sst2_xlmr.report.tensorboard import confusion_plot, escape, mistakes_table
from sst2_xlmr.task import Regression, SingleLabel
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.files import digest_of

DEV, DE, RU = (SAMPLE_DATA / name for name in ("dev.tsv", "test.de.tsv", "test.ru.tsv"))


def steps(events: EventAccumulator) -> dict[str, list[int]]:
    """Return tag -> steps, of scalars, plots, texts and curves; not of hyperparameters."""
    readers = {"scalars": events.Scalars, "images": events.Images, "tensors": events.Tensors}
    tags = events.Tags()
    found = {tag: [event.step for event in read(tag)] for kind, read in readers.items() for tag in tags[kind]}
    return {tag: times for tag, times in found.items() if not tag.startswith("_hparams_")}


class Trained(NamedTuple):
    folder: Path
    said: str
    events: EventAccumulator
    last: dict[str, dict[str, Any]]  # split -> metrics at its last evaluation


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of 2 epochs of 5 steps that learns nothing, so that best/ is of its first evaluation."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ["--train-file", DE, "--dev-file", DEV, "--epochs", 2, "--eval-every", 3, "--log-every", 5]
    options += ["--lr", 1e-30, "--eval-file", f"de={DE}", "--test-file", RU]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(train_options(tiny_encoder, SAMPLE_DATA, folder, *options))
    last = {entry["split"]: entry for entry in metrics(folder) if "split" in entry}
    return Trained(folder, said.getvalue(), events_in(folder / "tensorboard"), last)


def test_tags_and_steps(trained: Trained) -> None:
    train_tags = ("loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "memory_gb")
    scalar_tags = ("loss", "accuracy", "macro_f1", "ece")
    plot_tags = ("confusion", "pr_positive", "mistakes/text_summary")
    expected: dict[str, list[int]] = {f"train/{tag}": [5, 10] for tag in train_tags}
    for split, when in (("dev", [3, 5, 8, 10]), ("de", [3, 5, 8, 10]), ("test.ru", [10])):
        expected.update({f"{split}/{tag}": when for tag in scalar_tags})
        expected.update({f"{split}/{tag}": [step for step in when if step in (5, 10)] for tag in plot_tags})
    expected.update({f"best/test.ru/{tag}": [10] for tag in scalar_tags})
    assert steps(trained.events) == expected
    plugins = {"_hparams_/experiment": "hparams", "de/pr_positive": "pr_curves", "de/mistakes/text_summary": "text"}
    found = {tag: trained.events.SummaryMetadata(tag).plugin_data.plugin_name for tag in plugins}
    assert found == plugins, "these tabs of TensorBoard have something, too"
    assert len(list((trained.folder / "tensorboard").iterdir())) == 1, "no run beside it"


def test_scalars_are_those_of_metrics_jsonl(trained: Trained) -> None:
    for entry in metrics(trained.folder):
        split = entry.get("split", "train")
        for key in {"loss", "accuracy", "ece", "lr", "grad_norm", "samples_per_s"} & entry.keys():
            found = [point.value for point in trained.events.Scalars(f"{split}/{key}") if point.step == entry["step"]]
            assert found == [pytest.approx(entry[key], rel=1e-6)], (split, key)
    assert 0.1 < trained.events.Scalars("train/memory_gb")[-1].value < 10


def test_plots_curves_and_mistakes(trained: Trained) -> None:
    image = trained.events.Images("de/confusion")[-1]
    plot = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    assert plot.shape == (image.height, image.width, 4)
    assert len(np.unique(plot.reshape(-1, 4), axis=0)) > 10
    curve = np.array(trained.events.Tensors("de/pr_positive")[-1].tensor_proto.float_val).reshape(6, -1)
    true_positives, false_positives, true_negatives, false_negatives, precision, recall = curve
    assert (true_positives + false_positives + true_negatives + false_negatives == 40).all()
    assert (np.diff(recall) <= 0).all()
    assert (recall[0], precision[0]) == (1, 0.5)
    assert len(set(recall)) == 21, "every row is a point, however near to 0 or 1 the probabilities are"
    lines = trained.events.Tensors("de/mistakes/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    wrong = round(40 - 40 * trained.last["de"]["accuracy"])
    assert lines[0].startswith(f"{wrong} of 40 rows")
    assert len(lines) == 4 + wrong
    rows = [line.split("\t") for line in DE.read_text(encoding="utf-8").splitlines()[1:]]
    shares = []
    for line in lines[4:]:
        _, row, sentence, label, prediction, share, _ = (cell.strip() for cell in line.split("|"))
        assert sentence == escape(rows[int(row) - 1][0])
        assert label == ["negative", "positive"][int(rows[int(row) - 1][1])] != prediction
        shares.append(float(share))
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= 0.5


def test_hyperparameters_and_their_metrics(trained: Trained, tiny_encoder: Path) -> None:
    def content(tag: str) -> bytes:
        return trained.events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content

    values = metadata.parse_session_start_info_plugin_data(content("session_start_info")).hparams
    assert (values["lr"].number_value, values["batch_size"].number_value) == (1e-30, 8)
    strings = {"encoder": tiny_encoder.name, "precision": "fp32", "freeze_encoder": "False"}
    assert {name: values[name].string_value for name in strings} == strings
    experiment = HParamsPluginData.FromString(content("experiment")).experiment
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["dev/accuracy", "dev/loss", "dev/macro_f1", "dev/ece", "de/accuracy", "test.ru/accuracy"]
    assert set(tags) <= set(trained.events.Tags()["scalars"]), "every column has a value"
    assert metadata.parse_session_end_info_plugin_data(content("session_end_info")).status == 1  # success


def test_table_at_the_end(trained: Trained) -> None:
    found = {split: f"{entry['accuracy']:.4f}" for split, entry in trained.last.items()}
    mean = f"{(trained.last['de']['accuracy'] + trained.last['test.ru']['accuracy']) / 2:.4f}"
    last, best = ([line.split()[:2] for line in part.splitlines()[1:]] for part in trained.said.split("\nfile ")[1:])
    assert last[:3] == [["de", found["de"]], ["test.ru", found["test.ru"]], ["mean", mean]]
    assert best[0] == ["best/test.ru", found["best/test.ru"]]
    assert f"step     10  accuracy: de {found['de']}" in trained.said


@pytest.mark.parametrize("stop", [5, 14])
def test_a_resumed_run_hides_what_it_writes_again(run_train: RunTrain, tmp_path: Path, stop: int) -> None:
    """Killed after its last line, and again while that was written; one file is no longer evaluated, one is new."""
    options = ["--epochs", 2, "--save-every", 5, "--eval-every", 5, "--keep-checkpoints", 100]
    run = run_train(tmp_path / "run", *options, "--eval-file", f"de={DE}", f"gone={RU}", "--test-file", RU)
    before = steps(events_in(run / "tensorboard"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    (events,) = (run / "tensorboard").iterdir()
    with events.open("ab") as half_written:
        half_written.write(b"\x10\0\0\0\0\0\0\0half a record")
    events.rename(events.with_name("events.out.tfevents.1000000000.of-the-killed-run"))  # not of this second
    forget_after(run, stop)
    resume(run, "--eval-file", f"de={DE}", f"new={RU}")
    lines = [(entry["step"], entry.get("split")) for entry in metrics(run)]
    assert len(lines) == len(set(lines))
    assert [step for step, split in lines if split is None] == list(range(1, 15))
    later = [step for step in (5, 7, 12, 14) if step > stop]
    assert [step for step, split in lines if split == "de"] == [5, 7, 12, 14]
    assert [step for step, split in lines if split == "new"] == later
    found = steps(events_in(run / "tensorboard"))
    for tag, times in before.items():
        shown = found.pop(tag, [])
        if tag.startswith("gone/") and not tag.endswith(("pr_positive", "text_summary")):
            assert shown == [step for step in times if step <= stop], tag
        else:  # texts and curves are not hidden; what a finished run evaluates at its end is shown once more
            assert sorted(set(shown)) == times, tag
        if tag.startswith("train/"):
            assert shown == times, tag
    assert {tag.split("/")[0] for tag in found} == ({"new"} if later else set())


def test_an_early_end(run_train: RunTrain, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    run = run_train(tmp_path / "run", "--epochs", 9, "--lr", 1e-30, "--eval-every", 3, "--early-stopping-patience", 3)
    assert "95 % interval" not in capsys.readouterr().out
    found = steps(events_in(run / "tensorboard"))
    assert found["dev/confusion"] == [7, metrics(run)[-1]["step"]] == [7, 10]
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)  # no matplotlib
    tags = events_in(run_train(tmp_path / "bare", "--max-steps", 2) / "tensorboard").Tags()
    assert not tags["images"]
    assert "dev/accuracy" in tags["scalars"]


def test_escaped_text_shows_as_it_was() -> None:
    """In short lines, and cut if it is long."""
    plain = "plain, text: 1. (really) #1 - yes!"
    assert escape(plain) == plain
    assert escape("two\nlines\tand  more") == "two lines and more"
    assert escape("word " * 13) == "word " * 11 + "word<br>word"
    assert escape("x" * 301) == "<br>".join([*["x" * 60] * 4, "..."])
    text = "a | b *c* _d_ `e` <i>f</i> &lt; [g](h) \\* ~~i~~ {j} and on to a second line"
    html = markdown_to_safe_html(f"| x | y |\n| --- | --- |\n| {escape(text)} | end |")
    assert html.count("<td>") == 2
    assert unescape(html.split("<td>")[1].split("</td>")[0].replace("<br>", " ")) == text


def test_at_most_fifty_mistakes(tmp_path: Path) -> None:
    file, task = tmp_path / "rows.tsv", SingleLabel(["negative", "positive"])
    file.write_text("sentence\tlabel\n" + "".join(f"text {n}\t1\n" for n in range(80)))
    found = dataclasses.replace(inspect(file, ReadOptions()), digest=digest_of(file))
    texts_of = functools.partial(Split([file], ReadOptions(), [found]).texts_at, task)
    labels, confidences = np.ones(80, int), np.linspace(0.51, 0.99, 80, dtype=np.float32)

    def table(probabilities: np.ndarray) -> str:
        return mistakes_table(*task.mistakes(probabilities, labels), 80, texts_of)

    wrong = np.stack([confidences, 1 - confidences], 1)
    lines = table(wrong).splitlines()
    assert lines[0] == "80 of 80 rows are wrong; these are the 50 most confident."
    assert len(lines) == 54
    assert lines[4] == "| 80 | text 79 | positive | negative | 0.9900 |"
    assert table(1 - wrong).startswith("0 of 80 rows")
    file.write_text(file.read_text() + "another\t0\n")
    assert "(the file has changed)" in table(wrong)
    file.unlink()
    assert "(the file has changed)" in table(wrong)


def test_scores_have_errors_instead_of_mistakes() -> None:
    """Every row has one, so the table calls none wrong, nor an error a probability."""
    task, labels, scores = Regression(["score"]), np.array([1.0, 2.0, 3.0]), np.array([[1.5], [2.0], [1.0]])
    lines = mistakes_table(*task.mistakes(scores, labels), 3, lambda rows: dict.fromkeys(rows, "text"), are_scores=True)
    assert lines.splitlines()[0] == "The 3 largest errors of 3 rows."
    assert lines.splitlines()[2] == "| row | text | true | predicted | error |"
    assert lines.splitlines()[4] == "| 3 | text | 3 | 1 | -2 |"


def test_no_two_starts_have_the_same_second(tmp_path: Path) -> None:
    """TensorBoard reads the files in the order of their names, in which a number of the process follows the second."""
    for _ in range(2):
        tensorboard.open_events(tmp_path).close()
    first, second = (int(file.name.split(".")[3]) for file in sorted(tmp_path.iterdir()))
    assert first < second


BLUE = (8, 48, 107)  # the darkest shade


def pixels(png: bytes) -> np.ndarray:
    return (matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)


@pytest.fixture
def drawn(monkeypatch: Patch) -> dict[str, tuple[float, float]]:
    """The texts of the plots that are drawn -> where they stand, in the axes' units."""
    texts: dict[str, tuple[float, float]] = {}
    savefig = Figure.savefig

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        texts.update({text.get_text(): text.get_position() for text in figure.findobj(matplotlib.text.Text)})
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return texts


@pytest.mark.parametrize("classes", [1, 20, 21, 1000])
def test_confusion_plots(classes: int) -> None:
    confusion = np.diag(np.arange(classes) + 1)
    plot = pixels(confusion_plot(confusion, [f"a class called {n}" for n in range(classes)], "dev, step 1"))
    assert max(plot.shape[:2]) < 2000
    is_blue = (plot[..., 2] > plot[..., 0]) & (plot[..., 0] < 230)
    size = 100 * max(3, min(0.75 * classes, 15))
    for axis in (0, 1):
        assert is_blue.any(axis).sum() == pytest.approx(size, abs=8), "no class is left out"
    if classes <= 20:
        assert (plot == BLUE).all(-1).sum() == pytest.approx(size**2 / classes, rel=0.25), "in the full shade"


def test_true_labels_are_rows_and_predictions_columns(drawn: dict[str, tuple[float, float]]) -> None:
    """A matrix that is not symmetric: everything is taken for the second of three classes."""
    plot = pixels(confusion_plot(np.array([[0, 7, 0], [0, 8, 0], [0, 9, 0]]), ["a", "b", "c"], "dev"))
    is_blue = (plot == BLUE).all(-1)
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
    confusion_plot(confusion, names, "dev 负面")
    assert {"1,234\n99.9%", "1\n0.1%", "3\n100.0%", "0"} <= drawn.keys()
    assert {"dev ??", *words.split()[:4], "л" * 31 + "…", "a\nb"} <= drawn.keys()
    assert {name for name in drawn if name.startswith("class ")} == {f"class {number}" for number in range(4, 11)}


def test_settings_are_left_alone() -> None:
    """And whoever draws nothing does not wait for matplotlib."""
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 30, "axes.facecolor": "black"}):
        theirs = confusion_plot(np.eye(2, dtype=int), ["a", "b"], "dev")
    assert theirs == confusion_plot(np.eye(2, dtype=int), ["a", "b"], "dev"), "the user's settings change nothing"
    assert dict(matplotlib.rcParams) == before
    program = (
        "import sys, train, numpy; from sst2_xlmr.report.tensorboard import confusion_plot as draw;"
        "print('matplotlib' in sys.modules); draw(numpy.eye(2), ['a', 'b'], '');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert printed_by(ROOT, sys.executable, "-c", program).split() == ["False", "False"]


def test_a_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """A killed process has no time to write what it holds back, and a resumed run does not repeat it."""
    inputs: Any = SimpleNamespace(config=Config(), task=SingleLabel(["no", "yes"]), caches={"dev": DEV})
    report = Report(inputs, TrainState(5), tmp_path, 10, [])
    report.log_training(entry := {"step": 3, "epoch": 0.1, "loss": 0.5, "lr": 1e-3, "samples_per_s": 1.0, "new": 7.0})
    events = events_in(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("train/loss")] == [3]
    assert events.Scalars("train/new")[0].value == 7, "a new metric needs no list"
    report.log_collapse(4, "same prediction for every text")
    assert metrics(tmp_path) == [entry, {"step": 4, "collapsed": True}]
    report.close()


@pytest.mark.parametrize(
    ("precision", "decided", "reason", "says"),
    [
        ("auto", "bf16", "", "1 process; precision auto -> bf16 with fp32 master weights; CPU engine"),
        ("fp32", "fp32", "--no-compile", "1 process; fp32; plain PyTorch: slower (--no-compile)"),
        ("bf16", "bf16", "no GCC that works", "bf16 autocast; plain PyTorch: slower (no GCC that works)"),
    ],
)
def test_the_header_says_what_was_decided(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, precision: str, decided: str, reason: str, says: str
) -> None:
    options = ["--precision", precision, "--epochs", 1.5]
    config, _ = parse_args(train_options(tiny_encoder, small_data, tmp_path / "run", *options))
    inputs = prepare(config)
    state, world, rows = TrainState(7, decided, 4), ALONE, inputs.encoder.shape.vocab_size
    weights = {EMBEDDING: torch.empty(rows - 100, 32), "big": torch.empty(1000, 1000), "head": torch.empty(1000, 100)}
    moments = {f"{kind}.head": weights["head"] for kind in ("exp_avg", "exp_avg_sq")}
    optimizer: Any = SimpleNamespace(weights=lambda: weights, moments=lambda: moments, shares_memory=False)
    lines = header_lines(inputs, state, 10, optimizer, reason, world, new_head=True)
    by_name = {line[:10].rstrip(): line[11:] for line in lines}
    assert list(by_name) == ["stack", "encoder", "rows", "classes", "batches", "device"]
    assert by_name["encoder"].endswith(
        f"3 layers, 32 wide, 1.1 M parameters, 0.1 M trained ({rows - 100} of {rows} embedding rows occur);"
        " new head for negative, positive"
    )
    assert by_name["rows"] == "train 50, dev 20; 3 cut to 64 tokens"
    assert by_name["batches"] == "7 an epoch, of 8 rows; 1.5 epochs, 10 steps, evaluation every 4"
    assert says in by_name["device"]


@pytest.mark.parametrize("what", ["metrics", "events"])
def test_a_run_whose_disk_fills_resumes(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch, what: str) -> None:
    """What is said is one line, without a traceback from the thread that writes events."""
    run, log_training = tmp_path / "run", Report.log_training

    def fill_at_step_5(report: Report, entry: dict[str, Any]) -> None:
        if entry["step"] == 5 and what == "metrics":
            os.dup2(os.open("/dev/full", os.O_WRONLY), report._metrics.fileno())
        elif entry["step"] == 5:
            for file in (run / "tensorboard").iterdir():  # every record is written to the name
                file.unlink()
                file.symlink_to("/dev/full")
        log_training(report, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Report, "log_training", fill_at_step_5)
        line = user_error(run_train, run, "--epochs", 1, "--save-every", 3)
    place = run / ("metrics.jsonl" if what == "metrics" else "tensorboard")
    assert f"cannot write {what} to {place}: No space left on device; free some space, then continue" in line
    for file in (run / "tensorboard").iterdir():
        file.unlink()
    resume(run)
    assert [entry["step"] for entry in metrics(run) if "split" not in entry] == list(range(1, 8))
