"""The C++ compiler that ``tools/bootstrap.py`` gives pip for mmcv: without debugging information, and with torch's
headers compiled once instead of in each of 77 files. Code generation is the compiler's own; see ``precompile``. mmcv
asks for C++17, and torch's headers for C++20 from 2.14 on; where they do not compile as C++17, the files are taken as
C++20.

    python mmcv_compiler.py FOLDER HEADER COMPILER... -- ARGUMENTS

Runs the compiler with these arguments. Whatever is no plain compilation of one C++ file goes through as it is, and
where the header cannot be compiled, the files are compiled without.
"""

import fcntl
import hashlib
import os
import subprocess
import sys

# Options whose value follows as an argument of its own, and that differ between files.
OUTPUTS = ('-o', '-MF', '-MT', '-MQ')
# What would not be a compilation to an object file, or would have another first header.
OTHER = ('-E', '-S', '-M', '-MM', '-x', '-include', '-fsyntax-only', '-')


def shared_flags(arguments):
    """Return the flags of a compilation of one C++ file without its file names; None for other commands."""
    flags, sources, rest = [], 0, iter(arguments)
    for argument in rest:
        if argument in OTHER or argument.startswith('@'):
            return None
        if argument in OUTPUTS:
            next(rest, None)
        elif argument.endswith(('.cpp', '.cc', '.cxx')) and not argument.startswith('-'):
            sources += 1
        elif argument not in ('-c', '-MD', '-MMD', '-MP'):
            flags.append(argument)
    return flags if sources == 1 and '-c' in arguments else None


def with_standard(arguments):
    """Return the arguments with C++20 in the place of C++17."""
    return ['-std=c++20' if argument == '-std=c++17' else argument for argument in arguments]


def precompile(folder, header, compiler, flags):
    """Return the header to include first, precompiled for exactly these flags, or None if that fails.

    An interrupted precompilation is repeated, because headers are renamed when complete; a failed one is not.
    """
    key = hashlib.sha256('\0'.join([header, *compiler, *flags]).encode()).hexdigest()[:16]
    path = os.path.join(folder, key + '.h')
    try:
        with open(path + '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(path + '.gch') and not os.path.exists(path + '.failed'):
                with open(path, 'w') as stream:
                    stream.write(f'#include <{header}>\n')
                command = [*compiler, *flags, '-g0', '-x', 'c++-header', path, '-o', path + '.new']
                if subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                    open(path + '.failed', 'w').close()
                else:
                    os.replace(path + '.new', path + '.gch')
    except OSError:
        return None
    return path if os.path.exists(path + '.gch') else None


def main(folder, header, *rest):
    """Become the compiler."""
    end = rest.index('--')
    compiler, arguments = rest[:end], rest[end + 1 :]
    command = [*compiler, *arguments]
    flags = shared_flags(arguments)
    if flags is not None:
        command.append('-g0')
        precompiled = precompile(folder, header, compiler, flags) if header else None
        if header and not precompiled and with_standard(flags) != flags:
            precompiled = precompile(folder, header, compiler, with_standard(flags))
            if precompiled:
                command = with_standard(command)
        if precompiled:
            # A warning in the log shows if the compiler does not use it.
            command += ['-Winvalid-pch', '-include', precompiled]
    os.execvp(command[0], command)


if __name__ == '__main__':
    main(*sys.argv[1:])
