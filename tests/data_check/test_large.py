"""The time and the memory of the check on annotations of the size of COCO's training set."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

IMAGES, OBJECTS, CLASSES = 118_000, 860_000, 80

CHECK = """
import json, resource, sys, time
from ssm_backbones.apis.config import load_config
from ssm_backbones.data_check import check_data

cfg = load_config(sys.argv[1])
import mmdet.datasets, mmdet.models  # a training imports them anyway
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, wall = time.process_time(), time.perf_counter()
found = check_data(cfg, ('train',))
spent = time.process_time() - start
with open(f'{cfg.train_dataloader.dataset.data_root}large.json') as file:
    text = file.read(50_000_000)
text = text[text.index('"annotations":[') + 15 : text.rindex(',{')]
start = time.process_time()
json.loads(f'[{text}]')
parsed = (time.process_time() - start) / len(text)
print([str(finding) for finding in found])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f'wall {time.perf_counter() - wall:.1f} s', file=sys.stderr)
print(spent, parsed, before * 1024, after * 1024)
"""


def write_annotations(path: Path) -> None:
    """Write polygons of as many points as COCO's have, 29 on average, rounded as there."""
    random.seed(0)
    shapes = []
    for _ in range(500):
        count = random.randint(8, 50)
        polygon = [round(random.uniform(100, 300), 2) for _ in range(2 * count)]
        left, top = min(polygon[::2]), min(polygon[1::2])
        box = [left, top, round(max(polygon[::2]) - left, 2), round(max(polygon[1::2]) - top, 2)]
        shapes.append(f'"segmentation":{json.dumps([polygon])},"bbox":{json.dumps(box)},"area":{box[2] * box[3]:.4f}')
    with open(path, 'w') as file:
        file.write('{"info":{},"images":[')
        entry = '{{"id":{0},"file_name":"{0:012d}.jpg","width":640,"height":480}}'
        file.write(','.join(entry.format(number) for number in range(1, IMAGES + 1)))
        file.write('],"annotations":[')
        for number in range(1, OBJECTS + 1):
            file.write(
                f'{"," if number > 1 else ""}{{{shapes[number % 500]},"id":{number},"iscrowd":0,'
                f'"image_id":{number % IMAGES + 1},"category_id":{number % CLASSES + 1}}}'
            )
        names = [dict(id=number, name=f'class {number}') for number in range(1, CLASSES + 1)]
        file.write(f'],"categories":{json.dumps(names)}}}')


@pytest.mark.slow
def test_annotations_of_coco_s_size_take_seconds(write_config, tmp_path, environment):
    images = tmp_path / 'images'
    images.mkdir()
    for number in range(1, IMAGES + 1):
        # A file may have a limited number of names.
        source = tmp_path / f'{number // 1000}.jpg'
        if not source.exists():
            Image.new('RGB', (640, 480), (number % 255, 0, 0)).save(source)
        os.link(source, images / f'{number:012d}.jpg')
    write_annotations(tmp_path / 'large.json')
    config = write_config(
        'mmdet',
        f"""
        dataset = dict(
            data_root='{tmp_path}/', ann_file='large.json', data_prefix=dict(img='images/'),
            metainfo=dict(classes=[f'class {{number}}' for number in range(1, {CLASSES + 1})], palette=None))
        train_dataloader = dict(dataset=dataset)
        model = dict(roi_head=dict(bbox_head=dict(num_classes={CLASSES}), mask_head=dict(num_classes={CLASSES})))
        """,
    )
    command = [sys.executable, '-W', 'ignore', '-c', CHECK, str(config)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found, figures = result.stdout.splitlines()[-2:]
    assert found == '[]'
    seconds, parsed, before, after = map(float, figures.split())
    size = os.stat(tmp_path / 'large.json').st_size
    parsed *= size
    print(
        f'{size / 1e6:.0f} MB of annotations: {seconds:.1f} s of processor time, {seconds / parsed:.2f} times that of '
        f'json alone; {(after - before) / 1e9:.2f} GB more than before, {after / 1e9:.2f} GB in all'
    )
    # The limit is 20 s where json alone takes 19 s. A machine that is busy otherwise parses more slowly, too.
    assert seconds < 20 * max(1, parsed / 19)
    assert after < 2e9
