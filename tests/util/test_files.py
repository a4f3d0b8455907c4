"""Files that are whole or absent; tensors in them, the same as safetensors writes, without having them in memory."""

from __future__ import annotations

import gzip
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import file_size_limit, refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sst2_xlmr.util import tensors as tensor_files
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import disk_errors, new_file, put_in_place, scratch_name, write_text
from sst2_xlmr.util.tensors import LazyTensor, write_tensors


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz"])
def test_a_full_disk_hides_no_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """Closing a file fails too, as there is no room for what is still to be written."""
    (tmp_path / name).write_text("before")
    content = os.urandom(2000).hex()

    def write(error: UserError | None) -> None:
        with new_file(tmp_path / name) as file:
            file.write(content)
            if error:
                raise error

    with file_size_limit(100):
        with pytest.raises(UserError, match=f"cannot write .*{name}: File too large; make room"):
            write(None)
        assert "row 3 is wrong" in refusal(write, UserError("row 3 is wrong"))
        with pytest.raises(OSError, match="File too large"):
            write_text(tmp_path / name, content)
    unfinished = scratch_name(tmp_path / "model")
    for error, expected in ((OSError(28, "No space left on device"), "make room"), (UserError("row 3"), "row 3")):
        unfinished.mkdir()
        with pytest.raises(UserError, match=expected), disk_errors("the model", unfinished):
            raise error
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "before"


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    for link, name in (("x", "a"), ("y.gz", "b"), ("link", "c")):
        (tmp_path / name).write_text("precious")
        (tmp_path / link).symlink_to(tmp_path / name)
    write_text(tmp_path / "x", "new")
    with new_file(tmp_path / "y.gz") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == gzip.decompress((tmp_path / "y.gz").read_bytes()).decode() == "new"
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c")] == ["precious"] * 3
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "new").mkdir()
    with pytest.raises(NotADirectoryError):
        put_in_place(tmp_path / "new", tmp_path / "folder")
    for name in ("a", "link"):  # a file, and a link
        with pytest.raises(FileExistsError, match="it already exists"):
            put_in_place(tmp_path / "b", tmp_path / name, replaces=False)
    assert (tmp_path / "a").read_text() == "precious"


TENSORS = {
    "b.matrix": torch.randn(7, 5),
    "a.vector": torch.randn(3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "ids": torch.arange(4),
    'half \u00e9"': torch.randn(2, 3, 3).half(),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "turned": torch.randn(4, 6).t(),
}


def test_same_content_as_safetensors_own(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(TENSORS, ours)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, theirs, {"format": "pt"})
    torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=0, atol=0)
    with safe_open(ours, "pt") as mine, safe_open(theirs, "pt") as other:
        assert mine.metadata() == other.metadata()
    assert ours.stat().st_size == theirs.stat().st_size


def test_deferred_tensors_are_made_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 60)
    whole, asked = torch.randn(30, 5), list[int]()
    deferred = LazyTensor((30, 5), whole.dtype, lambda start, stop: asked.append(stop - start) or whole[start:stop])
    write_tensors({"whole": deferred, **dict(zip("abc", deferred.chunk(3)))}, tmp_path / "x")
    assert set(asked) == {3, 1}
    found = load_file(tmp_path / "x")
    assert torch.equal(found["whole"], whole)
    assert torch.equal(torch.cat([found[name] for name in "abc"]), whole)
