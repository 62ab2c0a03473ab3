"""Files that are written."""

import stat
from pathlib import Path

import pytest

from placement.output import OutputError, check_writable, replacing


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    check_writable(link)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert set(tmp_path.iterdir()) == {link, target}


def test_a_block_that_fails_leaves_what_was_there_and_its_own_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path) as partial:
        partial.write_bytes((tmp_path / "missing").read_bytes())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_and_devices_are_refused(tmp_path):
    for path, what in ((tmp_path, "a folder"), (Path("/dev/null"), "no regular file")):
        with pytest.raises(OutputError, match=f"cannot be written, it is {what}; name a file"):
            check_writable(path)
        with pytest.raises(OutputError, match=what), replacing(path):
            pass


def test_what_is_read_is_not_written_over(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OutputError, match="it is read here, and would be overwritten"):
        check_writable(tmp_path / "." / "file", inputs=[None, path])
    assert path.read_text() == "old"
