"""Report of ``python -m ssm_backbones``: installed versions, backends of each device, and problems with remedies.

Only the standard library is imported at module level, and relative imports are used, so that the report also works if
the package itself cannot be imported.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

# Relative imports: the doctor also runs alone, if the package cannot be imported.
from . import hosts, machine
from .line import Line, short

_LABEL, _WIDTH = 24, 118
Section = tuple[str, list[Line]]


def main() -> int:
    """Print the report and return 1 if something that a config needs is broken, else 0."""
    sections = examine()
    print(render(sections))
    return int(any(line.broken for _, lines in sections for line in lines))


def examine() -> list[Section]:
    """Return all findings, by section."""
    torch, torch_line = machine.import_torch()
    found = hosts.installed()
    base = [
        machine.python_line(),
        torch_line,
        machine.numpy_line(torch),
        hosts.mmengine_line(found),
        hosts.package_line(),
    ]
    if any(line.broken for line in base):
        tried = [Line('imports', 'not tried, for what is broken above')]
    else:
        tried = hosts.host_lines(found)
        if importlib.util.find_spec('mmengine') is not None:
            tried.append(hosts.loading_line(torch))
    sections = [('base', base), ('host libraries', [*hosts.stack_lines(found), *tried])]
    sections.append(('machine', _guarded('compilers', machine.compiler_lines) + machine.gpu_lines(torch)))
    if torch is not None:
        sections.append(('ops', _guarded('cuda_ops', backend_lines)))
        sections.append(('self-test', _guarded('cuda_ops', lambda: self_test(torch))))
    return sections


def backend_lines() -> list[Line]:
    """Return the backend of each device."""
    status = importlib.import_module('cuda_ops').backend_status()
    lines = [Line('compiled library', status.library)]
    for name, device in status.devices.items():
        slow = device.present and device.backend == 'reference'
        remedy = 'slow; build the ops: make setup, or pip install -e . --no-build-isolation' if slow else ''
        lines.append(Line(name, str(device), remedy))
    return lines


def self_test(torch: Any) -> list[Line]:
    """Test each op on each device, see :mod:`ssm_backbones.doctor.selftest`."""
    selftest = importlib.import_module('.selftest', __name__)
    return selftest.examine_ops(['cpu', *(['cuda'] if torch.cuda.is_available() else [])])


def render(sections: Sequence[Section]) -> str:
    """Format the report as text: broken findings are marked, and remedies are below the findings."""
    page = []
    for title, lines in sections:
        page.append(title)
        for line in lines:
            text = f'BROKEN: {line.text}' if line.broken else line.text
            page += _wrapped(f'  {line.label}'.ljust(_LABEL), text)
            if line.remedy:
                page += _wrapped(' ' * _LABEL, f'-> {line.remedy}')
        page.append('')
    broken = [line.label for _, lines in sections for line in lines if line.broken]
    page.append(f'Broken: {", ".join(broken)}.' if broken else 'Nothing that a config needs is broken.')
    return '\n'.join(page)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=' ' * _LABEL, break_on_hyphens=False)


def _guarded(label: str, lines: Callable[[], list[Line]]) -> list[Line]:
    """Return the lines of a function, or a line with its error."""
    try:
        return lines()
    except Exception as error:
        return [Line(label, short(error), 'reinstall the package', broken=True)]
