"""Check of a config's data before training and testing: annotations, label maps, images, classes, pipelines."""

from ssm_backbones.data_check.check import Report, check_data, inspect_data
from ssm_backbones.data_check.finding import ERROR, NOTE, WARNING, Finding
from ssm_backbones.data_check.report import as_table, draw_counts, error_message

__all__ = [
    'ERROR',
    'NOTE',
    'WARNING',
    'Finding',
    'Report',
    'as_table',
    'check_data',
    'draw_counts',
    'error_message',
    'inspect_data',
]
