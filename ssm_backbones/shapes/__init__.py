"""Generated data sets of coloured shapes; `ssm_backbones.shapes.generate.make_shapes` writes them.

Only names and colours are imported here, so that configs can import them cheaply.
"""

from ssm_backbones.shapes.classes import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE, WNIDS

__all__ = ['CLASSES', 'PALETTE', 'SEG_CLASSES', 'SEG_PALETTE', 'WNIDS']
