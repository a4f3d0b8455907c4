"""Results in blocks that survive a kill."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from sst2_xlmr.util import shards
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.shards import open_shards, remove_shards, shards_of, write_block

FINGERPRINT = {"model": "m", "options": [1, 2]}


class Killed(BaseException):
    pass


def write(output: Path, blocks: int, dies: bool = False, fingerprint: Any = FINGERPRINT, resume: bool = False) -> int:
    """Write the blocks that are missing, and the output unless it dies; returns the first block's number."""
    with contextlib.suppress(Killed), open_shards(output, fingerprint, resume) as folder:
        first = shards.first_missing(folder, 0, blocks)
        for number in range(first, blocks):
            write_block(folder, number, [["é", number / 3]])
        if dies:
            raise Killed
        output.write_text(str([shards.read_block(folder, number) for number in range(blocks)]))
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
def test_a_second_command_is_refused_while_the_first_one_writes(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it finds the first one's lock, which is removed before it can have it."""
    output, flock = tmp_path / "a.tsv", shards.fcntl.flock
    with open_shards(output, FINGERPRINT, resume=False) as folder:
        write_block(folder, 0, [])
        with pytest.raises(UserError, match=r"another process is writing .*a\.tsv; wait"):
            write(output, 2, resume=resume)
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
    assert shards.is_begun(output)
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
