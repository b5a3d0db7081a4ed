"""Weights by name and by URL, from a server on this machine: stored once, whole or not at all."""

import hashlib
import http.server
import re
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from ssm_backbones import VMamba, create_backbone, list_backbones, load_official
from ssm_backbones.backbones import Mamba2D
from ssm_backbones.checkpoints import CheckpointError, read_checkpoint
from ssm_backbones.checkpoints.download import cache_path, download
from ssm_backbones.checkpoints.published import CLASSIFIERS
from tests.checkpoints.small import classifier
from tests.configs.recipes import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder on this machine; yields the folder, the address and the list of what was asked for."""
    folder, asked = tmp_path / 'served', []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def copyfile(self, source, outputfile):
            # What is called so breaks off half-way.
            content = source.read()
            outputfile.write(content[: len(content) // 2] if 'broken' in self.path else content)

        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{running.server_port}', asked
        running.shutdown()
        thread.join()


def test_urls_are_downloaded_once(server):
    folder, address, asked = server
    (folder / '#v2cls').mkdir()
    torch.save({'model': classifier()}, folder / '#v2cls' / 'tiny.pth')
    url = f'{address}/%23v2cls/tiny.pth'
    for _ in range(2):
        assert load_official(VMamba('test'), url).source == url
    assert asked == ['/%23v2cls/tiny.pth']
    with pytest.raises(CheckpointError, match='write a # in a name as %23'):
        read_checkpoint(f'{address}/#v2cls/tiny.pth')
    with pytest.raises(CheckpointError, match='names no file'):
        read_checkpoint(f'{address}/')


def test_what_was_downloaded_in_vain_is_downloaded_again(server):
    folder, address, asked = server
    page = folder / 'tiny.pth'
    page.write_text('<!DOCTYPE html><html>Log in</html>')
    with pytest.raises(CheckpointError, match=f'{address}/tiny.pth is a web page'):
        read_checkpoint(f'{address}/tiny.pth')
    torch.save({'model': classifier()}, page)
    assert read_checkpoint(f'{address}/tiny.pth').keys() == {'model'}
    assert len(asked) == 2
    with pytest.raises(CheckpointError, match='nowhere.pth cannot be downloaded: HTTP status 404'):
        read_checkpoint(f'{address}/nowhere.pth')


def test_half_a_download_is_never_used(server):
    folder, address, _ = server
    torch.save({'model': classifier()}, folder / 'broken.pth')
    url = f'{address}/broken.pth'
    size = (folder / 'broken.pth').stat().st_size
    with pytest.raises(CheckpointError, match=f'the connection broke off after {size // 2} of {size} bytes'):
        read_checkpoint(url)
    place = cache_path(url)
    assert [entry.name for entry in place.parent.iterdir()] == ['.lock']
    # What a killed process leaves is not taken for the file either, and does not stay.
    rest = place.with_name(f'.{"0" * 32}.part')
    rest.write_bytes(b'PK half')
    with pytest.raises(CheckpointError, match='broke off'):
        read_checkpoint(url)
    assert not rest.exists()


def test_a_name_downloads_the_published_file(server, monkeypatch):
    folder, address, asked = server
    torch.save({'model': classifier()}, folder / 'official.pth')
    monkeypatch.setitem(CLASSIFIERS, 'VMamba', {'test': f'{address}/official.pth'})
    for _ in range(2):
        loaded = create_backbone('vmamba-test', pretrained=True, in_channels=1)
    assert asked == ['/official.pth']
    expected = VMamba('test', in_channels=1)
    load_official(expected, folder / 'official.pth', in_channels=1)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())


def test_without_a_network_it_says_which_file_to_put_where(server, monkeypatch):
    folder, _, _ = server

    def unreachable(*args, **options):
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr(urllib.request, 'urlopen', unreachable)
    with pytest.raises(CheckpointError, match='Name or service not known') as caught:
        create_backbone('vmamba-tiny', pretrained=True, out_indices=0)
    url, place = re.match(r'(\S+) cannot be downloaded: .* put it at (\S+);', str(caught.value)).groups()
    assert url == CLASSIFIERS['VMamba']['tiny-s1l8']
    assert place.startswith(torch.hub.get_dir()) and place.endswith('/vssm1_tiny_0230s_ckpt_epoch_264.pth')
    monkeypatch.setitem(CLASSIFIERS, 'VMamba', {'test': url})
    torch.save({'model': classifier()}, place)
    create_backbone('vmamba-test', pretrained=True)


def test_names_without_published_weights_are_refused():
    with pytest.raises(
        ValueError, match="no weights of 'v2m-tiny' were published, but of vmamba-tiny, .*mamba2d-small"
    ):
        create_backbone('v2m-tiny', pretrained=True)
    names = list_backbones(pretrained=True)
    assert {'vmamba-tiny', 'vmamba-base-v0', 'mamba2d-nano'} <= set(names) <= set(list_backbones())
    assert not any(name.startswith('v2m') for name in names)


def test_a_file_url_is_read_in_place(tmp_path):
    torch.save({'model': classifier()}, tmp_path / 'a b.pth')
    assert read_checkpoint((tmp_path / 'a b.pth').as_uri()).keys() == {'model'}


@pytest.mark.parametrize('kind', [VMamba, Mamba2D])
def test_urls_are_those_of_the_published_table_and_of_the_metafiles(kind):
    family = kind.__name__.lower()
    table = PUBLISHED[family]
    expected = {arch: f'{table["release"]}/{row["ckpt"]}' for arch, row in table['classification'].items()}
    assert CLASSIFIERS[kind.__name__] == expected
    assert expected.keys() <= kind.ARCHS.keys()
    metafile = yaml.safe_load((ROOT / 'configs' / family / 'metafile.yml').read_text(encoding='utf-8'))
    assert set(expected.values()) <= {model['Weights'] for model in metafile['Models']}


@pytest.mark.parametrize('ending', ['{digest}', '{digest}0', '01234abc', '20260101'])
def test_digests_in_names_are_compared(ending, server):
    folder, address, _ = server
    content = b'weights'
    digest = hashlib.sha256(content).hexdigest()[:8]
    name = f'model-{ending.format(digest=digest)}.pth'
    (folder / name).write_bytes(content)
    url = f'{address}/{name}'
    if ending in ('{digest}', '20260101'):
        assert download(url).read_bytes() == content
        return
    with pytest.raises(CheckpointError, match=f'promises a SHA-256 .* the file has {digest}'):
        download(url)
    assert not cache_path(url).exists()
    assert [entry.name for entry in cache_path(url).parent.iterdir()] == ['.lock']
