"""Files that are whole or absent, under hidden names until they are finished."""

from __future__ import annotations

import gzip
import os
import stat
from pathlib import Path

import pytest
from conftest import file_size_limit

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import disk_errors, new_file, put_in_place, scratch_name, write_text


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
        with pytest.raises(UserError, match="row 3 is wrong"):
            write(UserError("row 3 is wrong"))
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
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("precious")
    for link, name in (("x", "a"), ("y.gz", "b"), ("x.tmp", "c")):
        (tmp_path / link).symlink_to(tmp_path / name)
    write_text(tmp_path / "x", "new")
    with new_file(tmp_path / "y.gz") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == gzip.decompress((tmp_path / "y.gz").read_bytes()).decode() == "new"
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c")] == ["precious"] * 3
    assert (tmp_path / "x.tmp").is_symlink()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "new").mkdir()
    with pytest.raises(NotADirectoryError):
        put_in_place(tmp_path / "new", tmp_path / "folder")
    for name in ("a", "x.tmp"):  # a file, and a link
        with pytest.raises(FileExistsError, match="it already exists"):
            put_in_place(tmp_path / "b", tmp_path / name, replaces=False)
    assert (tmp_path / "a").read_text() == "precious"
