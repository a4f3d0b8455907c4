"""Files made to harm: one line and status 2, no code of theirs runs, and nothing is written outside a run's folder."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, change_json, train_options, user_error
from running import resume

from sst2_xlmr import train
from sst2_xlmr.model.encoders import TOKENIZER_NAME
from sst2_xlmr.util.files import SCRATCH_MARK, digest_of, scratch_name

Harm = Callable[[Path], Any]
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


def tar_of(name: str, content: bytes) -> bytes:
    """Return a tar file: torch.load unpickles its parts without the guard of `weights_only`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tensor(shape: list[int], offsets: tuple[int, int], tail: bytes = b"") -> Harm:
    """Return what replaces the weights by a safetensors file whose header tells of one tensor."""
    text = json.dumps({WORD: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return raw(struct.pack("<Q", len(text)) + text + tail)


def raw(content: bytes, name: str = "model.safetensors") -> Harm:
    return lambda folder: (folder / name).write_bytes(content)


def setting(**changes: Any) -> Harm:
    return lambda folder: change_json(folder / "config.json", **changes)


def bomb(make: Callable[[Bomb], bytes]) -> Harm:
    return lambda folder: as_bin(folder, make(Bomb(folder / "it ran")))


def repeated(name: str) -> Harm:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return link


ENCODERS: list[tuple[str, Harm, str]] = [
    ("pickle bomb, zip", bomb(saved), "holds more than tensors"),
    ("pickle bomb, old format", bomb(lambda it: saved(it, is_zip=False)), "holds more than tensors"),
    ("pickle bomb, tar", bomb(lambda it: tar_of("pickle", pickle.dumps(it))), "may run code"),
    ("zip that is none", lambda folder: as_bin(folder, b"PK\x03\x04" + bytes(100)), "cannot read weights"),
    ("a list, not tensors by name", lambda folder: as_bin(folder, saved([torch.ones(2)])), "pytorch_model.bin"),
    ("no tensors", lambda folder: as_bin(folder, saved({})), "does not fit its configuration"),
    ("half a bin", lambda folder: as_bin(folder, saved({WORD: torch.ones(1000)})[:-300]), "cannot read weights"),
    ("empty weights", raw(b""), "cannot read weights"),
    ("half the weights", lambda f: os.truncate(f / "model.safetensors", 9999), "cannot read weights"),
    ("more layers than stored", setting(num_hidden_layers=4), "layers.3.qkv.weight [96, 32] is missing"),
    ("wider feed-forward part", setting(intermediate_size=128), "up.weight has shape [64, 32], expected [128, 32]"),
    ("other activation", setting(hidden_act="relu"), "hidden_act is 'relu'"),
    ("heads that do not fit", setting(num_attention_heads=5), "not a multiple of num_attention_heads"),
    ("header of 2**63 bytes", raw(struct.pack("<Q", 2**63) + b"{}"), "cannot read weights"),
    ("tensor of 2**60 values", tensor([2**60], (0, 2**62)), "cannot read weights"),
    ("tensor of another shape", tensor([1], (0, 4), tail=bytes(4)), "does not fit"),
    ("weights that link to themselves", repeated("model.safetensors"), "has neither model.safetensors nor"),
    ("a billion layers", setting(num_hidden_layers=10**9), "a number from 1 to 1,000"),
    ("a trillion wide", setting(hidden_size=10**12), "a number from 1 to 10,000,000"),
    ("fractional width", setting(hidden_size=32.0), "hidden_size is 32.0"),
    ("epsilon as text", setting(layer_norm_eps="tiny"), "layer_norm_eps is 'tiny'"),
    ("epsilon NaN", setting(layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    ("labels without order", setting(id2label={"7": "x"}), "id2label must name"),
    ("settings nested without end", raw(b'{"a":' + b"[" * 100_000, "config.json"), "cannot read"),
    ("settings that are a list", raw(b"[]", "config.json"), "does not hold a JSON object"),
    ("settings that link to themselves", repeated("config.json"), "config.json"),
    ("empty tokenizer", raw(b"", TOKENIZER_NAME), "as a SentencePiece model: "),
    ("tokenizer of noise", raw(bytes(range(256)) * 100, "sentencepiece.bpe.model"), "as a SentencePiece model: "),
]


def tree(*folders: Path) -> dict[str, float]:
    return {str(path): path.lstat().st_mtime for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize(("harm", "says"), [case[1:] for case in ENCODERS], ids=[case[0] for case in ENCODERS])
def test_hostile_encoder(harm: Harm, says: str, model: Path, small_data: Path, tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(model, tmp_path / "encoder"))
    harm(encoder)
    before = tree(tmp_path)
    line = user_error(train.main, train_options(encoder, small_data, tmp_path / "run"))
    assert says in line
    assert len(line) < 500
    assert tree(tmp_path) == before, "nothing ran, nothing was written"


CHECKPOINTS: dict[str, Harm] = {
    "pickle bomb": lambda at: (at / "model.safetensors").write_bytes(pickle.dumps(Bomb(at.parent / "it ran"))),
    "pickle bomb as torch file": lambda at: (at / "optimizer.safetensors").write_bytes(saved(Bomb(at / "it ran"))),
    "tensors of another model": lambda at: shutil.copy(at / "random.safetensors", at / "model.safetensors"),
}


@pytest.mark.parametrize("harm", CHECKPOINTS)
def test_hostile_checkpoint_with_a_forged_manifest(harm: str, finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "step-00000014"
    CHECKPOINTS[harm](checkpoint)
    (checkpoint / "manifest.json").unlink()
    files = {f.name: {"bytes": f.stat().st_size, "sha256": digest_of(f)} for f in sorted(checkpoint.iterdir())}
    (checkpoint / "manifest.json").write_text(json.dumps(files, indent=2) + "\n")
    assert f"cannot read the checkpoint {checkpoint}: " in user_error(resume, run)
    assert not list(tmp_path.rglob("it ran"))


def test_links_in_a_run_folder_lead_nowhere(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run's folder that somebody else has packed: nothing outside is written, replaced or removed."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (outside := tmp_path / "outside").mkdir()
    (outside / "precious").write_text("precious")
    Path(shutil.copytree(run / "checkpoints" / "step-00000014", outside / "checkpoint"))
    before = tree(outside)

    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "not there")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "step-00000001").symlink_to(outside / "checkpoint")
    (run / "checkpoints" / "step-00000020").symlink_to(outside / "checkpoint")
    (run / "checkpoints" / "step-00000014" / "manifest.json").unlink()
    for name, kind in (("best", "new"), ("checkpoints/step-00000014", "old")):
        scratch_name(run / name, kind).symlink_to(outside)
    resume(run)
    assert "step-00000020 is damaged (it is a symbolic link)" in capsys.readouterr().out
    assert not list(run.rglob(f"*{SCRATCH_MARK}"))
    for name in ("checkpoints", "best", "model", "tensorboard"):
        (run / name).rename(run / "aside")
        (run / name).symlink_to(outside)
        assert f"{run / name} is a symbolic link" in user_error(resume, run)
        (run / name).unlink()
        (run / "aside").rename(run / name)
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "precious")
    assert "cannot write to" in user_error(resume, run)
    assert tree(outside) == before


def test_no_archive_is_unpacked_and_no_pickle_run() -> None:
    texts = {file: file.read_text() for file in Path(train.__file__).parent.rglob("*.py")}
    assert not [file for file, text in texts.items() if re.search("extractall|[.]extract[(]|unpack_archive", text)]
    assert [file.name for file, text in texts.items() if "import pickle" in text] == ["distributed.py"]
    loads = [line for text in texts.values() for line in text.splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in loads)
