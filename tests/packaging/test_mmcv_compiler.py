"""The compiler that mmcv is set up with."""

import ctypes
import fcntl
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SOURCE = '#include <vector>\nint total(const std::vector<int>& v) { int s = 0; for (int i : v) s += i; return s; }\n'
FLAGS = '-O3 -DNDEBUG -g -std=c++17 -Wall'


@pytest.fixture
def compiler_script(load_tool):
    return load_tool('mmcv_compiler')


@pytest.fixture
def compile_file(root, tmp_path):
    """Compile a file as setuptools does, and return what the compiler printed."""
    (tmp_path / 'headers').mkdir()
    (tmp_path / 'a.cpp').write_text(SOURCE)

    def run(flags=FLAGS, header='vector', out='a.o', compiler='g++', **options) -> str:
        command = [
            sys.executable,
            str(root / 'tools' / 'mmcv_compiler.py'),
            str(tmp_path / 'headers'),
            header,
            *shlex.split(compiler),
            '--',
            '-MMD',
            '-MF',
            str(tmp_path / 'a.d'),
            *shlex.split(flags),
            '-H',
            '-c',
            '-c',
            str(tmp_path / 'a.cpp'),
            '-o',
            str(tmp_path / out),
        ]
        finished = subprocess.run(command, capture_output=True, text=True, **options)
        assert finished.returncode == 0, finished.stderr
        assert (tmp_path / out).exists()
        return finished.stderr

    return run


def compiled_headers(tmp_path) -> list[Path]:
    return sorted((tmp_path / 'headers').glob('*.gch'))


def takes_header(printed: str, tmp_path) -> bool:
    """Whether the compiler says of one of the compiled headers that it is used, by -H's mark."""
    assert 'invalid-pch' not in printed
    return any(line.startswith('! ') and str(tmp_path / 'headers') in line for line in printed.splitlines())


def sections(path: Path) -> str:
    return subprocess.run(['readelf', '-SW', path], capture_output=True, text=True, check=True).stdout


def code(path: Path) -> str:
    printed = subprocess.run(['objdump', '-d', path], capture_output=True, text=True, check=True).stdout
    return printed.partition('Disassembly')[2]


def test_header_is_compiled_once_and_used_and_the_code_is_the_same(compile_file, tmp_path):
    first, second = compile_file(), compile_file()
    assert takes_header(first, tmp_path) and takes_header(second, tmp_path)
    (header,) = compiled_headers(tmp_path)
    made = header.stat().st_mtime_ns
    compile_file(header='', out='plain.o')
    assert code(tmp_path / 'a.o') == code(tmp_path / 'plain.o') != ''
    assert 'debug_info' not in sections(tmp_path / 'a.o') + sections(tmp_path / 'plain.o')
    assert header.stat().st_mtime_ns == made
    assert 'a.cpp' in (tmp_path / 'a.d').read_text()


def test_headers_of_cxx20_raise_the_standard_and_others_do_not(compile_file, tmp_path):
    """torch 2.14's headers stop the compiler at any older standard, and mmcv 2.1.0 asks for C++17."""
    header = tmp_path / 'types.h'
    header.write_text('#if __cplusplus < 202002L\n#error C++20 is needed\n#endif\n#include <vector>\n')
    (tmp_path / 'a.cpp').write_text(f'#include "{header}"\n#include <vector>\n')
    assert takes_header(compile_file(header=header.name, flags=f'{FLAGS} -I{tmp_path}'), tmp_path)
    (tmp_path / 'a.cpp').write_text('static_assert(__cplusplus < 202002L);\n')
    compile_file()


def test_other_flags_have_a_header_of_their_own(compile_file, tmp_path):
    assert takes_header(compile_file(), tmp_path)
    assert takes_header(compile_file(FLAGS + ' -DMORE=1 -fPIC'), tmp_path)
    assert len(compiled_headers(tmp_path)) == 2


def test_interrupted_header_is_made_anew(compile_file, tmp_path):
    compile_file()
    (header,) = compiled_headers(tmp_path)
    # As a killed set-up leaves it: written in part, and not renamed.
    header.with_name(header.name.replace('.gch', '.new')).write_bytes(header.read_bytes()[:1000])
    header.unlink()
    assert takes_header(compile_file(), tmp_path)


def test_header_that_fails_is_tried_once_and_done_without(compile_file, tmp_path):
    for _ in range(2):
        assert not takes_header(compile_file(header='no/such/header.h'), tmp_path)
    # Once as C++17, once as C++20.
    assert len(list((tmp_path / 'headers').glob('*.failed'))) == 2


def test_folder_that_cannot_be_written_is_done_without(compile_file, tmp_path):
    (tmp_path / 'headers').rmdir()
    assert not takes_header(compile_file(), tmp_path)


def test_processes_share_one_header(compile_file, tmp_path):
    compile_file()
    (header,) = compiled_headers(tmp_path)
    header.unlink()
    with open(header.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=compile_file)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not header.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
    waiting.join(60)
    assert header.exists()


@pytest.fixture
def compile_folder(root, tmp_path):
    """Compile all files of a folder, link them, and return the library and the objects."""
    (tmp_path / 'headers').mkdir()

    def run(sources: dict[str, str]):
        folder = tmp_path / 'sources'
        folder.mkdir(exist_ok=True)
        for name, text in sources.items():
            (folder / name).write_text(text)
        command = [sys.executable, str(root / 'tools' / 'mmcv_compiler.py'), str(tmp_path / 'headers'), 'vector']
        objects = []
        for name in sources:
            objects.append(tmp_path / f'{name}.o')
            depfile = ['-MMD', '-MF', str(objects[-1]) + '.d']
            subprocess.run(
                [*command, 'g++', '--', *depfile, *FLAGS.split(), '-fPIC', '-c', folder / name, '-o', objects[-1]],
                check=True,
            )
        subprocess.run([*command, 'g++', '--', '-shared', *objects, '-o', tmp_path / 'lib.so'], check=True)
        return ctypes.CDLL(str(tmp_path / 'lib.so')), objects

    return run


def functions(path: Path) -> list[str]:
    printed = subprocess.run(['nm', '--defined-only', path], capture_output=True, text=True, check=True).stdout
    return sorted(re.findall(r' T (\w+)$', printed, re.MULTILINE))


def test_files_of_a_folder_are_compiled_in_groups(compile_folder, compiler_script):
    count = 2 * compiler_script.GROUPS
    sources = {f'f{n}.cpp': f'extern "C" int f{n}() {{ return {n}; }}' for n in range(count)}
    sources['long.cpp'] = f'extern "C" int f{count}() {{ return {count}; }}' + ' ' * compiler_script.LONG
    library, objects = compile_folder(sources)
    assert [library[f'f{n}']() for n in range(count + 1)] == list(range(count + 1))
    assert functions(objects[0]) == ['f0', f'f{compiler_script.GROUPS}']
    assert [functions(path) for path in objects[compiler_script.GROUPS : count]] == [[]] * compiler_script.GROUPS
    assert functions(objects[-1]) == [f'f{count}']


def test_a_long_file_is_compiled_ahead_and_once(compile_folder, compiler_script, tmp_path):
    compile_folder({'a.cpp': ''})
    (tmp_path / 'sources' / 'long.cpp').write_text('int ahead() { return 1; }' + ' ' * compiler_script.LONG)
    compile_folder({'b.cpp': ''})
    (compiled,) = (tmp_path / 'headers').glob('*.o')
    # At its turn it is taken as it is.
    _, (taken,) = compile_folder({'long.cpp': 'int late() { return 2; }' + ' ' * compiler_script.LONG})
    assert functions(taken) == functions(compiled) == ['_Z5aheadv']


def test_the_fault_of_a_long_file_is_told_at_its_turn(compile_folder, compiler_script, tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        compile_folder({'a.cpp': '', 'long.cpp': 'fault' + ' ' * compiler_script.LONG})
    assert 'fault' in capfd.readouterr().err
    assert len(list((tmp_path / 'headers').glob('*.failed'))) == 1


def test_files_that_do_not_compile_as_one_are_compiled_by_themselves(compile_folder, compiler_script):
    count = compiler_script.GROUPS + 1
    text = 'static int own() {{ return {0}; }} extern "C" int f{0}() {{ return own(); }}'
    library, objects = compile_folder({f'f{n}.cpp': text.format(n) for n in range(count)})
    assert [library[f'f{n}']() for n in range(count)] == list(range(count))
    assert functions(objects[0]) == ['f0', f'f{count - 1}'] and functions(objects[-1]) == []


def test_a_fault_in_a_group_is_told_in_the_compiler_s_words(root, tmp_path, compiler_script):
    for number in range(compiler_script.GROUPS + 1):
        (tmp_path / f'f{number}.cpp').write_text('fault' if number == compiler_script.GROUPS else '')
    command = [sys.executable, str(root / 'tools' / 'mmcv_compiler.py'), str(tmp_path), '', 'g++', '--', '-c']
    finished = subprocess.run([*command, tmp_path / 'f0.cpp', '-o', tmp_path / 'f0.o'], capture_output=True, text=True)
    assert finished.returncode and f'f{compiler_script.GROUPS}.cpp' in finished.stderr and 'fault' in finished.stderr
    assert not (tmp_path / 'f0.o').exists()


@pytest.mark.parametrize(
    'arguments',
    [
        '-v',
        '-shared a.o -o lib.so',
        '-E a.cpp',
        '-c -x c++ a.cpp',
        '@options',
        '-c a.c -o a.o',
        '-c a.cpp b.cpp',
        '-S a.cpp',
        '-c -include first.h a.cpp',
        'a.cpp -o program',
        '-c b.cu',
    ],
)
def test_anything_else_goes_through_as_it_is(root, tmp_path, arguments):
    command = [sys.executable, str(root / 'tools' / 'mmcv_compiler.py'), str(tmp_path), 'vector', 'echo', 'c++', '--']
    finished = subprocess.run([*command, *arguments.split()], capture_output=True, text=True)
    assert finished.stdout == f'c++ {arguments}\n'
    assert list(tmp_path.iterdir()) == []
