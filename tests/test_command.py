"""How programs are started, from a checkout and from a wheel, and what they say on any console."""

import functools
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SAMPLE_DATA, Capture, Patch, Words, train_options, user_error

import sst2_xlmr
from sst2_xlmr import cli
from sst2_xlmr.__main__ import main
from sst2_xlmr.programs import options
from sst2_xlmr.util import versions
from sst2_xlmr.util.errors import UserError, exit_on_user_error

PROGRAMS = ["train", *options.PROGRAMS]


def run(
    *words: Any, cwd: Path = ROOT, expected: int = 0, python: str = sys.executable, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, which must end with the status `expected`."""
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "timeout": 120, "check": False}
    env = {**os.environ, **(env or {})}
    done = subprocess.run([python, *map(str, words)], cwd=cwd, env=env, capture_output=True, **how)
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def as_if(folder: Path, **versions: str) -> dict[str, str]:
    """Return an environment in which these versions of packages seem to be installed."""
    for package, version in versions.items():
        other = folder / f"{package}-{version}.dist-info"
        other.mkdir()
        (other / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_importing_the_package_does_nothing(tmp_path: Path) -> None:
    """It neither ends the interpreter, warns, nor loads anything slow, whatever is installed."""
    program = "import sys, sst2_xlmr; print(sst2_xlmr.__version__, {'torch', 'numpy'} & set(sys.modules), end='')"
    done = run("-W", "error", "-c", program, env=as_if(tmp_path, torch="2.2.2"))
    assert (done.stdout, done.stderr) == (f"{sst2_xlmr.__version__} set()", "")


@pytest.mark.parametrize("words", ["-m sst2_xlmr train", "-m sst2_xlmr.train"])
def test_every_start_says_a_mistake_in_one_line(words: str) -> None:
    said = one_line(run(*words.split(), "--epochs", "x", expected=2))
    assert said == "error: argument --epochs: invalid float value: 'x'; see --help\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command is given; there are train, predict, "),
        (["predit", "--model", "x"], "unknown command predit; did you mean predict?"),
        (["split", "--rows", "5"], "--train-file"),
    ],
)
def test_wrong_commands(words: list[str], says: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "argv", ["sst2-xlmr", *words])
    assert says in user_error(main)


def test_help_and_version(monkeypatch: Patch, capsys: Capture) -> None:
    for option, line in [("--version", f"sst2-xlmr {sst2_xlmr.__version__}, Python "), ("--help", "usage: sst2-xlmr")]:
        monkeypatch.setattr(sys, "argv", ["sst2-xlmr", option])
        main()
        assert (said := capsys.readouterr().out).startswith(line)
    assert {f"  {name:10}{add.__doc__}" for name, add in options.PROGRAMS.items()} <= set(said.splitlines())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_and_its_script_have_the_same_help(name: str, monkeypatch: Patch, capsys: Capture) -> None:
    script = ROOT / ("train.py" if name == "train" else f"scripts/{name}.py")
    helps = []
    for path, argv in ((ROOT / "sst2_xlmr/__main__.py", ["sst2-xlmr", name]), (script, [script.name])):
        monkeypatch.setattr(sys, "argv", [*argv, "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(path), run_name="__main__")
        usage, _, text = capsys.readouterr().out.partition("\n\n")
        assert usage.split()[:2] == ["usage:", argv[0]]
        helps.append(text)
    assert helps[0] == helps[1]


@pytest.mark.parametrize(
    ("started", "processes", "words"),
    [
        ("train.py", 1, "python train.py"),
        (str(ROOT / "train.py"), 1, f"python {ROOT / 'train.py'}"),
        ("/usr/bin/sst2-xlmr", 1, "sst2-xlmr train"),
        ("/site-packages/sst2_xlmr/__main__.py", 1, "python -m sst2_xlmr train"),
        ("train.py", 2, "torchrun --nproc_per_node=2 train.py"),
        ("/site-packages/sst2_xlmr/train.py", 2, "torchrun --nproc_per_node=2 -m sst2_xlmr train"),
    ],
)
def test_next_command_works(started: str, processes: int, words: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "orig_argv", ["python", started], raising=False)
    monkeypatch.setattr(cli.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cli.train_command() == words
    monkeypatch.chdir(SAMPLE_DATA)
    if started == "train.py":
        monkeypatch.setattr(sys, "argv", ["../train.py"])
        assert cli.train_command().endswith(" ../train.py")


TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        (TASK, True),  # srun --ntasks=2 python train.py
        ({**TASK, "RANK": "0"}, False),  # torchrun on every node, or runs of their own
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --ntasks=1, or the shell of salloc
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # sbatch's script itself
    ],
)
def test_tasks_of_srun_are_no_run(
    environment: dict[str, str], refused: bool, monkeypatch: Patch, capsys: Capture
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *TASK):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "x"])
    says = "srun started 2 tasks, which would train separately" if refused else "argument --epochs"
    with pytest.raises(SystemExit):
        main("train")
    assert capsys.readouterr().err.startswith(f"error: {says}")
    os.environ.pop("LOCAL_RANK", None)  # which the program may have set


# Neither the console nor the files' encoding by default has more than ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}


def test_any_console_shows_any_class(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [f"{text} {n}\t{label}\n" for n in range(8) for text, label in (("fine", "größe"), ("poor", "好"))]
    (file := tmp_path / "rows.tsv").write_text("".join(["text\tlabel\n", *rows]), "utf-8")
    run_folder = tmp_path / "run"
    options = ["--train-file", file, "--dev-file", file, "--max-steps", 4, "--label-names", "größe,好", "--calibrate"]
    said = run("train.py", *train_options(tiny_encoder, tmp_path, run_folder, *options), env=ASCII)
    assert "\\u597d" in said.stdout
    (bad := tmp_path / "bad.tsv").write_text("text\tlabel\nx\t坏\n", "utf-8")
    words = train_options(tiny_encoder, tmp_path, tmp_path / "bad", "--train-file", file, "--dev-file", bad)
    assert "\\u574f" in one_line(run("train.py", *words, expected=2, env=ASCII))
    model = ["--model", run_folder / "model", "--device", "cpu"]
    run("scripts/predict.py", *model, "--input", file, "--output", tmp_path / "out.tsv", env=ASCII)
    answers = (tmp_path / "out.tsv").read_text("utf-8").splitlines()[1:]
    assert {line.split("\t")[2] for line in answers} <= {"größe", "好"}
    assert "\\u597d" in run("scripts/evaluate.py", *model, "--file", file, env=ASCII).stdout


def test_a_file_that_the_locale_cannot_name_is_the_users_error(tmp_path: Path) -> None:
    file = tmp_path / "größe.tsv"
    file.write_text("text\tlabel\nx\ta\n", "utf-8")
    said = one_line(run("train.py", "--train-file", file, "--dev-file", file, expected=2, env=ASCII))
    assert "is not UTF-8, or not in this locale; set a locale with UTF-8, such as LC_ALL=C.UTF-8" in said


def test_output_that_nobody_takes() -> None:
    read_end, closed = os.pipe()
    os.close(read_end)
    no_space = b"error: cannot write the output: No space left on device; free some space\n"
    for output, expected in ((os.open("/dev/full", os.O_WRONLY), (2, no_space)), (closed, (141, b""))):
        command = [sys.executable, "-m", "sst2_xlmr", "--help"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, cwd=ROOT, check=False)
        os.close(output)
        assert (done.returncode, done.stderr) == expected


def test_an_error_of_one_rank_needs_no_standard_output(monkeypatch: Patch, capsys: Capture) -> None:
    def fail() -> None:
        raise UserError("no space", on_this_rank=True)

    monkeypatch.setattr(sys, "stdout", None)  # closed by `>&-`
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="^2$"):
        exit_on_user_error(fail)
    assert capsys.readouterr().err == "error: no space\n"


def test_what_cannot_work_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    said = one_line(run("train.py", "--help", expected=2, env=as_if(tmp_path, torch="2.3.0+cu121")))
    assert "torch 2.3.0+cu121 is installed, but 2.3.1 or newer is needed" in said


def test_a_python_without_torch_is_told_so() -> None:
    said = one_line(run("-S", "-m", "sst2_xlmr.train", expected=2, env={"PYTHONPATH": str(ROOT)}))
    assert " is not installed in " in said and "run `pip install -e .` in the project's folder" in said


@pytest.mark.parametrize(("torch", "torchtext"), [("2.3.1", "0.18.0"), ("2.13.0", "0.18.0"), ("2.3.1", "0.17.0")])
def test_torchtext_counts_only_where_it_loads(torch: str, torchtext: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(versions, "_installed", {"torch": torch, "torchtext": torchtext}.get)
    loads = (torch, torchtext) == ("2.3.1", "0.18.0")
    assert versions.has_torchtext() == loads
    assert f", torch {torch}, {'torchtext 0.18.0, ' if loads else ''}numpy " in versions.versions()


@pytest.mark.slow
def test_wheel_alone_trains_predicts_and_has_an_api(train_words: Words, tmp_path: Path) -> None:
    """In a fresh environment that sees the packages of this one, from an empty folder; pip fetches setuptools."""
    source = tmp_path / "source"  # setuptools would leave its files in the checkout
    shutil.copytree(ROOT / "sst2_xlmr", source / "sst2_xlmr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"sst2_xlmr-{sst2_xlmr.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    package = [file for file in (ROOT / "sst2_xlmr").rglob("*") if file.suffix in (".py", ".c", ".h", ".typed", ".md")]
    assert {str(file.relative_to(ROOT)) for file in package} == {name for name in names if "dist-info" not in name}

    run("-m", "venv", "--without-pip", tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert points.read_text().split() == ["[console_scripts]", "sst2-xlmr", "=", "sst2_xlmr.__main__:main"]
    (empty := tmp_path / "empty").mkdir()
    here = functools.partial(run, cwd=empty, python=str(tmp_path / "venv" / "bin" / "python"), env={"PYTHONPATH": ""})
    start = ["-c", "from sst2_xlmr.__main__ import main; main()"]  # as pip writes the command that pyproject.toml names
    here(*start, "train", *train_words(Path("run"), "--max-steps", 2))
    answer = here(*start, "predict", "--model", "run/model", "A fine film.").stdout
    assert answer.split("\t")[0] in ("negative", "positive")
    program = "import sst2_xlmr; print(*sst2_xlmr.load('run/model').predict(['A fine film.']), sst2_xlmr.__file__)"
    assert here("-c", program).stdout.split() == [answer.split("\t")[0], str(site / "sst2_xlmr" / "__init__.py")]


@pytest.mark.parametrize("words", [*([program, "--help"] for program in PROGRAMS), ["train", "--lrr=1"]], ids=" ".join)
def test_help_and_wrong_flags_need_not_wait_for_torch(words: list[str]) -> None:
    code = f"import sys; sys.argv = ['sst2-xlmr', *{words}]\nfrom sst2_xlmr.__main__ import main\ntry:\n    main()\n"
    code += "finally:\n    print('torch' in sys.modules)"
    assert run("-c", code, expected=2 * (words[1] != "--help")).stdout.splitlines()[-1] == "False"


def test_options_from_a_pipe_are_read_once(tiny_encoder: Path) -> None:
    """As in train.py @<(echo ...): at a second time there would be none."""
    options = f"--encoder {tiny_encoder} --max-length 999 --data-dir {SAMPLE_DATA}"
    command = [sys.executable, str(ROOT / "train.py"), "@/dev/stdin"]
    done = subprocess.run(command, input=options, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == f"error: --max-length 999: {tiny_encoder} takes at most 64 tokens\n"
