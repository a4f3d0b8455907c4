"""A tiny encoder with random weights, made on the spot, and ways to run the command line on it."""

import functools
import gc
import importlib
import io
import json
import os
import resource
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sst2_xlmr import labels, train
from sst2_xlmr.data import rows as data
from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.data.token_cache import TokenCache, tokenize_files
from sst2_xlmr.engines.cpu.kernels import Kernels, load_kernels
from sst2_xlmr.export.folder import write_folder
from sst2_xlmr.model.encoders import TOKENIZER_NAME, EncoderFolder, EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.tokenizer import CUT
from sst2_xlmr.programs import export
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util import versions
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError, exit_on_user_error

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
RunTrain = Callable[..., Path]
Words = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parent.parent
SAMPLE_DATA = ROOT / "sample_data"
SMALL_ENCODER = Path(os.environ.get("SST2_XLMR_SMALL_ENCODER", ROOT / "models" / "small"))
SST2 = Path(os.environ.get("SST2_XLMR_TEST_SST2", ROOT / "data" / "SST-2"))
SST2_NAMES = ["negative", "positive"]
CPU = torch.device("cpu")
ALONE = World(CPU)

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]
make_tokenizer = importlib.import_module("inputs").make_tokenizer

needs_small_encoder = pytest.mark.skipif(
    not (SMALL_ENCODER / "model.safetensors").is_file(),
    reason=f"{SMALL_ENCODER} is not there: python scripts/fetch_small_encoder.py models/small",
)


needs_torchtext = pytest.mark.skipif(not versions.has_torchtext(), reason=f"this is {versions.versions()}")


@pytest.fixture(scope="session", autouse=True)
def _no_surprises(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache out of the tests, and torch on one thread: tiny tensors gain nothing from more."""
    os.environ["SST2_XLMR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns in every fork
    torch.set_num_threads(1)
    # A fork has objects of ONNX Runtime, but not their threads: to collect one would wait for these forever.
    os.register_at_fork(after_in_child=gc.freeze)
    # tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all others.
    tqdm.set_lock(threading.RLock())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch has in this test."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's folder, with random weights: 3 layers, 32 wide, about 500 pieces, labels a and b."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = folder / "tokenizer.model"
    shape = EncoderShape(make_tokenizer(tokenizer), hidden=32, layers=3, heads=4, ffn=64, positions=66)
    torch.manual_seed(1)
    classifier = SequenceClassifier(shape, 2)
    for parameter in classifier.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    target = folder / "tiny"
    described = EncoderFolder("", shape, Path(), tokenizer, ["a", "b"], 64)
    write_folder(target, dict(classifier.named_parameters()), described)
    return target


@pytest.fixture(scope="session")
def tiny_encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's encoder, in Hugging Face layout, without the classification head."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("encoder") / "tiny"))
    change_json(folder / "config.json", architectures=["XLMRobertaModel"])
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "classifier" not in name}, folder / "model.safetensors")
    return folder


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def write_small_data(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in (("train", 50), ("dev", 20)):
        lines = (SAMPLE_DATA / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        (folder / f"{split}.tsv").write_text("\n".join(lines[: rows + 1]) + "\n", encoding="utf-8")
    return folder


def change_weights(model: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(model, copy)
    change(tensors := load_file(model / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """A data folder: 50 training rows, 20 dev rows."""
    return write_small_data(tmp_path / "data")


def run_export(*options: object) -> None:
    export.main([str(option) for option in options])


def tokenize_sample(encoder: Path, split: str = "train", max_length: int = 20) -> TokenCache:
    how = encoder / TOKENIZER_NAME, max_length, CUT
    return tokenize_files([SAMPLE_DATA / f"{split}.tsv"], how, ReadOptions(), SingleLabel(SST2_NAMES))


@pytest.fixture
def cache(tiny_encoder: Path) -> TokenCache:
    """The sample data's training rows, cut to 20 tokens."""
    return tokenize_sample(tiny_encoder)


@pytest.fixture(scope="session")
def finished_run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on `small_data`, to be copied; its checkpoints are those of the steps 12 and 14."""
    folder = tmp_path_factory.mktemp("finished")
    options = train_options(tiny_encoder, write_small_data(folder / "data"), folder / "run", "--epochs", 2)
    train.main([*options, "--save-every", "3"])
    return folder / "run"


@pytest.fixture
def train_words(tiny_encoder: Path, small_data: Path) -> Words:
    """A quick run's command line on the tiny encoder: train_words(folder, "--epochs", 1, ...)."""
    return functools.partial(train_options, tiny_encoder, small_data)


@pytest.fixture
def run_train(train_words: Words) -> RunTrain:
    """Run `train.py` in this process on the tiny encoder: run_train(folder, "--epochs", 1, ...) -> folder."""

    def run(folder: Path, *options: Any) -> Path:
        train.main(train_words(folder, *options))
        return folder

    return run


def train_options(encoder: Path, data: Path, folder: Path, *options: Any) -> list[str]:
    """Return a quick run's command line; later options win."""
    fixed = ["--encoder", encoder, "--data-dir", data, "--output-dir", folder, "--device", "cpu", "--max-length", 64]
    fixed += ["--batch-size", 8, "--lr", 1e-3, "--log-every", 1, "--precision", "fp32", "--threads", 1]
    return [str(option) for option in [*fixed, *options]]


def kernels_for(dtype: torch.dtype) -> Kernels:
    """Return the CPU's kernels; skips the test where they do not compile."""
    found = load_kernels(dtype)
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def random_texts(lengths: torch.Tensor, vocab_size: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed texts of these lengths: `<s>`, random ids, `</s>`; int64 [tokens], and the lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, ends = torch.randint(4, vocab_size, (int(lengths.sum()),), generator=generator), lengths.cumsum(0)
    ids[ends - lengths], ids[ends - 1] = 0, 2
    return ids, lengths


def sst2_sentences() -> list[str]:
    """Return the 872 sentences of SST-2's dev split, where that is at hand, or the sample data's."""
    file = (SST2 if SST2.is_dir() else SAMPLE_DATA) / "dev.tsv"
    return [line.split("\t")[0] for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may become longer than this many bytes: for a program what a full disk is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def user_error(main: Callable[..., Any], *arguments: Any) -> str:
    """Call `main` as a program, which must end with status 2 and one line on stderr; returns that line."""
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match="^2$"):
        exit_on_user_error(lambda: main(*arguments))
    said = errors.getvalue()
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def refusal(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the one line that it is refused with."""
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(found: Any, expected: Any) -> None:
    """Tensors or arrays, alone or in mappings and sequences, are equal to the bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "split" not in line]


def find_label_names(file: Path, options: ReadOptions) -> list[str]:
    return labels.find_label_names(data.inspect(file, options).labels, file)
