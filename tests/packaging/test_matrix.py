"""What ``make matrix`` tests other versions of torch with."""

import ctypes
import subprocess

import pytest

from tests.missing_libraries import missing


@pytest.fixture
def cuda_stubs(load_tool):
    return load_tool('cuda_stubs')


def link(source: str, output, *flags) -> None:
    command = ['gcc', '-shared', '-fPIC', '-x', 'c', '-', '-x', 'none', *map(str, flags), '-o', str(output)]
    subprocess.run(command, input=source, text=True, check=True)


def test_stand_ins_let_torch_s_libraries_load_and_find_no_device(cuda_stubs, tmp_path):
    """With symbols of one version, of two, of none, and of a library that lies beside them, which stays as it is."""
    folder = tmp_path / 'lib'
    folder.mkdir()
    (tmp_path / 'versions').write_text('libcudart.so.99 { global: *; };\n')
    script = f'-Wl,--version-script={tmp_path / "versions"}'
    link('int cudaCount(void) { return 7; }', tmp_path / 'libcudart.so.99', '-Wl,-soname,libcudart.so.99', script)
    link('int ncclCount(void) { return 7; }', tmp_path / 'libnccl.so.9', '-Wl,-soname,libnccl.so.9')
    # As NVSHMEM's library, whose versions do not bear its name.
    (tmp_path / 'versions').write_text('NVSHMEM { global: nvCount; }; NVSHMEM_2 { global: nvSecond; };\n')
    both = 'int nvCount(void) { return 7; } int nvSecond(void) { return 7; }'
    link(both, tmp_path / 'libnvshmem.so.3', '-Wl,-soname,libnvshmem.so.3', script)
    link('int nvOwn(void) { return 7; }', folder / 'libnvown.so', '-Wl,-soname,libnvown.so')
    link(
        'int cudaCount(void); int ncclCount(void); int nvOwn(void); int nvCount(void); int nvSecond(void);'
        'int cuda(void) { return cudaCount(); } int nccl(void) { return ncclCount(); }'
        'int own(void) { return nvOwn(); } int shared(void) { return nvCount() + nvSecond(); }',
        folder / 'libtorch_cuda.so',
        tmp_path / 'libcudart.so.99',
        tmp_path / 'libnccl.so.9',
        tmp_path / 'libnvshmem.so.3',
        folder / 'libnvown.so',
        '-Wl,-rpath,$ORIGIN',
    )
    with pytest.raises(OSError, match='libcudart.so.99'):
        ctypes.CDLL(str(folder / 'libtorch_cuda.so'))
    assert cuda_stubs.make_stand_ins(folder) == ['libcudart.so.99', 'libnccl.so.9', 'libnvshmem.so.3']
    library = ctypes.CDLL(str(folder / 'libtorch_cuda.so'))
    assert (library.cuda(), library.nccl(), library.own(), library.shared()) == (100, 100, 7, 200)


def test_what_stand_ins_are_made_with_is_named_where_it_is_missing(cuda_stubs, tmp_path, monkeypatch):
    (tmp_path / 'libtorch.so').write_text('no library')
    with pytest.raises(RuntimeError, match=r'readelf fails for .*libtorch\.so'):
        cuda_stubs.make_stand_ins(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='readelf does not run.*install gcc and binutils'):
        cuda_stubs.make_stand_ins(tmp_path)


def test_only_a_library_that_is_not_installed_skips_a_test():
    wanted = ModuleNotFoundError("No module named 'mmdet.apis'", name='mmdet.apis')
    assert missing(wanted) == 'mmdet'
    assert missing(ModuleNotFoundError("No module named 'cuda_op'", name='cuda_op')) is None
    assert missing(ImportError('mmdet is broken', name='mmdet')) is None
    wrapped = RuntimeError('it does not work')
    wrapped.__cause__ = wanted
    assert missing(wrapped) == 'mmdet' and missing(RuntimeError()) is None and missing(None) is None
