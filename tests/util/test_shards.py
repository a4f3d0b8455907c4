"""Output in blocks that survives a kill."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import Any

import pytest

from sst2_xlmr.util import shards
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.shards import first_missing, is_begun, join_blocks, open_shards, shards_of, write_block

FINGERPRINT = {"model": "m", "options": [1, 2]}


class Killed(BaseException):
    pass


def write(paths: list[Path], blocks: int, dies: bool = False, **options: Any) -> int:
    """Write the blocks that are missing, and the outputs unless it dies; returns the first block's number."""
    options = {"fingerprint": FINGERPRINT, "resume": False, **options}
    with contextlib.suppress(Killed), open_shards(paths, **options) as at:
        first = first_missing(at, 0, blocks, len(paths))
        for number in range(first, blocks):
            write_block(at, number, paths, [f"{path.name} {number}\n" for path in paths])
        if dies:
            raise Killed
        join_blocks(at, paths, blocks)
    return first


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_what_was_continued_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Two files at once; of a block that only one has, of a lost one, and of those after it, all are written again."""
    whole, killed = ([tmp_path / folder / file for file in (name, "b.csv")] for folder in ("whole", "killed"))
    for paths in (whole, killed):
        paths[0].parent.mkdir()
    write(whole, 5)
    assert write(killed, 2, dies=True) == 0
    folder = shards_of(killed[0])
    assert names(killed[0].parent) == [folder.name]
    (folder / "0-00000002").write_bytes(b"half a ro")
    assert write(killed, 4, dies=True, resume=True) == 2
    (folder / "1-00000001").unlink()
    (folder / f".0-00000004.{'0' * 16}.new.sst2_xlmr").write_text("half a ro")
    assert write(killed, 5, resume=True) == 1
    assert names(killed[0].parent) == [name, "b.csv"]
    assert [path.read_bytes() for path in killed] == [path.read_bytes() for path in whole]
    text = whole[0].read_bytes()
    text = gzip.decompress(text) if name.endswith(".gz") else text
    assert text.decode().splitlines() == [f"{name} {number}" for number in range(5)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_command_is_refused_while_the_first_one_writes(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it finds the first one's lock, which is removed before it can have it."""
    path, flock = tmp_path / "a.tsv", shards.fcntl.flock
    with open_shards([path], FINGERPRINT, resume=False) as folder:
        write_block(folder, 0, [path], ["one\n"])
        with pytest.raises(UserError, match=r"another process is writing .*a\.tsv; wait"):
            write([path], 2, resume=resume)
        join_blocks(folder, [path], 1)

    def too_late(file: Any, kind: int) -> None:
        monkeypatch.undo()
        write([path], 2, overwrite=True)
        flock(file, kind)

    monkeypatch.setattr(shards.fcntl, "flock", too_late)
    with pytest.raises(UserError, match="another process is writing"):
        write([path], 1, resume=resume, overwrite=True)
    assert path.read_text() == "a.tsv 0\na.tsv 1\n"
    assert names(tmp_path) == ["a.tsv"]


def test_what_is_there_does_not_pass_for_the_result_of_a_killed_run(tmp_path: Path) -> None:
    """From the first moment, beside a file that was to be replaced; without such a file nothing is left."""
    path = tmp_path / "a.tsv"
    assert write([path], 0, dies=True) == 0
    assert names(tmp_path) == []
    path.write_text("of before\n")
    write([path], 0, dies=True, overwrite=True)
    assert is_begun(path)
    assert write([path], 1, resume=True) == 0
    assert path.read_text() == "a.tsv 0\n"
    assert names(tmp_path) == ["a.tsv"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    write([path], 1, dies=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=r"a\.tsv already exists; move it away"):
        write([path], 1, resume=True)
    assert path.read_text() == "precious"
    path.unlink()
    assert write([path], 1, resume=True) == 1
    assert path.read_text() == "a.tsv 0\n"


@pytest.mark.parametrize("named", [0, 1, 2])
def test_killed_while_it_gives_names_it_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: int) -> None:
    """The files that have their names already are the run's own, so they may be replaced."""
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    atomic_file, remove = shards.atomic_file, shards._remove

    def dies_at(path: Path) -> Any:
        if path == paths[named]:
            raise Killed
        return atomic_file(path)

    def dies(_: Path) -> None:
        raise Killed

    monkeypatch.setattr(*((shards, "_remove", dies) if named == 2 else (shards, "atomic_file", dies_at)))
    write(paths, 1)
    assert names(tmp_path) == [".a.tsv.shards", "a.tsv", "b.csv"][: named + 1]
    monkeypatch.setattr(shards, "atomic_file", atomic_file)
    monkeypatch.setattr(shards, "_remove", remove)
    assert write(paths, 1, resume=True) == 1
    assert [path.read_text() for path in paths] == ["a.tsv 0\n", "b.csv 0\n"]
    assert names(tmp_path) == ["a.tsv", "b.csv"]


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_others_have_made_stays(tmp_path: Path, kind: str) -> None:
    """What has the blocks' place without our fingerprint, or is where a link of that name leads."""
    path, place, other = tmp_path / "a.tsv", shards_of(tmp_path / "a.tsv"), tmp_path / "other"
    if kind == "file":
        place.write_text("precious")
    elif kind == "link":
        write([tmp_path / "b.tsv"], 1, dies=True)
        place.symlink_to(shards_of(tmp_path / "b.tsv").rename(other))
    else:
        place.mkdir()
        (place / "0-00000000").write_text("precious")
    before = sorted(tmp_path.rglob("*")), sorted(other.glob("*"))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"\.a\.tsv\.shards already exists and is not ours; move it away"):
            write([path], 1, resume=resume)
    assert before == (sorted(tmp_path.rglob("*")), sorted(other.glob("*")))


def test_what_is_not_ours_in_the_folder_stays(tmp_path: Path) -> None:
    write([tmp_path / "a.tsv"], 1, dies=True)
    (shards_of(tmp_path / "a.tsv") / "notes").write_text("precious")
    write([tmp_path / "a.tsv"], 1, resume=True)
    assert names(shards_of(tmp_path / "a.tsv")) == ["notes"]
