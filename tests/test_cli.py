"""What the scripts share: a run that could not write its result says so before any work."""

import re

import pytest

from mnist_ddpm.cli import check_writable


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    new, old = tmp_path / "folder" / "new.json", tmp_path / "old.json"
    old.write_text("kept", encoding="utf-8")
    for path in (new, old):
        check_writable(path)
    assert not list(new.parent.iterdir())
    assert old.read_text(encoding="utf-8") == "kept"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            check_writable(path)
