"""The C++ compiler that ``tools/bootstrap.py`` gives pip for mmcv: without debugging information, with torch's headers
compiled once instead of in each of 77 files, and with several files compiled as one. Code generation is the compiler's
own; see ``precompile`` and ``compile_together``. mmcv asks for C++17, and torch's headers for C++20 from 2.14 on; where
they do not compile as C++17, the files are taken as C++20.

    python mmcv_compiler.py FOLDER HEADER COMPILER... -- ARGUMENTS

Runs the compiler with these arguments. Whatever is no plain compilation of one C++ file goes through as it is, and
where the header cannot be compiled, the files are compiled without.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

# Options whose value follows as an argument of its own, and that differ between files.
OUTPUTS = ('-o', '-MF', '-MT', '-MQ')
# What would not be a compilation to an object file, or would have another first header.
OTHER = ('-E', '-S', '-M', '-MM', '-x', '-include', '-fsyntax-only', '-')
SUFFIXES = ('.cpp', '.cc', '.cxx')
# Reading torch's header, precompiled, takes 3 s, as long as all else of a usual file of mmcv. A group of a folder's
# files reads it once. The groups are few, and divide mmcv's files so that none defines a name twice. What is longer
# than any usual file (the bindings, a third of all the work) is compiled alone and first: see ``compile_ahead``.
GROUPS = 5
LONG = 50000


def shared_flags(arguments):
    """Return the flags of a compilation of one C++ file without its file names, and the file; None for other
    commands."""
    flags, sources, rest = [], [], iter(arguments)
    for argument in rest:
        if argument in OTHER or argument.startswith('@'):
            return None
        if argument in OUTPUTS:
            next(rest, None)
        elif argument.endswith(SUFFIXES) and not argument.startswith('-'):
            sources.append(argument)
        elif argument not in ('-c', '-MD', '-MMD', '-MP'):
            flags.append(argument)
    return (flags, sources[0]) if len(sources) == 1 and '-c' in arguments else None


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


def note_of(folder, files, flags, suffix):
    """Return a path in the folder that is these files' with these flags alone."""
    return os.path.join(folder, hashlib.sha256('\0'.join([*files, *flags]).encode()).hexdigest()[:16] + suffix)


def compile_ahead(folder, compiler, arguments, flags, source):
    """Compile the long files of this file's folder, unless another process does or has done so.

    Left to its turn, a long file would be compiled last, while all other processors wait. The header, which meanwhile
    another process compiles, is not needed for it. A failure is left for the file's own turn to tell.
    """
    directory, suffix = os.path.split(os.path.abspath(source))[0], os.path.splitext(source)[1]
    for path in glob.glob(f'{glob.escape(directory)}/*{suffix}'):
        if os.path.getsize(path) <= LONG or '-o' not in arguments:
            continue
        target = note_of(folder, [path], flags, '.o')
        with contextlib.suppress(OSError), open(target + '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(target) or os.path.exists(target + '.failed'):
                continue
            command = [path if argument == source else argument for argument in arguments]
            command[command.index('-o') + 1] = target + '.new'
            if subprocess.call([*compiler, *command], stderr=subprocess.DEVNULL):
                open(target + '.failed', 'w').close()
            else:
                os.replace(target + '.new', target)


def take_compiled(folder, arguments, flags, source):
    """Take the object of a long file that was compiled ahead, or is being so; return whether there is one."""
    target = note_of(folder, [os.path.abspath(source)], flags, '.o')
    if os.path.exists(target + '.lock') and '-o' in arguments:
        with contextlib.suppress(OSError), open(target + '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.copyfile(target, arguments[arguments.index('-o') + 1])
            return True
    return False


def group_of(source):
    """Return the files of its folder that are compiled together with this one, itself among them."""
    if os.path.getsize(source) > LONG:
        return [source]
    folder, suffix = os.path.dirname(source), os.path.splitext(source)[1]
    files = sorted(path for path in glob.glob(f'{glob.escape(folder)}/*{suffix}') if os.path.getsize(path) <= LONG)
    number = files.index(source)
    return files[number % GROUPS :: GROUPS]


def compile_together(folder, compiler, arguments, flags, source):
    """Compile the group of a file, if it is the first of the group to come, and otherwise nothing, as this file.

    Where the group does not compile as one, each file is compiled by itself, and their objects become one.

    Args:
        folder: Where groups that were compiled are noted.
        compiler: The compiler.
        arguments: Its arguments for this file.
        flags: Those among them that are the same for all files.
        source: The file, as the arguments name it.

    Returns:
        The exit status; None if the file is to be compiled by itself.
    """
    group = group_of(os.path.abspath(source))
    if len(group) == 1 or '-o' not in arguments:
        return None
    try:
        os.close(os.open(note_of(folder, group, flags, '.group'), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        without_header = arguments[: arguments.index('-include')] if '-include' in arguments else arguments
        nothing = [os.devnull if argument == source else argument for argument in without_header]
        return subprocess.call([*compiler, '-x', 'c++', *nothing])
    except OSError:
        return None
    place, output = arguments.index(source), arguments.index('-o') + 1
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        together = os.path.join(temporary, os.path.basename(source))
        with open(together, 'w') as stream:
            stream.writelines(f'#include "{path}"\n' for path in group)
        as_one = [*compiler, *arguments[:place], together, *arguments[place + 1 :]]
        if not subprocess.call(as_one, stderr=subprocess.DEVNULL):
            return 0
        objects = []
        for number, path in enumerate(group):
            objects.append(os.path.join(temporary, f'{number}.o'))
            single = list(arguments)
            single[place], single[output] = path, objects[-1]
            status = subprocess.call([*compiler, *single])
            if status:
                return status
        return subprocess.call([*compiler, '-r', '-nostdlib', *objects, '-o', arguments[output]])


def main(folder, header, *rest):
    """Compile; return the exit status, or become the compiler."""
    end = rest.index('--')
    compiler, arguments = rest[:end], list(rest[end + 1 :])
    found = shared_flags(arguments)
    if found and os.path.isfile(found[1]):
        flags, source = found
        arguments.append('-g0')
        if os.path.getsize(source) <= LONG:
            compile_ahead(folder, compiler, arguments, flags, source)
        elif take_compiled(folder, arguments, flags, source):
            return 0
        precompiled = precompile(folder, header, compiler, flags) if header else None
        if header and not precompiled and with_standard(flags) != flags:
            precompiled = precompile(folder, header, compiler, with_standard(flags))
            if precompiled:
                arguments = with_standard(arguments)
        if precompiled:
            # A warning in the log shows if the compiler does not use it.
            arguments += ['-Winvalid-pch', '-include', precompiled]
        status = compile_together(folder, compiler, arguments, flags, source)
        if status is not None:
            return status
    os.execvp(compiler[0], [*compiler, *arguments])


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
