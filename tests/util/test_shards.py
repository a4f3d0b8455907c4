"""Output that grows by blocks and survives a kill."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import Any

import pytest

from sst2_xlmr.util import shards
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.shards import open_shards, shard_of, shards_of, state_of

FINGERPRINT = {"model": "m", "options": [1, 2]}


@pytest.fixture(autouse=True)
def _every_block_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_NOTES", 0.0)


class Killed(BaseException):
    pass


def write(paths: list[Path], blocks: range, dies: bool = False, ranks: int = 0, **options: Any) -> int:
    """Write some blocks; returns how many were there. A process that dies has written half a block more.

    Args:
        ranks: to finish the files of, as rank 0.
        options: of `open_shards`.
    """
    options = {"fingerprint": FINGERPRINT, **options}
    try:
        with open_shards(paths, **options) as opened:
            before = opened.blocks
            for number in blocks[before:]:
                opened.append([f"{path.name} {number}\n" for path in paths])
            if dies:
                raise Killed
            opened.note()
            if ranks:
                opened.finish(ranks)
    except Killed:
        for path in paths:
            with shard_of(path, options.get("rank", 0)).open("ab") as file:
                file.write(b"half a ro")
    return before


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_what_was_continued_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Two files at once; what was written after the last note, of rows and of state, is cut off."""
    whole, killed = ([tmp_path / folder / file for file in (name, "b.csv")] for folder in ("whole", "killed"))
    for paths in (whole, killed):
        paths[0].parent.mkdir()
    write(whole, range(5), ranks=1)
    assert write(killed, range(2), dies=True) == 0
    assert all(file.startswith(".") for file in names(killed[0].parent))
    assert write(killed, range(4), resume=True, dies=True) == 2
    with state_of(shard_of(killed[0], 0)).open("a") as state:
        state.write('{"blocks": 4, "by')
    assert write(killed, range(5), resume=True, ranks=1) == 4
    assert names(killed[0].parent) == [name, "b.csv"]
    for one, other in zip(whole, killed):
        assert one.read_bytes() == other.read_bytes()
    text = whole[0].read_bytes()
    text = gzip.decompress(text) if name.endswith(".gz") else text
    assert text.decode().splitlines() == [f"{name} {number}" for number in range(5)]


def test_without_any_rows_a_gzip_file_is_whole(tmp_path: Path) -> None:
    write([tmp_path / "a.jsonl.gz"], range(0), ranks=1)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b""


def test_shards_of_several_processes_are_joined_in_their_order(tmp_path: Path) -> None:
    """Rank 1 has no rows. What is left of a run of more processes goes as well."""
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    for rank in (4, 2, 1):
        write(paths, range(0 if rank == 1 else 2), rank=rank, dies=rank == 4)
    write(paths, range(1), ranks=3)
    assert paths[0].read_text() == "a.tsv 0\na.tsv 0\na.tsv 1\n"
    assert names(tmp_path) == ["a.tsv", "b.csv"]


def test_what_was_begun_with_another_fingerprint_is_not_continued(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    write(paths[:1], range(3), dies=True)
    for outputs, fingerprint in ((paths[:1], {"model": "other"}), (paths, FINGERPRINT)):
        with pytest.raises(UserError, match="belong to another model, input"):
            write(outputs, range(3), resume=True, fingerprint=fingerprint)
        assert names(tmp_path) == [".a.tsv.shard-0", ".a.tsv.shard-0.state"], "what is refused stays"
    assert write(paths[:1], range(1), ranks=1) == 0, "without resume it begins again"
    assert paths[0].read_text() == "a.tsv 0\n"


@pytest.mark.parametrize("damage", ["state", "shard"])
def test_what_is_lost_or_damaged_is_written_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tsv"
    write([path], range(3), dies=True)
    if damage == "state":
        state = state_of(shard_of(path, 0))
        state.write_bytes(state.read_bytes().splitlines(keepends=True)[0] + b"\0\0\0\n")
    else:
        shard_of(path, 0).write_bytes(b"short")
    assert write([path], range(3), resume=True, ranks=1) == 0
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path: Path, resume: bool) -> None:
    """With the same output, or one that shares a file with it; the first one's rows stay."""
    paths = [tmp_path / "a.tsv", tmp_path / "b.csv"]
    with open_shards(paths, FINGERPRINT) as opened:
        opened.append(["one\n", "eins\n"])
        for others in (paths, paths[1:], [tmp_path / "c.csv", paths[1]]):
            with pytest.raises(UserError, match="another process is writing .*; wait"):
                write(others, range(1), resume=resume)
        opened.append(["two\n", "zwei\n"])
        opened.note()
        opened.finish(1)
    assert [path.read_text() for path in paths] == ["one\ntwo\n", "eins\nzwei\n"]
    assert names(tmp_path) == ["a.tsv", "b.csv"]


def test_a_shard_that_gets_its_final_name_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process has opened the state of a first one, which ends before the second one locks it."""
    path = tmp_path / "a.tsv"
    lock = shards.fcntl.flock

    def too_late(file: Any, kind: int) -> None:
        monkeypatch.undo()
        write([path], range(2), ranks=1)
        lock(file, kind)

    monkeypatch.setattr(shards.fcntl, "flock", too_late)
    with pytest.raises(UserError, match="another process is writing"):
        write([path], range(1))
    assert path.read_text() == "a.tsv 0\na.tsv 1\n"


def test_what_was_begun_shows_from_the_first_moment(tmp_path: Path) -> None:
    """Also of a process that was killed before its first block, beside a file that was to be replaced."""
    path = tmp_path / "a.tsv"
    path.write_text("of before\n")
    assert not shards_of(path)
    with open_shards([path], FINGERPRINT, overwrite=True):
        assert shards_of(path)
    assert shards_of(path), "what is there must not pass for the result"
    assert write([path], range(1), resume=True, ranks=1) == 0
    assert path.read_text() == "a.tsv 0\n"
    assert names(tmp_path) == ["a.tsv"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    with open_shards([path], 1) as opened:
        opened.append(["ours\n"])
        path.write_text("precious")
        with pytest.raises(UserError, match=r"a\.tsv already exists; move it away"):
            opened.finish(1)
    with pytest.raises(UserError, match=r"a\.tsv already exists; move it away"):
        write([path], range(1), resume=True, fingerprint=1)
    assert path.read_text() == "precious"
    path.rename(tmp_path / "other")
    assert write([path], range(1), resume=True, fingerprint=1, ranks=1) == 1
    assert path.read_text() == "ours\n"


@pytest.mark.parametrize("between", [0, 1])
def test_killed_between_two_names_it_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: int) -> None:
    """The file that has its name already is the run's own, so it may be replaced."""
    paths, done = [tmp_path / "a.tsv", tmp_path / "b.csv"], []

    def sync(folder: Path) -> None:
        done.append(folder)
        if len(done) > between:
            raise Killed

    monkeypatch.setattr(shards, "sync_folder", sync)
    with contextlib.suppress(Killed), open_shards(paths, FINGERPRINT) as opened:
        opened.append(["a.tsv 0\n", "b.csv 0\n"])
        opened.finish(1)
    monkeypatch.undo()
    assert paths[0].exists()
    write(paths, range(1), resume=True, ranks=1)
    assert [path.read_text() for path in paths] == ["a.tsv 0\n", "b.csv 0\n"]
    assert names(tmp_path) == ["a.tsv", "b.csv"]


@pytest.mark.parametrize("end", ["shard-0", "shard-0.state"])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_others_have_made_stays(tmp_path: Path, end: str, is_link: bool) -> None:
    """Files that have a shard's or its state's name without our mark, or that a link of that name leads to."""
    path, precious = tmp_path / "a.tsv", tmp_path / ("precious" if is_link else f".a.tsv.{end}")
    precious.write_text("precious")
    if is_link:
        (tmp_path / f".a.tsv.{end}").symlink_to(precious)
    (tmp_path / ".a.tsv.shard-7").write_text("also precious")
    (tmp_path / ".a.tsv.shard-7.state").write_text('{"shard": ".b.tsv.shard-7"}\n')
    (tmp_path / "a.tsv.part-0").write_text("also precious")
    before = names(tmp_path)
    assert not shards_of(path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"\.a\.tsv\.shard-0.* already exists and is not a shard of ours"):
            write([path], range(1), overwrite=overwrite)
    assert names(tmp_path) == before
    (tmp_path / f".a.tsv.{end}").unlink()
    write([path], range(1), ranks=1)
    assert set(names(tmp_path)) == {*before, "a.tsv"} - {f".a.tsv.{end}"}
    assert not is_link or precious.read_text() == "precious"


def test_nothing_is_left_if_nothing_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_NOTES", 1e9)
    with contextlib.suppress(Killed), open_shards([tmp_path / "a.tsv"], FINGERPRINT) as opened:
        opened.append(["x"])
        raise Killed
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="cannot write .*: No such file"):
        write([tmp_path / "b" / "a.tsv"], range(1))
