"""A plugin for pytest that skips tests for want of a library: ``pytest -p tests.missing_libraries``.

``make matrix`` uses it in environments without host libraries. A test is skipped where it, or the import of its module,
ends in the error that one of the libraries is not installed.
"""

import re
from collections.abc import Generator
from typing import Any

import pytest

LIBRARIES = {'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision', 'openvino', 'timm', 'pycocotools', 'supervision'}


def missing(error: BaseException | None) -> str | None:
    """The library that an error, or what caused it, says is not installed."""
    while error is not None:
        name = (getattr(error, 'name', None) or '').partition('.')[0]
        if isinstance(error, ModuleNotFoundError) and name in LIBRARIES:
            return name
        # By pkg_resources, where mmengine looks for a library's configs.
        found = re.match(r"The '(\w+)' distribution was not found", str(error))
        if found and found.group(1) in LIBRARIES:
            return found.group(1)
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    name = missing(call.excinfo and call.excinfo.value)
    if name:
        report.outcome = 'skipped'
        report.longrepr = (str(item.path), 0, f'{name} is not installed')
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    call = getattr(report, 'call', None)
    error = call.excinfo.value if call and call.excinfo else None
    name = missing(error)
    if name:
        report.outcome = 'skipped'
        report.longrepr = (str(collector.path), 0, f'{name} is not installed')
    return report
