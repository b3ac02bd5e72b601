"""Files and folders appear whole or not at all, and what was there stays until they do."""

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.files import digest, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(target: Path, content: str, staging: Path | None = None) -> None:
    with whole_folder(target, staging) as folder:
        (folder / "file").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / content).write_text("")


# --- digest -----------------------------------------------------------------------------------------------------


def test_text_and_its_bytes_have_the_same_digest() -> None:
    assert digest("é") == digest("é".encode())


@settings(deadline=None)
@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_other_parts_have_another_digest(a: list[bytes], b: list[bytes]) -> None:
    assert (digest(*a) == digest(*b)) == (a == b)


def test_where_a_part_ends_matters() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", ""), digest("", "abc")}) == 5


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["text é\n", b"\x00\xff", ""])
def test_a_file_is_written_with_the_folders_it_needs(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old and longer")
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_server_of_another_user_can_read_what_was_written(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "file", "x")
        fill(tmp_path / "folder", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failure_leaves_the_old_file_and_no_litter(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_interrupt_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_whole(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = ["a" * 100_000, "b" * 200_000]
    write_whole(path, contents[0])
    done = threading.Event()

    def keep_writing() -> None:
        for turn in range(50):
            write_whole(path, contents[turn % 2])
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_text())
    writer.join()
    assert seen <= set(contents)


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "folder"
    with whole_folder(target) as growing:
        assert names(growing) == []
        (growing / "file").write_text("x")
        assert not target.exists()
    assert names(target) == ["file"]
    assert names(target.parent) == ["folder"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with whole_folder(tmp_path / "folder") as growing:
        (growing / "other").write_text("new")
    assert names(tmp_path / "folder") == ["other"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder_and_no_litter(error: type[BaseException], tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")

    def grow_halfway(target: Path) -> None:
        with whole_folder(target) as growing:
            (growing / "file").write_text("half")
            raise error

    with pytest.raises(error):
        grow_halfway(tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "old"
    with pytest.raises(error):
        grow_halfway(tmp_path / "new")
    assert names(tmp_path) == ["folder"]


def test_a_last_step_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", "old")
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if target == tmp_path / "folder" and ".old." not in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_may_grow_elsewhere(tmp_path: Path) -> None:
    fill(tmp_path / "home" / "folder", "old")
    with whole_folder(tmp_path / "home" / "folder", staging=tmp_path / "staging") as growing:
        assert growing.parent == tmp_path / "staging"
        assert names(tmp_path / "home") == ["folder"]
    assert names(tmp_path / "home" / "folder") == []
    assert names(tmp_path / "staging") == []


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError):
        fill(tmp_path / "notes", "x")
    assert (tmp_path / "notes").read_text() == "mine"
    assert names(tmp_path) == ["notes"]
