"""scripts/study.py and scripts/hold_out.py."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metrics, train_options, user_error

from sst2_xlmr.errors import UserError
from sst2_xlmr.training.run_folder import claim

sys.path.insert(0, str(ROOT / "scripts"))
study, hold_out = importlib.import_module("study"), importlib.import_module("hold_out")


def run_study(*options: object) -> None:
    study.main([str(option) for option in options])


def common(encoder: Path, data: Path, folder: Path, *options: object) -> list[str]:
    """Return the options of a quick run without --output-dir, and the study's own."""
    words = train_options(encoder, data, folder, *options)
    place = words.index("--output-dir")
    return [*words[:place], *words[place + 2 :], "--output-dir", str(folder)]


def test_settings_and_seeds_are_run_once_and_summed_up(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--seeds", "3,5", *common(tiny_encoder, small_data, tmp_path / "all", "--epochs", 1)]
    words += ["--setting", "plain", "--drop-leaks", "--setting", "fast", "--lr 5e-3 --label-smoothing 0.1"]
    run_study(*words)
    first = capfd.readouterr()
    runs = {(name, seed): tmp_path / "all" / name / f"seed-{seed}" for name in ("plain", "fast") for seed in (3, 5)}
    configs = {key: json.loads((run / "config.json").read_text()) for key, run in runs.items()}
    assert {key: (config["seed"], config["lr"]) for key, config in configs.items()} == {
        ("plain", 3): (3, 1e-3),
        ("plain", 5): (5, 1e-3),
        ("fast", 3): (3, 5e-3),
        ("fast", 5): (5, 5e-3),
    }
    found = json.loads((tmp_path / "all" / "study.json").read_text())
    last = {key: metrics(run)[-1]["accuracy"] for key, run in runs.items()}
    assert {(name, int(seed)): v["dev"] for name, by in found["runs"].items() for seed, v in by.items()} == last
    pairs = [last["fast", seed] - last["plain", seed] for seed in (3, 5)]
    difference = found["summary"]["fast"]["difference"]["dev"]
    assert difference["mean"] == pytest.approx(sum(pairs) / 2)
    assert difference["half_width"] == pytest.approx(12.706 * abs(pairs[0] - pairs[1]) / 2)
    assert f"fast - plain, dev: {sum(pairs) * 50:+.2f} points" in first.out
    assert "difference" not in found["summary"]["plain"]
    assert first.err == ""

    (runs["fast", 5] / "model").rename(tmp_path / "away")  # as if it had been stopped before its end
    run_study(*words)
    again = capfd.readouterr().out
    assert again.count("was finished") == 3
    assert "resume     from" in runs["fast", 5].with_suffix(".log").read_text()
    assert json.loads((tmp_path / "all" / "study.json").read_text())["runs"]["fast"]["5"]["dev"] == last["fast", 5]

    with pytest.raises(UserError, match="--lr 0.5 differs from 0.001"):
        run_study(*words, "--lr", "0.5")


def test_the_interval_is_students() -> None:
    """The paired differences 1, 2, ..., 5: mean 3, deviation 1.581, t(4) 2.776."""
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3))


def test_a_failing_run_ends_it_with_its_status(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (small_data / "train.tsv").write_text("sentence\tlabel\nno label\t7\nyes\t0\n")
    with pytest.raises(SystemExit) as stop:
        run_study("--seeds", "1,2", *common(tiny_encoder, small_data, tmp_path / "all"), "--label-names", "a,b")
    printed = capfd.readouterr()
    assert stop.value.code == 2
    assert "error: " in printed.err and "label '7' is neither one of a, b" in printed.err
    assert not (tmp_path / "all" / "ours" / "seed-2").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_ends_it(
    number: signal.Signals, tiny_encoder: Path, small_data: Path, tmp_path: Path
) -> None:
    options = common(tiny_encoder, small_data, tmp_path / "all", "--epochs", 100_000)
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "--seeds", "1,2", *options]
    log = tmp_path / "all" / "ours" / "seed-1.log"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and (not log.is_file() or "step " not in log.read_text()):
            pass
        # A terminal's Ctrl-C goes to both processes.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait() == 128 + number
        # Training has ended before: the same command, given at once, does not find its folder in use.
        claim(tmp_path / "all" / "ours" / "seed-1").close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert f"by {number.name} after step" in said
    assert not (tmp_path / "all" / "ours" / "seed-2").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seeds", "1,x"], "'1,x' is not a list of different seeds"),
        (["--seeds", "1,01"], "'1,01' is not a list of different seeds"),
        (["--seeds", "1", "--seed=2"], "leave out --seed=2"),
        (["--seeds", "1", "--resume"], "leave out --resume"),
        (["--seeds", "1", "--config", "x"], "leave out --config"),
        (["--seeds", "1", "--setting", "a/b", ""], "take letters, digits and hyphens"),
        (["--seeds", "1", "--setting", "a", "", "--setting", "a", "--lr 1"], "--setting a: that name is taken"),
        (["--seeds", "1", "--setting", "trainer", ""], "that name is taken"),
        (["--seeds", "1", "--setting", "a", "--epoch 3"], "did you mean --epochs?"),
        ([], "required: --seeds"),
    ],
)
def test_wrong_use(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in user_error(lambda: study.main(["--output-dir", "x", *options]), capsys)
    assert not os.path.lexists("x")


def is_part(words: tuple[str, ...], of: tuple[str, ...]) -> bool:
    return any(of[start : start + len(words)] == words for start in range(len(of) - len(words) + 1))


def test_nothing_of_the_test_is_left_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """300 sentences of few words and 900 phrases cut from them; against a comparison of all with all."""
    draw = random.Random(0)
    sentences = [[f"w{draw.randrange(150)}" for _ in range(draw.randrange(4, 12))] for _ in range(300)]
    rows = [*sentences]
    for _ in range(900):
        sentence = draw.choice(sentences)
        start = draw.randrange(len(sentence))
        rows.append(sentence[start : start + draw.randrange(1, 6)])
    draw.shuffle(rows)
    lines = [
        f"{' '.join(row).upper() if draw.random() < 0.5 else ' '.join(row)}\t{n % 2}" for n, row in enumerate(rows)
    ]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    options = ["--train-file", tmp_path / "train.tsv", "--rows", 60, "--output-dir"]
    hold_out.main([str(word) for word in [*options, tmp_path / "a"]])
    assert "60 for the test" in capsys.readouterr().out
    found = {name: (tmp_path / "a" / f"{name}.tsv").read_text().splitlines() for name in ("train", "test")}
    assert len(found["test"]) == 61
    assert len(found["train"]) > 400
    assert set(found["train"]) | set(found["test"]) <= {"sentence\tlabel", *lines}, "rows stay as they are"
    held, left = ([tuple(line.split("\t")[0].lower().split()) for line in found[n][1:]] for n in ("test", "train"))
    for test in held:
        for row in left:
            assert not is_part(row, test), (row, test)
            assert not is_part(test, row), (test, row)

    hold_out.main([str(word) for word in [*options, tmp_path / "b", "--train-rows", 100]])
    few = (tmp_path / "b" / "train.tsv").read_text().splitlines()
    assert len(few) == 101
    assert set(few) <= set(found["train"])
    assert (tmp_path / "b" / "test.tsv").read_text() == (tmp_path / "a" / "test.tsv").read_text()


def test_holding_out_from_csv_keeps_columns_and_quotes(tmp_path: Path) -> None:
    rows = [f'"a film, number {n}, of many",{n % 2},"x\ny"' for n in range(30)]
    (tmp_path / "t.csv").write_text("review,stars,note\n" + "\n".join(rows) + "\n")
    words: list[Any] = ["--train-file", tmp_path / "t.csv", "--rows", 5, "--text-column", "review", "--output-dir"]
    hold_out.main([str(word) for word in [*words, tmp_path / "out"]])
    written = (tmp_path / "out" / "test.csv").read_bytes().decode().replace("\r\n", "\n")
    assert written.startswith("review,stars,note\n")
    assert sum(row in written for row in rows) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "40"], "only 40 rows are there, and some must stay"),
        (["--rows", "0"], "'0' is not a number from 1"),
        (["--rows", "5", "--train-rows", "99"], "35 rows are left to train on"),
        (["--rows", "5", "--text-column", "review"], "no column 'review'"),
    ],
)
def test_wrong_use_of_hold_out(
    tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"text number {n}\t{n % 2}" for n in range(40)]
    (tmp_path / "t.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    words = ["--train-file", str(tmp_path / "t.tsv"), "--output-dir", str(tmp_path / "out"), *options]
    assert says in user_error(lambda: hold_out.main(words), capsys)
    assert not (tmp_path / "out").exists()
