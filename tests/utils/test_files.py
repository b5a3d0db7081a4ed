"""Files are written whole or not at all."""

import errno
import fcntl
import os
import resource

import pytest

from ssm_backbones.utils.files import PARTIAL_NAME, atomic_file, locked, write_atomic


def test_a_file_takes_its_place_in_the_end_with_a_new_file_s_permissions(tmp_path) -> None:
    path = tmp_path / ('x' * 255)
    path.write_text('old')
    before = os.umask(0o027)
    try:
        with atomic_file(path) as partial:
            partial.write_text('new')
            assert partial.parent == tmp_path and PARTIAL_NAME.fullmatch(partial.name)
            assert path.read_text() == 'old'
    finally:
        os.umask(before)
    assert path.read_text() == 'new' and path.stat().st_mode & 0o777 == 0o640
    write_atomic(str(path), 'größer\n')
    assert path.read_bytes() == 'größer\n'.encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('failure', [ValueError, KeyboardInterrupt])
def test_what_failed_leaves_nothing_behind_and_what_was_there_alone(failure, tmp_path) -> None:
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(failure), atomic_file(path) as partial:
        partial.write_text('half')
        raise failure
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path) -> None:
    """Files end at ten bytes here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            write_atomic(tmp_path / 'file', 'more than ten bytes')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to_show_before_the_work_by_the_name_that_was_asked_for(tmp_path) -> None:
    (tmp_path / 'file').touch()
    for path, number in [(tmp_path / 'none' / 'x', errno.ENOENT), (tmp_path / 'file' / 'x', errno.ENOTDIR)]:
        with pytest.raises(OSError, match=f"'{path}'") as caught, atomic_file(path):
            pytest.fail('the block ran')
        assert caught.value.errno == number
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    for name, message in (('folder', 'Is a directory'), ('pipe', 'Is no regular file')):
        with pytest.raises(OSError, match=f"{message}: '.*/{name}'"), atomic_file(tmp_path / name):
            pytest.fail('the block ran')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder', 'pipe']


def test_links_are_followed(tmp_path) -> None:
    (tmp_path / 'target').mkdir()
    (tmp_path / 'link').symlink_to('target/file')
    for text in ('first', 'second'):
        write_atomic(tmp_path / 'link', text)
        assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target' / 'file').read_text() == text
    assert len(list(tmp_path.rglob('*'))) == 3


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with locked(tmp_path, 'training', 'work_dir'):
        pass
    assert 'cannot be locked' in caplog.text and 'no other training' in caplog.text
