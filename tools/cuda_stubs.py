"""Stand-ins for the CUDA libraries that torch's wheels for Linux are linked with, so that its CPU part can be tested.

Those libraries take 2 to 3 GB, and a machine without a GPU uses none of them but to be told so. A stand-in has the name
and the symbols that torch asks for. Each of its functions returns 100, CUDA's code for "no device"; with a GPU, too.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CUDA_LIBRARY = re.compile(r'lib(cu|nv|nccl)')
CUDA_FUNCTION = re.compile(r'(__)?(cu|nv|nccl)')
# As readelf ends a line: section, name, version.
SYMBOL = re.compile(r' (UND|\d+) ([\w.]+)(?:@+([\w.]+))?(?: \(\d+\))?$', re.MULTILINE)
# Of its "version needs" section: a library, or the name of one of the versions needed of it.
NEED = re.compile(r'  File: (\S+)|  Name: (\S+)')
NO_DEVICE = 100


def missing_symbols(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Return what torch's libraries in a folder take from CUDA's: by the library's name, the symbols by their version.

    Where a symbol bears no version, its library is unknown, and it is listed for all of them, as version ''.

    Raises:
        RuntimeError: if readelf does not read them.
    """
    files = sorted(folder.glob('*.so*'))
    names: set[str] = set()
    versions: dict[str, set[str]] = defaultdict(set)
    symbols, own = defaultdict(set), set()
    for file in files:
        output = _output(['readelf', '-dVW', '--dyn-syms', str(file)])
        names |= {name for name in re.findall(r'\(NEEDED\).*\[(.+)\]', output) if CUDA_LIBRARY.match(name)}
        library = ''
        for named, version in NEED.findall(output.partition('Version needs section')[2]):
            library = named or library
            versions[library].add(version or '')
        for section, symbol, version in SYMBOL.findall(output):
            if CUDA_FUNCTION.match(symbol):
                symbols[version].add(symbol) if section == 'UND' else own.add(symbol)
    bundled = {file.name for file in files}
    plain = symbols[''] - own
    return {
        name: {'': plain, **{version: symbols[version] for version in sorted(versions[name] - {''})}}
        for name in sorted(names - bundled)
    }


def make_stand_ins(folder: Path) -> list[str]:
    """Compile the stand-ins into the folder of torch's libraries, and return their names.

    Raises:
        RuntimeError: if there is no readelf or gcc, or gcc does not compile one.
    """
    made = missing_symbols(folder)
    for name, versions in made.items():
        symbols = sorted(set().union(*versions.values()))
        functions = ''.join(f'int {symbol}(void) {{ return {NO_DEVICE}; }}\n' for symbol in symbols)
        nodes = {version: versions[version] for version in versions if version} or {name: set()}
        # What bears no version may be of any; the first one holds it.
        first = next(iter(nodes))
        script = folder / f'{name}.versions'
        script.write_text(
            ''.join(
                f'{version} {{ global: {"; ".join([*sorted(its), *(["*"] if version == first else [])])}; }};\n'
                for version, its in nodes.items()
            )
        )
        flags = ['-shared', '-fPIC', '-fno-builtin', '-w', f'-Wl,-soname,{name}', f'-Wl,--version-script={script}']
        command = ['gcc', *flags, '-x', 'c', '-', '-o', str(folder / name)]
        try:
            _output(command, functions)
        finally:
            script.unlink()
    return list(made)


def _output(command: list[str], text: str = '') -> str:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise RuntimeError(f'{command[0]} does not run ({error}); install gcc and binutils') from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f'{command[0]} fails for {command[-1]}: {error.stderr.strip()[-300:]}') from error


if __name__ == '__main__':
    print(*make_stand_ins(Path(sys.argv[1]) / 'lib'), sep='\n')
