"""Output that is computed in blocks and survives a kill."""

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
    """Write some blocks, and join them unless it dies; returns how many were there."""
    options = {"fingerprint": FINGERPRINT, "resume": False, "overwrite": False, **options}
    with contextlib.suppress(Killed), open_shards(paths, **options) as folder:
        before = first_missing(folder, 0, blocks, len(paths))
        for number in range(before, blocks):
            write_block(folder, number, paths, [f"{path.name} {number}\n" for path in paths])
        if dies:
            raise Killed
        join_blocks(folder, paths, blocks)
    return before


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_what_was_continued_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Two files at once; a block that only one of them has is written again."""
    whole, killed = ([tmp_path / folder / file for file in (name, "b.csv")] for folder in ("whole", "killed"))
    for paths in (whole, killed):
        paths[0].parent.mkdir()
    write(whole, 5)
    assert write(killed, 2, dies=True) == 0
    assert names(killed[0].parent) == [f".{name}.shards"]
    assert write(killed, 4, resume=True, dies=True) == 2
    (shards_of(killed[0]) / "1-00000003").unlink()
    assert write(killed, 5, resume=True) == 3
    assert names(killed[0].parent) == [name, "b.csv"]
    for one, other in zip(whole, killed):
        assert one.read_bytes() == other.read_bytes()
    text = whole[0].read_bytes()
    text = gzip.decompress(text) if name.endswith(".gz") else text
    assert text.decode().splitlines() == [f"{name} {number}" for number in range(5)]


def test_without_any_rows_a_gzip_file_is_whole(tmp_path: Path) -> None:
    write([tmp_path / "a.jsonl.gz"], 0)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b""


def test_several_processes_write_blocks_in_any_order(tmp_path: Path) -> None:
    """Each finds where its own share is to be continued."""
    path = tmp_path / "a.tsv"
    with open_shards([path], FINGERPRINT, False, False) as folder:
        for number in (4, 0, 5, 2, 1):
            write_block(folder, number, [path], [f"{number}\n"])
        shares = {(0, 3): 3, (2, 5): 3, (4, 6): 6, (6, 6): 6}
        assert {share: first_missing(folder, *share, 1) for share in shares} == shares
        write_block(folder, 3, [path], ["3\n"])
        join_blocks(folder, [path], 6)
    assert path.read_text() == "0\n1\n2\n3\n4\n5\n"
    assert names(tmp_path) == ["a.tsv"]


def test_what_was_begun_with_another_fingerprint_is_not_continued(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    write(paths[:1], 3, dies=True)
    before = names(shards_of(paths[0]))
    for outputs, fingerprint in ((paths[:1], {"model": "other"}), (paths, FINGERPRINT)):
        with pytest.raises(UserError, match="belong to another model, input"):
            write(outputs, 3, resume=True, fingerprint=fingerprint)
        assert names(shards_of(paths[0])) == before, "what is refused stays"
    assert write(paths[:1], 1) == 0, "without resume it begins again"
    assert paths[0].read_text() == "a.tsv 0\n"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path: Path, resume: bool) -> None:
    path = tmp_path / "a.tsv"
    with open_shards([path], FINGERPRINT, False, False) as folder:
        write_block(folder, 0, [path], ["one\n"])
        with pytest.raises(UserError, match=r"another process is writing .*a\.tsv; wait"):
            write([path], 1, resume=resume)
        write_block(folder, 1, [path], ["two\n"])
        join_blocks(folder, [path], 2)
    assert path.read_text() == "one\ntwo\n"
    assert names(tmp_path) == ["a.tsv"]


def test_a_folder_that_is_removed_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first process ends after a second one has opened the lock, and before that one has it."""
    path, lock = tmp_path / "a.tsv", shards.fcntl.flock

    def too_late(file: Any, kind: int) -> None:
        monkeypatch.undo()
        write([path], 2)
        lock(file, kind)

    monkeypatch.setattr(shards.fcntl, "flock", too_late)
    with pytest.raises(UserError, match="another process is writing"):
        write([path], 1)
    assert path.read_text() == "a.tsv 0\na.tsv 1\n"


def test_what_was_begun_shows_from_the_first_moment(tmp_path: Path) -> None:
    """Also of a process that was killed before its first block, beside a file that was to be replaced."""
    path = tmp_path / "a.tsv"
    path.write_text("of before\n")
    assert not is_begun(path)
    assert write([path], 0, overwrite=True, dies=True) == 0
    assert is_begun(path), "what is there must not pass for the result"
    assert write([path], 1, resume=True) == 0
    assert path.read_text() == "a.tsv 0\n"
    assert names(tmp_path) == ["a.tsv"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    with open_shards([path], FINGERPRINT, False, False) as folder:
        write_block(folder, 0, [path], ["ours\n"])
        path.write_text("precious")
        with pytest.raises(UserError, match=r"a\.tsv already exists; move it away"):
            join_blocks(folder, [path], 1)
    with pytest.raises(UserError, match=r"a\.tsv already exists; move it away"):
        write([path], 1, resume=True)
    assert path.read_text() == "precious"
    path.rename(tmp_path / "other")
    assert write([path], 1, resume=True) == 1
    assert path.read_text() == "ours\n"


def test_killed_between_two_names_it_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that has its name already is the run's own, so it may be replaced."""
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    write(paths, 1, dies=True)
    give_name = shards.atomic_file

    def dies(path: Path) -> Any:
        if path == paths[1]:
            raise Killed
        return give_name(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_file", dies)
        write(paths, 1, resume=True)
    assert [path.exists() for path in paths] == [True, False]
    assert write(paths, 1, resume=True) == 1
    assert [path.read_text() for path in paths] == ["a.tsv 0\n", "b.csv 0\n"]
    assert names(tmp_path) == ["a.tsv", "b.csv"]


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_others_have_made_stays(tmp_path: Path, what: str) -> None:
    """Whatever has the folder's name without our mark, also if a link leads to a folder that has it."""
    path, folder = tmp_path / "a.tsv", shards_of(tmp_path / "a.tsv")
    precious = folder
    if what == "link":
        write([tmp_path / "b.tsv"], 1, dies=True)
        folder.symlink_to(shards_of(tmp_path / "b.tsv"))
        precious = folder / "0-00000000"
    elif what == "folder":
        folder.mkdir()
        precious = folder / "0-00000000"
        precious.write_text("precious")
    else:
        precious.write_text("precious")
    before = precious.read_text()
    (tmp_path / "a.tsv.part-0").write_text("also precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"\.a\.tsv\.shards already exists and is not ours"):
            write([path], 1, overwrite=overwrite)
    assert precious.read_text() == before
    folder.rename(tmp_path / "elsewhere")
    write([path], 1)
    assert (tmp_path / "a.tsv.part-0").read_text() == "also precious"


def test_other_files_among_the_shards_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    write([path], 2, dies=True)
    (shards_of(path) / "notes.txt").write_text("precious")
    write([path], 1)
    assert path.read_text() == "a.tsv 0\n"
    assert (shards_of(path) / "notes.txt").read_text() == "precious"


def test_nothing_is_left_without_blocks(tmp_path: Path) -> None:
    """A folder that a killed process had only just made is no obstacle."""
    shards_of(tmp_path / "a.tsv").mkdir()
    write([tmp_path / "a.tsv"], 0, dies=True)
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="cannot write .*: No such file"):
        write([tmp_path / "b" / "a.tsv"], 1)
