"""scripts/study.py and scripts/split.py."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, metrics, train_options, user_error

from sst2_xlmr.programs import split, study
from sst2_xlmr.report.comparison import Results, interval, summary
from sst2_xlmr.training.run_folder import claim
from sst2_xlmr.util.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
TRANSFORMERS = os.environ.get("SST2_XLMR_TEST_PEER")


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
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
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


def test_a_run_is_not_taken_for_one_on_other_files(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files under another path are the same; a study older than the notes gets them."""
    options = ["--seeds", "1", *common(tiny_encoder, small_data, tmp_path / "all", "--max-steps", 1)]
    run_study(*options)
    notes = tmp_path / "all" / "ours" / "seed-1.inputs.json"
    before = notes.read_text()
    assert sorted(json.loads(before)) == ["dev", "the encoder's tokenizer", "the encoder's weights", "train"]

    moved = tmp_path / "moved"
    shutil.copytree(small_data, moved)
    notes.unlink()
    for _ in range(2):
        capsys.readouterr()
        run_study(*options, "--data-dir", moved)
        assert "was finished" in capsys.readouterr().out
        assert notes.read_text() == before

    study.digest.cache_clear()  # as in another process
    shutil.copy(moved / "dev.tsv", tmp_path / "new.tsv")
    with pytest.raises(UserError, match=r"new\.tsv \(new\) is none of the files of the run .*leave it out"):
        run_study(*options, "--test-file", tmp_path / "new.tsv")
    with (moved / "dev.tsv").open("a") as file:
        file.write("one more\t0\n")
    with pytest.raises(UserError, match=r"moved/dev\.tsv \(dev\) is not the file of the run .*another --output-dir"):
        run_study(*options, "--data-dir", moved)
    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"other/model\.safetensors \(the encoder's weights\) is not the file"):
        run_study(*options, "--encoder", other)
    notes.write_text(json.dumps({**json.loads(before), "fr": "0"}))
    with pytest.raises(UserError, match=r"fr, a file of the run .*name it again, or choose another --output-dir"):
        run_study(*options)


def test_seconds_are_unknown_after_a_kill(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if only this script had been killed: training went on, and nobody took the time, not even when continued."""
    options = ["--seeds", "1,2", *common(tiny_encoder, small_data, tmp_path / "all", "--epochs", 1)]
    run_study(*options)
    (tmp_path / "all" / "ours" / "seed-1.seconds").unlink()
    taken = float((tmp_path / "all" / "ours" / "seed-2.seconds").read_text())
    for _ in range(2):
        capsys.readouterr()
        run_study(*options)
        found = json.loads((tmp_path / "all" / "study.json").read_text())
        assert [found["runs"]["ours"][seed]["seconds"] for seed in ("1", "2")] == [None, taken]
        assert found["summary"]["ours"]["mean"]["seconds"] == taken
        assert found["summary"]["ours"]["deviation"]["seconds"] is None
        ends = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("ours  ")]
        assert ends == ["-", f"{taken:.0f}", f"{taken:.0f}", "-"]
        shutil.rmtree(tmp_path / "all" / "ours" / "seed-1" / "model", ignore_errors=True)


def test_differences_leave_out_what_is_unknown() -> None:
    runs: dict[str, Results] = {
        "a": {seed: {"dev": 0.5, "seconds": float(seed) if seed > 1 else None} for seed in (1, 2, 3)},
        "b": {seed: {"dev": 0.6, "seconds": 2.0 * seed} for seed in (1, 2, 3)},
        "c": {seed: {"dev": 0.6, "seconds": None} for seed in (1, 2, 3)},
    }
    found = summary(runs)
    assert found["b"]["difference"]["seconds"]["mean"] == 2.5
    assert "seconds" not in found["c"]["difference"]
    assert found["c"]["mean"]["seconds"] is None


# As peer_training.py would.
PEER = """#!{python}
import json, sys
order = json.load(open(sys.argv[2]))
json.dump({{"order": order, "accuracy": {{name: 0.5 for name in order["splits"]}}}}, open(sys.argv[3], "w"))
"""


def test_the_trainers_results_are_those_of_the_same_files(
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "python").write_text(PEER.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    options = ["--seeds", "1", "--peer", tmp_path / "python"]
    options += common(tiny_encoder, small_data, tmp_path / "all", "--max-steps", 1, "--epochs", 1)
    place = options.index("--max-steps")  # which the Trainer does not know
    del options[place : place + 2]
    run_study(*options)
    (tmp_path / "all" / "trainer" / "seed-1.seconds").unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run_study(*options, "--output-dir", "all")  # another path of the same folder
    printed = capsys.readouterr().out
    assert printed.count("was finished") == 2
    assert "trainer, seed 1: was finished, dev 0.5000" in printed

    study.digest.cache_clear()
    with (small_data / "dev.tsv").open("a") as file:
        file.write("one more\t0\n")
    with pytest.raises(UserError, match=r"dev\.tsv \(dev\) is not the file of the run .*trainer/seed-1"):
        run_study(*options)
    study.digest.cache_clear()


HEADS = """
import sys
sys.path.insert(0, sys.argv[1])
from peer_training import build_trainer
order = dict(encoder=sys.argv[2], rows_file=sys.argv[3], labels=3, dropout=0.1, head_dropout=0.1, batch_size=2, lr=1e-5,
             max_steps=2, warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0, precision="fp32", device="cpu")
for seed in (1, 2, 1):
    print(build_trainer({**order, "seed": seed}).model.classifier.out_proj.weight[0, :4].tolist())
"""


@pytest.mark.skipif(not TRANSFORMERS, reason="SST2_XLMR_TEST_PEER names no Python that has transformers")
def test_every_seed_of_the_trainer_has_its_own_head(tiny_encoder: Path, tmp_path: Path) -> None:
    """Of three classes: the tiny encoder's file has weights for two, which are thus not taken."""
    rows = tmp_path / "rows.npz"
    np.savez(rows, train_ids=np.arange(8), train_offsets=np.array([0, 4, 8]), train_labels=np.array([0, 1]))
    words = [str(TRANSFORMERS), "-c", HEADS, str(ROOT / "scripts" / "bench"), str(tiny_encoder), str(rows)]
    first, second, again = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-3:]
    assert first == again != second


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
        (["--seeds", "1", "@options"], "leave out --config"),
        (["--seeds", "1", "--setting", "a", "@options"], "leave out --config"),
        (["--seeds", "1", "--setting", "a", "--label-names 'x,y"], '--setting a: "--label-names \'x,y" cannot be cut'),
        (["--seeds", "1", "--setting", "a/b", ""], "take letters, digits and hyphens"),
        (["--seeds", "1", "--setting", "a", "", "--setting", "a", "--lr 1"], "--setting a: that name is taken"),
        (["--seeds", "1", "--setting", "trainer", ""], "that name is taken"),
        (["--seeds", "1", "--setting", "a", "--epoch 3"], "did you mean --epochs?"),
        ([], "required: --seeds"),
    ],
)
def test_wrong_use(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "options").write_text("--config x.json  # of another run\n")
    monkeypatch.chdir(tmp_path)
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
    split.main([str(word) for word in [*options, tmp_path / "a"]])
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

    split.main([str(word) for word in [*options, tmp_path / "b", "--train-rows", 100]])
    few = (tmp_path / "b" / "train.tsv").read_text().splitlines()
    assert len(few) == 101
    assert set(few) <= set(found["train"])
    assert (tmp_path / "b" / "test.tsv").read_text() == (tmp_path / "a" / "test.tsv").read_text()


@pytest.mark.parametrize("different", [False, True])
def test_holding_out_of_rows_that_are_alike_is_quick(tmp_path: Path, different: bool) -> None:
    """20,000 rows of one text, or that begin alike; a comparison of all with all would take minutes."""
    rows = [f"this film is the best of all {n if different else ''}\t{n % 2}" for n in range(20_000)]
    others = [f"text number {n} is another\t0" for n in range(200)]
    (tmp_path / "t.tsv").write_text("\n".join(["sentence\tlabel", *rows, *others]) + "\n")
    start = time.monotonic()
    split.main(["--train-file", str(tmp_path / "t.tsv"), "--rows", "100", "--output-dir", str(tmp_path / "out")])
    assert time.monotonic() - start < 20
    found = {name: (tmp_path / "out" / f"{name}.tsv").read_text().splitlines() for name in ("train", "test")}
    assert len(found["test"]) == 101
    assert not {line.split("\t")[0] for line in found["test"][1:]} & {line.split("\t")[0] for line in found["train"]}


def test_holding_out_from_csv_keeps_columns_and_quotes(tmp_path: Path) -> None:
    rows = [f'"a film, number {n}, of many",{n % 2},"x\ny"' for n in range(30)]
    (tmp_path / "t.csv").write_text("review,stars,note\n" + "\n".join(rows) + "\n")
    words: list[Any] = ["--train-file", tmp_path / "t.csv", "--rows", 5, "--text-column", "review", "--output-dir"]
    split.main([str(word) for word in [*words, tmp_path / "out"]])
    written = (tmp_path / "out" / "test.csv").read_bytes().decode().replace("\r\n", "\n")
    assert written.startswith("review,stars,note\n")
    assert sum(row in written for row in rows) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "40"], "only 40 rows are there, and some must stay"),
        (["--rows", "0"], "'0' is not a number from 1"),
        (["--rows", "5", "--seed", "-1"], "'-1' is not a number from 0 to 4294967295"),
        (["--rows", "5", "--seed", str(2**32)], "'4294967296' is not a number from 0 to 4294967295"),
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
    assert says in user_error(lambda: split.main(words), capsys)
    assert not (tmp_path / "out").exists()
