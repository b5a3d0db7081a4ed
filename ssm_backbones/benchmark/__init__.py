"""Speed and memory: the backbones and scans against what they compete with, and whole models of any config.

What is compared is data (:mod:`~ssm_backbones.benchmark.registry`). To add a family, name its models in
:data:`~ssm_backbones.benchmark.backbones.BACKBONES` and list its comparisons and its scaling in the registry.
All entries of a comparison are measured in one run, in interleaved rounds, so that disturbances of the machine affect
all of them alike; a ratio is the median over the rounds.
"""

from ssm_backbones.benchmark.comparison import Comparison, LowerBound, Pair, Scaling, Unavailable
from ssm_backbones.benchmark.registry import run, select
from ssm_backbones.benchmark.report import Report, write_json
from ssm_backbones.benchmark.timing import Settings

__all__ = [
    'Comparison',
    'LowerBound',
    'Pair',
    'Report',
    'Scaling',
    'Settings',
    'Unavailable',
    'run',
    'select',
    'write_json',
]
