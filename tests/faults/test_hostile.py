"""Files made to harm: one line and status 2, no code of theirs runs, and nothing is written outside a run's folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_options, user_error
from safetensors.torch import load_file
from torch import nn

from sst2_xlmr import train
from sst2_xlmr.model.encoders import TOKENIZER_NAME
from sst2_xlmr.util.files import SCRATCH_MARK, digest_of, scratch_name

WORD = "roberta.embeddings.word_embeddings.weight"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def as_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def saved(content: object, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a tar file: torch.load unpickles its parts without the guard of `weights_only`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Scripted(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), buffer)
    return buffer.getvalue()


def tensor(shape: list[int], offsets: tuple[int, int], dtype: str = "F32", tail: bytes = b"") -> Callable[[Path], Any]:
    """Return what replaces the weights by a safetensors file whose header tells of one tensor."""
    text = json.dumps({WORD: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return raw(struct.pack("<Q", len(text)) + text + tail)


def raw(content: bytes, name: str = "model.safetensors") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def setting(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    return change


def bomb(make: Callable[[Bomb], bytes]) -> Callable[[Path], Any]:
    return lambda folder: as_bin(folder, make(Bomb(folder / "it ran")))


def repeated(name: str) -> Callable[[Path], Any]:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return link


CLASSIFIER = "XLMRobertaForSequenceClassification"
ENCODERS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("pickle bomb, zip", bomb(saved), "holds more than tensors"),
    ("pickle bomb, old format", bomb(lambda it: saved(it, is_zip=False)), "holds more than tensors"),
    ("pickle bomb, bare", bomb(pickle.dumps), "pytorch_model.bin"),
    ("pickle bomb among tensors", bomb(lambda it: saved({WORD: torch.ones(2), "x": it})), "holds more than tensors"),
    ("pickle bomb, tar", bomb(lambda it: tar_of({"pickle": pickle.dumps(it)})), "may run code"),
    (
        "pickle bomb, tar with storages",
        bomb(lambda it: tar_of({"storages": pickle.dumps(it), "tensors": b"", "pickle": pickle.dumps(it)})),
        "may run code",
    ),
    ("TorchScript", lambda folder: as_bin(folder, torchscript()), "may run code"),
    ("zip that is none", lambda folder: as_bin(folder, b"PK\x03\x04" + bytes(100)), "damaged"),
    ("a list, not tensors by name", lambda folder: as_bin(folder, saved([torch.ones(2)])), "pytorch_model.bin"),
    ("no tensors", lambda folder: as_bin(folder, saved({})), "does not fit its configuration"),
    ("empty bin", lambda folder: as_bin(folder, b""), "pytorch_model.bin"),
    ("half a bin", lambda folder: as_bin(folder, saved({WORD: torch.ones(1000)})[:-300]), "damaged"),
    ("empty weights", raw(b""), "damaged"),
    ("header of 2**63 bytes", raw(struct.pack("<Q", 2**63) + b"{}"), "damaged"),
    ("header longer than the file", raw(struct.pack("<Q", 2**20) + b"{}"), "damaged"),
    ("header that is no JSON", raw(struct.pack("<Q", 9) + b"not JSON!"), "damaged"),
    ("header that is no object", raw(struct.pack("<Q", 8) + b"[1, 2, 3"), "damaged"),
    ("tensor of 2**60 values", tensor([2**60], (0, 2**62)), "damaged"),
    ("shape that overflows", tensor([2**62, 8], (0, 0)), "damaged"),
    ("tensor behind the file", tensor([4], (0, 16)), "damaged"),
    ("tensor that ends before it starts", tensor([4], (16, 0)), "damaged"),
    ("unknown dtype", tensor([1], (0, 4), "F33"), "damaged"),
    ("tensor of another shape", tensor([1], (0, 4), tail=bytes(4)), "does not fit"),
    ("weights that link to themselves", repeated("model.safetensors"), "has neither model.safetensors nor"),
    ("a billion layers", setting(num_hidden_layers=10**9), "a number from 1 to 1,000"),
    ("a trillion wide", setting(hidden_size=10**12), "a number from 1 to 10,000,000"),
    ("no heads", setting(num_attention_heads=0), "num_attention_heads is 0"),
    ("fractional width", setting(hidden_size=32.0), "hidden_size is 32.0"),
    ("width as text", setting(hidden_size="32"), "hidden_size is '32'"),
    ("true as width", setting(hidden_size=True), "hidden_size is True"),
    ("other width", setting(hidden_size=64), "does not fit its configuration"),
    ("more positions", setting(max_position_embeddings=10_000_000), "does not fit its configuration"),
    ("epsilon as text", setting(layer_norm_eps="tiny"), "layer_norm_eps is 'tiny'"),
    ("epsilon NaN", setting(layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    ("another model", setting(model_type="roberta"), "model_type is 'roberta'"),
    (
        "labels without order",
        setting(architectures=["SequenceClassification"], id2label={"7": "x"}),
        "id2label must name",
    ),
    ("labels as list", setting(architectures=["SequenceClassification"], id2label=["x"]), "id2label must name"),
    ("settings nested without end", raw(b'{"a":' + b"[" * 100_000, "config.json"), "cannot read"),
    ("settings that are a list", raw(b"[]", "config.json"), "does not hold a JSON object"),
    ("settings in UTF-16", raw('{"model_type": "xlm-roberta"}'.encode("utf-16"), "config.json"), "cannot read"),
    ("empty settings", raw(b"", "config.json"), "cannot read"),
    ("settings that link to themselves", repeated("config.json"), "config.json"),
    ("empty tokenizer", raw(b"", TOKENIZER_NAME), "is not a SentencePiece model"),
    (
        "tokenizer that is text",
        raw(b"<html>not found</html>", "sentencepiece.bpe.model"),
        "is not a SentencePiece model",
    ),
    ("tokenizer of noise", raw(bytes(range(256)) * 100, "sentencepiece.bpe.model"), "is not a SentencePiece model"),
]


def tree(*folders: Path) -> dict[str, float]:
    """Return every file below the folders with the time of its last change."""
    return {str(path): path.lstat().st_mtime for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize(("harm", "says"), [case[1:] for case in ENCODERS], ids=[case[0] for case in ENCODERS])
def test_hostile_encoder(
    harm: Callable[[Path], Any],
    says: str,
    tiny_model: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = Path(shutil.copytree(tiny_model, tmp_path / "encoder"))
    harm(encoder)
    before = tree(tmp_path)
    line = user_error(lambda: train.main(train_options(encoder, small_data, tmp_path / "run")), capsys)
    assert says in line
    assert len(line) < 500
    assert tree(tmp_path) == before, "nothing ran, nothing was written"


def forged(checkpoint: Path) -> None:
    """Write a manifest that fits the files."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": digest_of(file)}
        for file in sorted(checkpoint.iterdir())
        if file.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(files, indent=2) + "\n")


def with_state(**changes: Any) -> Callable[[Path], Any]:
    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "state.json").read_text())
        content["state"].update(changes)
        (checkpoint / "state.json").write_text(json.dumps(content))

    return change


CHECKPOINTS: list[tuple[str, Callable[[Path], Any]]] = [
    ("pickle bomb", lambda at: (at / "model.safetensors").write_bytes(pickle.dumps(Bomb(at.parent / "it ran")))),
    ("pickle bomb as torch file", lambda at: (at / "optimizer.safetensors").write_bytes(saved(Bomb(at / "it ran")))),
    ("absurd header", lambda at: (at / "random.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")),
    ("tensors of another model", lambda at: shutil.copy(at / "random.safetensors", at / "model.safetensors")),
    ("state that is a list", lambda at: (at / "state.json").write_text("[]")),
    ("state with more", with_state(hook="os.system")),
    ("state without end", lambda at: (at / "state.json").write_text("[" * 100_000)),
]


@pytest.mark.parametrize("harm", [case[1] for case in CHECKPOINTS], ids=[case[0] for case in CHECKPOINTS])
def test_hostile_checkpoint_with_a_forged_manifest(
    harm: Callable[[Path], Any], run_train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    checkpoint = run / "checkpoints" / "step-00000007"
    harm(checkpoint)
    forged(checkpoint)
    line = user_error(lambda: train.main(["--resume", "--output-dir", str(run)]), capsys)
    assert f"cannot read the checkpoint {checkpoint}: " in line
    assert not list(tmp_path.rglob("it ran"))


def test_links_in_a_run_folder_lead_nowhere(
    run_train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder that somebody else has packed: nothing outside is written, replaced or removed."""
    run = run_train(tmp_path / "run", "--epochs", 2, "--save-every", 3)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    Path(shutil.copytree(run / "checkpoints" / "step-00000014", outside / "checkpoint"))
    before = tree(outside)
    resume = ["--resume", "--output-dir", str(run)]

    for name in ("metrics.jsonl.tmp", "config.json.tmp"):
        (run / name).symlink_to(outside / "precious")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "not there")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "step-00000001").symlink_to(outside / "checkpoint")
    (run / "checkpoints" / "step-00000020").symlink_to(outside / "checkpoint")
    (run / "checkpoints" / "step-00000014" / "manifest.json").unlink()
    for name in ("best.tmp", "model.old", "checkpoints/step-00000014.tmp"):
        (run / name).symlink_to(outside)
    for name, kind in (("best", "new"), ("checkpoints/step-00000014", "old")):
        scratch_name(run / name, kind).symlink_to(outside)
    train.main(resume)
    assert "step-00000020 is damaged (it is a symbolic link)" in capsys.readouterr().out
    assert not list(run.rglob(f"*{SCRATCH_MARK}"))
    for name in ("checkpoints", "best", "model", "tensorboard"):
        (run / name).rename(run / "aside")
        (run / name).symlink_to(outside)
        assert f"{run / name} is a symbolic link" in user_error(lambda: train.main(resume), capsys)
        (run / name).unlink()
        (run / "aside").rename(run / name)
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "precious")
    assert "cannot write to" in user_error(lambda: train.main(resume), capsys)
    assert tree(outside) == before


def test_no_archive_is_unpacked_and_no_pickle_run() -> None:
    package = Path(train.__file__).parent
    unpacking = [
        file.name
        for file in package.rglob("*.py")
        if any(word in file.read_text() for word in ("extractall", ".extract(", "unpack_archive"))
    ]
    assert unpacking == []
    assert [f.name for f in package.rglob("*.py") if "import pickle" in f.read_text()] == ["distributed.py"]
    assert all(
        "weights_only=True" in line
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if "torch.load(" in line
    )


def test_bomb_in_the_token_cache_is_data(run_train: Callable[..., Path], tmp_path: Path) -> None:
    """What is not as it was written is made anew."""
    run_train(tmp_path / "first", "--epochs", 1)
    caches = list(Path(os.environ["SST2_XLMR_CACHE"], "tokens").glob("*/manifest.json"))
    assert caches
    for manifest in caches:
        for file in manifest.parent.iterdir():
            file.write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    run_train(tmp_path / "second", "--epochs", 1)
    assert not (tmp_path / "it ran").exists()
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("first", "second"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_cases_are_enough() -> None:
    from test_config import WRONG_FILES, WRONG_FLAGS

    assert len(ENCODERS) + len(CHECKPOINTS) + len(WRONG_FILES) + len(WRONG_FLAGS) >= 100
