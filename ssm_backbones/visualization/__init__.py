"""Draw what a backbone sees: effective receptive fields, activation maps, and a pixel's response through a scan."""

from ssm_backbones.visualization.activation import activation_maps
from ssm_backbones.visualization.figures import VisualizeOptions, draw_erf_before_and_after, visualize
from ssm_backbones.visualization.plots import draw_activation_maps, draw_receptive_fields, draw_scan_response
from ssm_backbones.visualization.receptive_field import ReceptiveField, effective_receptive_field, receptive_field
from ssm_backbones.visualization.scan_response import ScanResponse, scan_response

__all__ = [
    'ReceptiveField',
    'ScanResponse',
    'VisualizeOptions',
    'activation_maps',
    'draw_activation_maps',
    'draw_erf_before_and_after',
    'draw_receptive_fields',
    'draw_scan_response',
    'effective_receptive_field',
    'receptive_field',
    'scan_response',
    'visualize',
]
