"""Files that are whole or absent; tensors in them as safetensors writes them; results in blocks that survive a kill."""

import contextlib
import gzip
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch, file_size_limit, refusal
from safetensors.torch import load_file

from sst2_xlmr.util import shards
from sst2_xlmr.util import tensors as tensor_files
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import new_file, put_in_place, scratch_name, write_errors, write_text
from sst2_xlmr.util.shards import open_shards, remove_shards, shard_file, shards_of
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
        assert f"cannot write {tmp_path / name}: File too large; free some space" in refusal(write, None)
        assert "row 3 is wrong" in refusal(write, UserError("row 3 is wrong"))
        with pytest.raises(OSError, match="File too large"):
            write_text(tmp_path / name, content)
    unfinished = scratch_name(tmp_path / "model")
    for error, expected in ((OSError(28, "No space left on device"), "free some space"), (UserError("row 3"), "row 3")):
        unfinished.mkdir()
        with pytest.raises(UserError, match=expected), write_errors("the model", unfinished):
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
        with pytest.raises(UserError, match="it already exists; choose another place"), write_errors(name):
            put_in_place(tmp_path / "b", tmp_path / name, replaces=False)
    assert (tmp_path / "a").read_text() == "precious"


def test_deferred_tensors_are_made_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 60)
    whole, asked = torch.randn(30, 5), list[int]()

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return whole[start:stop]

    deferred = LazyTensor((30, 5), whole.dtype, rows)
    write_tensors({"whole": deferred, **dict(zip("abc", deferred.chunk(3)))}, tmp_path / "x")
    assert set(asked) == {3, 1}
    found = load_file(tmp_path / "x")
    assert torch.equal(found["whole"], whole)
    assert torch.equal(torch.cat([found[name] for name in "abc"]), whole)


FINGERPRINT = {"model": "m", "options": [1, 2]}


class Killed(BaseException):
    pass


def write(output: Path, blocks: int, dies: bool = False, fingerprint: Any = FINGERPRINT, resume: bool = False) -> int:
    """Write the blocks that are missing, and the output unless it dies; returns the first block's number."""
    with contextlib.suppress(Killed), open_shards(output, fingerprint, resume) as folder:
        first = next((number for number in range(blocks) if not shard_file(folder, number).is_file()), blocks)
        for number in range(first, blocks):
            write_text(shard_file(folder, number), json.dumps([["é", number / 3]]))
        if dies:
            raise Killed
        output.write_text(str([json.loads(shard_file(folder, number).read_text()) for number in range(blocks)]))
        remove_shards(folder)
    return first


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_continued_is_the_same(tmp_path: Path) -> None:
    """A block that was lost, and those after it, are written again; what was begun with another fingerprint stays."""
    output = tmp_path / "a.tsv"
    folder = shards_of(output)
    assert write(output, 2, dies=True) == 0
    assert names(tmp_path) == [folder.name]
    (folder / f".00000002.json.{'0' * 16}.new.sst2_xlmr").write_text("half a ro")
    assert write(output, 4, dies=True, resume=True) == 2
    before = names(folder)
    assert "belong to another model, input" in refusal(write, output, 3, resume=True, fingerprint={"model": "other"})
    assert names(folder) == before
    (folder / "00000001.json").unlink()
    assert write(output, 5, resume=True) == 1
    assert names(tmp_path) == ["a.tsv"]
    assert output.read_text() == str([[["é", number / 3]] for number in range(5)])
    output.unlink()
    write(output, 3, dies=True)
    assert write(output, 1, fingerprint={"model": "other"}) == 0, "without resume it begins again"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_command_is_refused_while_the_first_writes(tmp_path: Path, resume: bool, monkeypatch: Patch) -> None:
    """Also if it finds the first one's lock, which is removed before it can have it."""
    output, flock = tmp_path / "a.tsv", shards.fcntl.flock
    with open_shards(output, FINGERPRINT, resume=False) as folder:
        write_text(shard_file(folder, 0), "[]")
        assert f"another process is writing {output}; wait" in refusal(write, output, 2, resume=resume)
        remove_shards(folder)

    def too_late(file: Any, kind: int) -> None:
        monkeypatch.undo()
        write(output, 2)
        flock(file, kind)

    monkeypatch.setattr(shards.fcntl, "flock", too_late)
    assert "another process is writing" in refusal(write, output, 1, resume=resume)
    assert names(tmp_path) == ["a.tsv"]


def test_what_is_there_does_not_pass_for_the_result_of_a_killed_run(tmp_path: Path) -> None:
    """From the first moment, beside a file that was to be replaced; without such a file nothing is left."""
    output = tmp_path / "a.tsv"
    write(output, 0, dies=True)
    assert names(tmp_path) == []
    output.write_text("of before\n")
    write(output, 0, dies=True)
    assert shards.has_shards(output)
    assert write(output, 1, resume=True) == 0
    assert names(tmp_path) == ["a.tsv"]


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_others_have_made_stays(tmp_path: Path, kind: str) -> None:
    output, place, other = tmp_path / "a.tsv", shards_of(tmp_path / "a.tsv"), tmp_path / "other"
    if kind == "file":
        place.write_text("precious")
    elif kind == "link":
        write(tmp_path / "b.tsv", 1, dies=True)
        place.symlink_to(shards_of(tmp_path / "b.tsv").rename(other))
    else:
        place.mkdir()
        (place / "00000000.json").write_text("precious")
    before = sorted(tmp_path.rglob("*")), sorted(other.glob("*"))
    for resume in (False, True):
        assert ".a.tsv.shards already exists and is not ours; move it away" in refusal(write, output, 1, resume=resume)
    assert before == (sorted(tmp_path.rglob("*")), sorted(other.glob("*")))


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "a.tsv"
    shards_of(output).mkdir()
    (shards_of(output) / "fingerprint.json").touch()
    write(output, 1)
    assert names(tmp_path) == ["a.tsv"]
    write(output, 1, dies=True)
    (shards_of(output) / "notes").write_text("precious")
    write(output, 1, resume=True)
    assert names(shards_of(output)) == ["notes"]

    assert re.search("cannot write .*: No such file", refusal(write, tmp_path / "b" / "a.tsv", 1))
