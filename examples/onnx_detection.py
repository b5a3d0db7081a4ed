#!/usr/bin/env python
"""Objects in an image, by a detector that ``tools/export_onnx.py --dynamic`` wrote, without PyTorch."""

import argparse
import json

import cv2
import numpy as np
import onnxruntime


def detect(session: onnxruntime.InferenceSession, image: np.ndarray, scale: list[int]) -> tuple[np.ndarray, ...]:
    """Detect objects in an image (H, W, 3), BGR, which is resized to fit into ``scale`` as mmdet does.

    Returns boxes (n, 4), scores (n), classes (n) and, of a model with masks, masks (n, H, W), in pixels of the image.
    """
    height, width = image.shape[:2]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    pixels = cv2.resize(image, size)[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    boxes, scores, labels, *masks = (each[0] for each in session.run(None, {'images': pixels}))
    real = scores > 0
    boxes = boxes[real] / np.float32([size[0] / width, size[1] / height] * 2)
    if not masks:
        return boxes, scores[real], labels[real]
    threshold = float(session.get_modelmeta().custom_metadata_map['mask_threshold'])
    pasted = np.zeros((len(boxes), height, width), bool)
    for out, cells, (left, top, right, bottom) in zip(pasted, masks[0][real], boxes, strict=True):
        rows, columns = bilinear(top, bottom, height, len(cells)), bilinear(left, right, width, cells.shape[1])
        out[:] = rows @ cells @ columns.T >= threshold
    return boxes, scores[real], labels[real], pasted


def bilinear(start: float, end: float, length: int, cells: int) -> np.ndarray:
    """Compute the weight of each of a box's cells in each pixel of a side: (length, cells)."""
    places = (np.arange(length)[:, None] + 0.5 - start) / max(end - start, 1e-6) * cells - 0.5
    return np.maximum(0.0, 1.0 - np.abs(places - np.arange(cells)))


def main(argv: list[str] | None = None) -> None:
    """Print what is in an image."""
    parser = argparse.ArgumentParser(description=__doc__, epilog='pip install onnxruntime opencv-python-headless')
    parser.add_argument('model', help='file of tools/export_onnx.py')
    parser.add_argument('image')
    parser.add_argument('--scale', nargs=2, type=int, default=[1333, 800], help="the config's, which images fit into")
    args = parser.parse_args(argv)
    try:
        session = onnxruntime.InferenceSession(args.model, providers=['CPUExecutionProvider'])
        names = json.loads(session.get_modelmeta().custom_metadata_map['classes'])
    except Exception as error:
        parser.error(f'{args.model} is no detector of tools/export_onnx.py: {error}')
    if (image := cv2.imread(args.image)) is None:
        parser.error(f'{args.image} is no image that OpenCV reads')
    for box, score, label, *mask in zip(*detect(session, image, args.scale), strict=True):
        area = (f'mask of {each.sum()} pixels' for each in mask)
        print(f'{names[label]} {score:.3f} at {" ".join(f"{each:.1f}" for each in box)}', *area, sep=', ')


if __name__ == '__main__':
    main()
