"""What a run leaves for TensorBoard, read back as TensorBoard reads it."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import SAMPLE_DATA, metrics, torchrun, train_options, user_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.metadata import (
    parse_session_end_info_plugin_data,
    parse_session_start_info_plugin_data,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from sst2_xlmr import train
from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.report import console as report
from sst2_xlmr.report.event_folder import cut_events, event_files
from sst2_xlmr.report.mistakes import EvaluatedFile, escape, mistakes_table
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of

RunTrain = Callable[..., Path]
DE, RU = SAMPLE_DATA / "test.de.tsv", SAMPLE_DATA / "test.ru.tsv"


def opened(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def steps(events: EventAccumulator) -> dict[str, list[int]]:
    """Return tag -> steps, of scalars, pictures, texts and curves."""
    tags = events.Tags()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found.update({tag: [event.step for event in events.Images(tag)] for tag in tags["images"]})
    found.update({tag: [event.step for event in events.Tensors(tag)] for tag in tags["tensors"]})
    return found


def pixels(event: Any) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(event.encoded_image_string))


def test_tags_and_steps(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(
        tmp_path / "run",
        "--epochs",
        2,
        "--eval-every",
        5,
        "--eval-file",
        f"de={DE}",
        "--test-file",
        RU,
        "--log-every",
        7,
    )
    found = steps(opened(run / "tensorboard"))
    train_tags = ("loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "memory_gb")
    scalar_tags = ("loss", "accuracy", "macro_f1", "ece")
    picture_tags = ("confusion", "pr_positive", "mistakes/text_summary")
    expected: dict[str, list[int]] = {f"train/{tag}": [7, 14] for tag in train_tags}
    for split, when in (("dev", [5, 7, 12, 14]), ("de", [5, 7, 12, 14]), ("test.ru", [14])):
        expected.update({f"{split}/{tag}": when for tag in scalar_tags})
        expected.update({f"{split}/{tag}": [step for step in when if step in (7, 14)] for tag in picture_tags})
    expected["accuracy by file"] = [14]
    hparams = {tag: times for tag, times in found.items() if tag.startswith("_hparams_")}
    assert {tag: times for tag, times in found.items() if tag not in hparams} == expected
    assert len(event_files(run / "tensorboard")) == len(list((run / "tensorboard").iterdir())) == 1, "no run beside it"


def test_scalars_are_those_of_metrics_jsonl(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1, "--eval-file", f"de={DE}")
    events = opened(run / "tensorboard")
    for entry in metrics(run):
        split = entry.get("split", "train")
        for key in ("loss", "accuracy", "ece", "lr", "grad_norm", "samples_per_s"):
            if key in entry:
                at_step = [event.value for event in events.Scalars(f"{split}/{key}") if event.step == entry["step"]]
                assert at_step == [pytest.approx(entry[key], rel=1e-6)], (split, key)
    memory = events.Scalars("train/memory_gb")[-1].value
    assert 0.1 < memory < 10


def test_pictures_curves_and_mistakes(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1, "--eval-file", f"de={DE}")
    events = opened(run / "tensorboard")
    picture = pixels(events.Images("de/confusion")[0])
    image = events.Images("de/confusion")[0]
    assert picture.shape == (image.height, image.width, 4)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10
    last = [entry for entry in metrics(run) if entry.get("split") == "de"][-1]
    curve = np.array(events.Tensors("de/pr_positive")[0].tensor_proto.float_val).reshape(6, -1)
    true_positives, false_positives, true_negatives, false_negatives, precision, recall = curve
    assert (true_positives + false_positives + true_negatives + false_negatives == 40).all()
    assert (np.diff(recall) <= 0).all()
    assert recall[0] == 1
    assert precision[0] == 0.5
    assert len(set(recall)) == 21, "every row is a point, however near to 0 or 1 the probabilities are"
    right = 40 * last["accuracy"]
    text = events.Tensors("de/mistakes/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    wrong = round(40 - right)
    assert lines[0].startswith(f"{wrong} of 40 rows")
    assert len(lines) == 4 + wrong
    sentences = [line.split("\t")[0] for line in DE.read_text(encoding="utf-8").splitlines()[1:]]
    labels = [line.split("\t")[1] for line in DE.read_text(encoding="utf-8").splitlines()[1:]]
    shares = []
    for line in lines[4:]:
        _, row, sentence, label, prediction, share, _ = line.split("|")
        assert sentence.strip() == escape(sentences[int(row) - 1])
        assert label.strip() == ["negative", "positive"][int(labels[int(row) - 1])] != prediction.strip()
        shares.append(float(share))
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= 0.5


def hparams_of(events: EventAccumulator, tag: str) -> bytes:
    return events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content


def test_hyperparameters_and_their_metrics(run_train: RunTrain, tmp_path: Path, tiny_encoder: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1, "--lr", 5e-4, "--eval-file", f"de={DE}", "--test-file", RU)
    events = opened(run / "tensorboard")
    values = parse_session_start_info_plugin_data(hparams_of(events, "session_start_info")).hparams
    assert values["lr"].number_value == 5e-4
    assert values["batch_size"].number_value == 8
    assert values["encoder"].string_value == tiny_encoder.name
    assert values["precision"].string_value == "fp32"
    assert values["freeze_encoder"].string_value == "False"
    experiment = HParamsPluginData.FromString(hparams_of(events, "experiment")).experiment
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["dev/accuracy", "dev/macro_f1", "dev/loss", "de/accuracy", "test.ru/accuracy"]
    assert [info.name for info in experiment.hparam_infos if info.differs] == [
        "encoder",
        "epochs",
        "batch_size",
        "lr",
        "seed",
    ]
    assert set(tags) <= set(events.Tags()["scalars"]), "every column has a value"
    assert parse_session_end_info_plugin_data(hparams_of(events, "session_end_info")).status == 1  # success


@pytest.mark.parametrize("stop", [5, 7, 14])
def test_each_step_once_after_a_kill(run_train: RunTrain, tmp_path: Path, stop: int) -> None:
    """Killed after its last line, and again while that was written; one file is no longer evaluated, one is new."""
    options = ["--epochs", 2, "--save-every", 5, "--eval-every", 5, "--keep-checkpoints", 100]
    whole = run_train(tmp_path / "whole", *options, "--eval-file", f"de={DE}", f"gone={RU}", "--test-file", RU)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    with event_files(run / "tensorboard")[0].open("ab") as events:
        events.write(b"\x10\0\0\0\0\0\0\0half a record")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > stop:
            shutil.rmtree(checkpoint)
    before = steps(opened(whole / "tensorboard"))
    for _ in range(2):
        train.main(["--resume", "--output-dir", str(run), "--eval-file", f"de={DE}", "--eval-file", f"new={RU}"])
    assert len(event_files(run / "tensorboard")) == 3
    found = steps(opened(run / "tensorboard"))
    lines = [(entry["step"], entry.get("split")) for entry in metrics(run)]
    assert len(lines) == len(set(lines))
    for tag, times in before.items():
        if tag.startswith("gone/"):
            kept = [step for step in times if step <= stop]
            assert found.pop(tag, []) == kept, tag
        elif not tag.startswith("_hparams_"):
            assert found.pop(tag) == times, tag
    new = {tag: times for tag, times in found.items() if not tag.startswith("_hparams_")}
    later = [step for step in (5, 7, 12, 14) if step > stop]
    assert {tag.split("/")[0] for tag in new} == ({"new"} if later else set())
    assert [entry["step"] for entry in metrics(run) if entry.get("split") == "de"] == [5, 7, 12, 14]
    assert [entry["step"] for entry in metrics(run) if entry.get("split") == "new"] == later


def test_two_processes_leave_one_run(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    options = ["--epochs", 1, "--eval-file", f"de={DE}"]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *options))
    done = torchrun(2, train_options(tiny_encoder, small_data, tmp_path / "two", *options))
    assert done.returncode == 0, done.stderr
    one, two = (opened(tmp_path / name / "tensorboard") for name in ("one", "two"))
    assert steps(one) == steps(two)
    ours, theirs = (metrics(tmp_path / name)[-1] for name in ("two", "one"))
    for key in ("split", "accuracy", "accuracy_low", "macro_f1", "precision", "recall", "rows"):
        assert ours[key] == theirs[key], key
    assert ours["ece"] == pytest.approx(theirs["ece"], rel=1e-4)
    curves = [np.array(e.Tensors("de/pr_positive")[0].tensor_proto.float_val) for e in (one, two)]
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-6)


def test_table_at_the_end(run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--epochs", 1, "--eval-file", f"de={DE}", "--test-file", RU]
    run = run_train(tmp_path / "run", *options)
    printed = capsys.readouterr().out
    last = {entry["split"]: entry for entry in metrics(run) if "split" in entry}
    table = [line.split() for line in printed.split("\nfile ")[1].splitlines()[1:4]]
    assert [line[0] for line in table] == ["de", "test.ru", "mean"]
    assert [line[1] for line in table[:2]] == [f"{last[split]['accuracy']:.4f}" for split in ("de", "test.ru")]
    assert table[2][1] == f"{(last['de']['accuracy'] + last['test.ru']['accuracy']) / 2:.4f}"
    assert f"step      7  accuracy: de {last['de']['accuracy']:.4f}" in printed
    train.main(["--resume", "--output-dir", str(run)])
    assert printed.split("\nfile ")[1].splitlines()[1:4] == [
        line for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["de"], ["test.ru"], ["mean"])
    ], "a finished run says the same again"


def test_a_run_alone_has_no_table(run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    assert "95 % interval" not in capsys.readouterr().out
    assert "accuracy by file" not in steps(opened(run / "tensorboard"))


def test_early_stopping_draws_too(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 9, "--lr", 1e-9, "--eval-every", 3, "--early-stopping-patience", 3)
    last = metrics(run)[-1]["step"]
    assert steps(opened(run / "tensorboard"))["dev/confusion"] == [7, last]


def test_cut_keeps_what_is_not_written_again(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 6):
        writer.add_scalar("train/loss", step, step)
        writer.add_text("dev/mistakes", str(step), step)
    writer.add_scalar("test/accuracy", 0.5, 3)
    writer.add_scalar("tester/accuracy", 0.5, 3)
    writer.close()
    cut_events(tmp_path, 3, ["test"])
    found = steps(opened(tmp_path))
    assert found == {
        "train/loss": [1, 2, 3],
        "dev/mistakes/text_summary": [1, 2, 3],
        "tester/accuracy": [3],
    }
    before = event_files(tmp_path)[0].read_bytes()
    cut_events(tmp_path, 3, ["test"])
    assert event_files(tmp_path)[0].read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, text: 1. (really) #1 - yes!", "plain, text: 1. (really) #1 - yes!"),
        ("a | b", "a &#124; b"),
        ("*bold* _it_ `code` ~~x~~", "&#42;bold&#42; &#95;it&#95; &#96;code&#96; &#126;&#126;x&#126;&#126;"),
        ("<b>&amp;</b>", "&#60;b&#62;&#38;amp;&#60;/b&#62;"),
        ("[x](y) \\", "&#91;x&#93;(y) &#92;"),
        ("two\nlines\tand  more", "two lines and more"),
        ("word " * 13, "word " * 11 + "word<br>word"),
        ("x" * 301, "<br>".join(["x" * 60] * 5) + " ..."),
        ("", ""),
    ],
)
def test_escape(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_escaped_text_shows_as_it_was() -> None:
    text = "a | b *c* _d_ `e` <i>f</i> &lt; [g](h) \\* ~~i~~ {j} and on to a second line"
    html = markdown_to_safe_html(f"| x | y |\n| --- | --- |\n| {escape(text)} | end |")
    assert html.count("<td>") == 2
    cell = html.split("<td>")[1].split("</td>")[0]
    assert unescape(cell.replace("<br>", " ")) == text


def test_at_most_fifty_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"text {n}\t1\n" for n in range(80)))
    cache = TokenCache(np.zeros(80, np.int32), np.arange(81), np.ones(80, np.int32), digest=digest_of(file))
    wrong = np.linspace(0.51, 0.99, 80, dtype=np.float32)
    config = Config(label_names=["negative", "positive"])
    evaluated = EvaluatedFile("dev", file, cache, config)
    probabilities = np.stack([wrong, 1 - wrong], 1)
    lines = mistakes_table(evaluated, probabilities).splitlines()
    assert lines[0] == "80 of 80 rows are mistaken; of these the 50 surest."
    assert len(lines) == 54
    assert lines[4] == "| 80 | text 79 | positive | negative | 0.9900 |"
    file.write_text(file.read_text() + "another\t0\n")
    assert "(the file has changed)" in mistakes_table(evaluated, probabilities)
    file.unlink()
    assert "(the file has changed)" in mistakes_table(evaluated, probabilities)
    right = mistakes_table(evaluated, 1 - probabilities)
    assert right.startswith("0 of 80 rows")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["de"], "--eval-file takes NAME=FILE"),
        (["=x.tsv"], "--eval-file takes NAME=FILE"),
        (["de="], "--eval-file takes NAME=FILE"),
        (["a/b=x.tsv"], "--eval-file takes NAME=FILE"),
        ([f"train={DE}"], "takes other names than train"),
        ([f"dev={DE}"], "takes other names than dev"),
        ([f"de={DE}", f"de={RU}"], "has the name de twice"),
        (["de=no.tsv"], "--eval-file no.tsv is not a file"),
    ],
)
def test_wrong_eval_files(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[str], says: str
) -> None:
    options = [option for value in values for option in ("--eval-file", value)]
    assert says in user_error(lambda: run_train(tmp_path / "run", *options), capsys)
    assert not (tmp_path / "run").exists()


def test_a_bad_row_in_an_eval_file_shows_before_anything_slow(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_text("sentence\tlabel\nfine\t1\nnot fine\t7\n")
    options = ["--eval-file", f"bad={bad}", "--encoder", "xlmr.base"]
    line = user_error(lambda: run_train(tmp_path / "run", *options), capsys)
    assert f"{bad}, line 3: label '7'" in line


def test_eval_files_are_saved_and_may_change(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1, "--eval-file", f"de={DE.relative_to(Path.cwd())}", f"ru={RU}")
    saved = json.loads((run / "config.json").read_text())["eval_file"]
    assert saved == [f"de={DE}", f"ru={RU}"]
    with pytest.raises(UserError, match="twice"):
        train.main(["--resume", "--output-dir", str(run), "--eval-file", f"x={DE}", f"x={RU}"])


def test_a_full_disk_is_a_users_error(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("draw_evaluation", "draw_accuracy"):
        with monkeypatch.context() as patched:
            patched.setattr(report, name, full)
            options = ["--epochs", 1, "--eval-file", f"de={DE}"]
            line = user_error(partial(run_train, tmp_path / name, *options), capsys)
        assert "No space left on device; make room, then continue (training: with --resume)" in line
        train.main(["--resume", "--output-dir", str(tmp_path / name)])
        assert steps(opened(tmp_path / name / "tensorboard"))["accuracy by file"] == [7]


def test_a_start_by_another_clock_is_read_in_order(run_train: RunTrain, tmp_path: Path) -> None:
    """Files are read in the order of their names, which begin with the second; a requeued job's clock may be behind."""
    run = run_train(tmp_path / "run", "--epochs", 1, "--save-every", 5, "--keep-checkpoints", 2)
    for file in event_files(run / "tensorboard"):
        file.rename(file.with_name("events.out.tfevents.9999999999.another-node.1.0"))
    shutil.rmtree(run / "checkpoints" / "step-00000007")
    train.main(["--resume", "--output-dir", str(run)])
    first, second = event_files(run / "tensorboard")
    assert first.name == "events.out.tfevents.0000000000"
    assert "another-node" not in second.name
    assert steps(opened(run / "tensorboard"))["train/loss"] == list(range(1, 8))


def test_without_matplotlib_there_are_curves_but_no_pictures(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sst2_xlmr.report.tensorboard.can_draw", lambda: False)
    tags = opened(run_train(tmp_path / "run", "--max-steps", 2) / "tensorboard").Tags()
    assert not tags["images"]
    assert "dev/accuracy" in tags["scalars"]
