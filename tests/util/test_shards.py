"""Output that grows by blocks and survives a kill."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import Any

import pytest

from sst2_xlmr.util import shards
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.shards import is_begun, join_parts, open_parts, part_of, state_of

RECIPE = {"model": "m", "options": [1, 2]}


@pytest.fixture(autouse=True)
def _every_block_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_NOTES", 0.0)


class Killed(BaseException):
    pass


def write(
    paths: list[Path], blocks: range, resume: bool, dies: bool = False, recipe: Any = RECIPE, rank: int = 0
) -> int:
    """Write some blocks; returns how many were there. A process that dies has written half a block more."""
    try:
        with open_parts(paths, recipe, rank, resume) as parts:
            before = parts.blocks
            for number in blocks[before:]:
                parts.append([f"{path.name} {number}\n" for path in paths])
            if dies:
                raise Killed
            parts.note()
    except Killed:
        for path in paths:
            with part_of(path, rank).open("ab") as file:
                file.write(b"half a ro")
    return before


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_what_was_continued_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Two files at once; what was written after the last note is cut off."""
    whole, killed = ([tmp_path / folder / file for file in (name, "b.csv")] for folder in ("whole", "killed"))
    for paths in (whole, killed):
        paths[0].parent.mkdir()
    write(whole, range(5), resume=False)
    assert write(killed, range(2), resume=False, dies=True) == 0
    assert write(killed, range(4), resume=True, dies=True) == 2
    assert write(killed, range(5), resume=True) == 4
    for paths in (whole, killed):
        join_parts(paths, 1)
        assert sorted(file.name for file in paths[0].parent.iterdir()) == [name, "b.csv"]
    for one, other in zip(whole, killed):
        assert one.read_bytes() == other.read_bytes()
    text = whole[0].read_bytes()
    text = gzip.decompress(text) if name.endswith(".gz") else text
    assert text.decode().splitlines() == [f"{name} {number}" for number in range(5)]


def test_without_any_rows_a_gzip_file_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    write([file], range(0), resume=False)
    join_parts([file], 1)
    assert gzip.decompress(file.read_bytes()) == b""


def test_parts_of_several_processes_are_joined_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for rank in (1, 0, 2):
        write([path], range(rank * 2, rank * 2 + 2), resume=False, rank=rank)
    join_parts([path], 3)
    assert path.read_text().splitlines() == [f"a.tsv {number}" for number in range(6)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tsv"]


def test_a_process_without_rows_has_an_empty_part(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for rank in range(3):
        write([path], range(2 if rank == 2 else 0), resume=False, rank=rank)
    join_parts([path], 3)
    assert path.read_text().splitlines() == ["a.tsv 0", "a.tsv 1"]


def test_what_more_processes_have_left_is_removed(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    for rank in range(3):
        write(paths, range(2), resume=False, dies=True, rank=rank)
    write(paths, range(2), resume=False)
    join_parts(paths, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tsv", "b.csv"]


def test_another_output_is_not_begun_in_the_middle(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    write(paths[:1], range(2), resume=False, dies=True)
    with pytest.raises(UserError, match="was begun with another"):
        write(paths, range(3), resume=True)


def test_another_recipe_is_refused_and_without_resume_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    write([path], range(3), resume=False, dies=True)
    with pytest.raises(UserError, match="part-0 was begun with another model, input"):
        write([path], range(3), resume=True, recipe={"model": "other"})
    assert state_of(part_of(path, 0)).is_file(), "what is refused stays"
    assert write([path], range(1), resume=False) == 0
    join_parts([path], 1)
    assert path.read_text() == "a.tsv 0\n"


@pytest.mark.parametrize("damage", ["state", "part"])
def test_what_is_lost_or_damaged_is_written_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tsv"
    write([path], range(3), resume=False, dies=True)
    if damage == "state":
        state_of(part_of(path, 0)).write_text('{"blocks": 3')
    else:
        part_of(path, 0).write_bytes(b"short")
    assert write([path], range(3), resume=True) == 0
    join_parts([path], 1)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path: Path, resume: bool) -> None:
    """With the same output, or one that shares a file with it; the first one's rows stay."""
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    with open_parts(paths, RECIPE, 0, False) as parts:
        parts.append(["one\n", "eins\n"])
        for others in (paths, paths[1:]):
            with pytest.raises(UserError, match="another process is writing .*part-0; wait"):
                write(others, range(1), resume)
        parts.append(["two\n", "zwei\n"])
        parts.note()
        join_parts(paths, 1)
    assert [path.read_text() for path in paths] == ["one\ntwo\n", "eins\nzwei\n"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tsv", "b.csv"]


def test_a_part_that_gets_its_final_name_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process has opened the part of a first one, which ends before the second one locks it."""
    path = tmp_path / "a.tsv"
    write([path], range(2), resume=False)
    lock = shards.fcntl.flock

    def too_late(file: Any, kind: int) -> None:
        join_parts([path], 1)
        lock(file, kind)

    monkeypatch.setattr(shards.fcntl, "flock", too_late)
    with pytest.raises(UserError, match="another process is writing"):
        write([path], range(1), resume=False)
    assert path.read_text() == "a.tsv 0\na.tsv 1\n"


def test_what_was_begun_shows_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a process that was killed before its first block, beside a file that was to be replaced."""
    path = tmp_path / "a.tsv"
    path.write_text("of before\n")
    assert not is_begun(path)
    with open_parts([path], RECIPE, 1, False):
        assert is_begun(path)
    assert is_begun(path), "what is there must not pass for the result"
    with pytest.raises(UserError, match="was begun with another model, input"):
        write([path], range(1), resume=True, recipe={"model": "other"}, rank=1)
    assert write([path], range(1), resume=True) == 0
    join_parts([path], 1)
    assert path.read_text() == "a.tsv 0\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.tsv"]


def test_files_that_only_look_like_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    mine = {f"a.tsv.part-{end}" for end in ("aa", "0.gz", "1.json.bak", "x.json", "")} | {"aa.tsv.part-0"}
    for name in mine:
        (tmp_path / name).touch()
    assert not is_begun(path)
    for name in ("a.tsv.part-7", "a.tsv.part-7.json.tmp"):
        (tmp_path / name).touch()
    write([path], range(1), resume=False)
    join_parts([path], 1)
    assert {file.name for file in tmp_path.iterdir()} == mine | {"a.tsv"}


def test_nothing_is_left_if_nothing_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_NOTES", 1e9)
    with contextlib.suppress(Killed), open_parts([tmp_path / "a.tsv"], RECIPE, 0, False) as parts:
        parts.append(["x"])
        raise Killed
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot write .*: No such file"):
        write([tmp_path / "b" / "a.tsv"], range(1), resume=False)
