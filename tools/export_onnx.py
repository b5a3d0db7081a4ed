#!/usr/bin/env python
"""Export a backbone, classifier, segmentor or detector to ONNX, and check it against PyTorch."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.mm import DictAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='The graph takes normalised images, float32 (B, C, H, W); how they are normalised is in its metadata. A '
        "classifier gives scores before softmax, a segmentor scores of the images' size, each image as a whole. A "
        'detector takes pixels (RGB, 0 to 255) and gives boxes, scores, labels and masks within the boxes. What can '
        'be exported: every backbone of this package, ImageClassifier, EncoderDecoder with one decoding head, '
        'FasterRCNN, MaskRCNN and RetinaNet; of others the backbone. Exit status: 0, or 2 where nothing was written.',
    )
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint; without it the weights are as initialised')
    parser.add_argument('--shape', nargs=2, type=int, default=[224, 224], metavar=('H', 'W'), help='of the images')
    parser.add_argument('--dynamic', action='store_true', help='leave batch, height and width open')
    parser.add_argument(
        '--no-loops', dest='loops', action='store_false', help='unroll the scans, for runtimes without loops'
    )
    parser.add_argument(
        '--custom-ops',
        action='store_true',
        help='each scan as one operator, of the libraries of make runtimes',
    )
    parser.add_argument(
        '--precision',
        choices=['float32', 'float16', 'bfloat16', 'int8', 'int8-dynamic'],
        default='float32',
        help='float16: computed so; bfloat16: weights stored so, computed in float32; int8: weights of 7 bits, '
        'activations of 8, in ranges of training images; int8-dynamic: in ranges of each run',
    )
    parser.add_argument(
        '--calibration-images', type=int, default=64, metavar='N', help="of the config's training data, for int8 (64)"
    )
    parser.add_argument(
        '--keep-float', nargs='+', default=[], metavar='PATTERN', help='layers that int8 and int8-dynamic leave'
    )
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='images at once (1)')
    parser.add_argument('--out', metavar='FILE', help="file to write (default: the config's name with .onnx)")
    parser.add_argument(
        '--part', choices=['backbone', 'classifier', 'segmentor', 'detector'], help='default: what the config is'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='KEY=VALUE for the config')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.onnx_export.export import OnnxOptions, export_onnx
        from ssm_backbones.onnx_export.precision import PRECISIONS

        result = export_onnx(OnnxOptions(**vars(args)))
        kind = "standard and this package's" if args.custom_ops else 'standard'
        print(f'{result.part} written to {result.path}: opset {result.opset}, {result.nodes} {kind} operators')
        if result.objects is None:
            bound = f'{PRECISIONS[args.precision]:.0e}'
            print(f'onnxruntime against PyTorch, largest difference relative to the largest value ({bound}):')
        else:
            images = 'training images' if args.precision == 'int8' else 'coloured squares'
            print(f'onnxruntime against PyTorch, {result.objects} objects in {images}:')
            if not result.objects and not any(max(each.values()) for each in result.differences.values()):
                print('  neither finds an object in them: nothing was compared. Try images of your own.')
        for shape, outputs in result.differences.items():
            figures = ', '.join(f'{name} {value:.1e}' for name, value in outputs.items())
            print(f'  images {"x".join(map(str, shape))}: {figures}')
        if result.layers is not None:
            for kind, names in (('8-bit integers', result.layers.integer), ('float', result.layers.kept)):
                print(f'{len(names)} layers in {kind}: {", ".join(names)}')
        if args.precision != 'float32':
            print('tools/test_onnx.py measures what it costs in accuracy.')
        figures = ', '.join(f'{name} {1e3 * value:.1f} ms' for name, value in result.seconds.items())
        print(f'time on the CPU, best of a few runs: {figures}')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
