"""What is known of the processor."""

import platform
from pathlib import Path

_CPUINFO = Path('/proc/cpuinfo')


def is_intel_processor() -> bool:
    """Return whether the processor is made by Intel."""
    try:
        return 'GenuineIntel' in _CPUINFO.read_text(encoding='utf-8', errors='replace')
    except OSError:
        # Other systems than Linux.
        return 'GenuineIntel' in platform.processor()
