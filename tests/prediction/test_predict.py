"""What tools/predict.py writes is what the host libraries' own inferencers find, once, whatever happens in between."""

import csv
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.apis.processes import Processes
from ssm_backbones.prediction import PredictOptions, Predictor, PredictResult, predict
from ssm_backbones.prediction.predictor import Sizes
from ssm_backbones.prediction.run import _predict
from ssm_backbones.utils.errors import CommandError

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'predict.py'
NAMES = ('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross')
HOSTS = ('mmdet', 'mmseg', 'mmpretrain')


@pytest.fixture(scope='module')
def models(write_config, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """A config and a checkpoint of each host library."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for host in HOSTS:
        config = write_config(host)
        model = build_model(load_config(config), None)
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / f'{host}.pth')
        made[host] = (str(config), str(folder / f'{host}.pth'))
    return made


@pytest.fixture(scope='module')
def images(shapes) -> Path:
    """Four images of 64x64 pixels."""
    return shapes / 'coco' / 'val2017'


def run(model: tuple[str, str], given: object, out: Path, **options: object) -> PredictResult:
    inputs = [str(each) for each in given] if isinstance(given, list) else [str(given)]
    return predict(PredictOptions(*model, inputs, str(out), **{'workers': 0, 'device': 'cpu', **options}))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_objects_are_those_of_mmdets_inferencer(models, images, tmp_path) -> None:
    from mmdet.apis import DetInferencer

    result = run(models['mmdet'], images, tmp_path, batch_size=3)
    assert (result.predicted, result.kept, result.unreadable) == (4, 0, [])
    assert result.files == [tmp_path / 'predictions.json', tmp_path / 'drawn']
    found = COCO(str(tmp_path / 'predictions.json'))
    assert [each['name'] for each in found.dataset['categories']] == list(NAMES)
    assert min(found.imgs) == min(found.anns) == min(found.cats) == 1
    inferencer = DetInferencer(*models['mmdet'], device='cpu', show_progress=False)
    for image in found.dataset['images']:
        (expected,) = inferencer(str(images / image['file_name']))['predictions']
        ours = found.loadAnns(found.getAnnIds(image['id']))
        boxes = np.array([each['bbox'] for each in ours])
        boxes[:, 2:] += boxes[:, :2]
        assert np.abs(boxes - np.array(expected['bboxes'])).max() < 0.02
        assert [each['score'] for each in ours] == pytest.approx(expected['scores'], abs=1e-4)
        assert [each['category_id'] - 1 for each in ours] == expected['labels']
        # Pixels at the edge of a mask may fall to either side where sizes of batches differ.
        same = [
            masks.iou([each['segmentation']], [mask], [0])[0, 0] > 0.98 or not masks.area(mask)
            for each, mask in zip(ours, expected['masks'], strict=True)
        ]
        assert all(same)
        assert [each['area'] for each in ours] == [int(masks.area(each['segmentation'])) for each in ours]
        with Image.open(tmp_path / 'drawn' / image['file_name']) as drawn:
            assert drawn.size == (64, 64)


def test_ids_of_an_annotation_file_are_kept(models, shapes, tmp_path) -> None:
    path = shapes / 'coco' / 'annotations' / 'instances_val2017.json'
    truth = COCO(str(path))
    changed = dict(truth.dataset, categories=[dict(each, id=each['id'] * 10) for each in truth.dataset['categories']])
    changed['images'] = [dict(each, id=each['id'] + 100) for each in changed['images']]
    (tmp_path / 'mine.json').write_text(json.dumps(changed))
    run(
        models['mmdet'],
        tmp_path / 'mine.json',
        tmp_path / 'out',
        image_folder=str(shapes / 'coco' / 'val2017'),
        draw=False,
    )
    found = COCO(str(tmp_path / 'out' / 'predictions.json'))
    assert set(found.imgs) == {each['id'] for each in changed['images']}
    assert {each['name']: each['id'] for each in found.dataset['categories']} == {
        each['name']: each['id'] for each in changed['categories']
    }
    assert not (tmp_path / 'out' / 'drawn').exists()
    changed['categories'][0]['name'] = 'Disc'
    (tmp_path / 'mine.json').write_text(json.dumps(changed))
    with pytest.raises(CommandError, match='has no category disc'):
        run(models['mmdet'], tmp_path / 'mine.json', tmp_path / 'other', image_folder=str(shapes / 'coco' / 'val2017'))


def test_label_maps_are_those_of_mmsegs_inferencer(models, images, tmp_path) -> None:
    from mmseg.apis import MMSegInferencer

    result = run(models['mmseg'], images, tmp_path)
    assert result.files == [tmp_path / 'labels', tmp_path / 'drawn']
    inferencer = MMSegInferencer(*models['mmseg'], device='cpu')
    for path in sorted(images.iterdir()):
        with Image.open(tmp_path / 'labels' / f'{path.stem}.png') as labels:
            assert labels.mode == 'P' and labels.getpalette()[:6] == [90, 90, 90, 230, 60, 60]
            assert np.array_equal(np.asarray(labels), inferencer(str(path))['predictions'])
        assert (tmp_path / 'drawn' / path.name).is_file()


def test_classes_are_those_of_mmpretrains_inferencer(models, images, tmp_path) -> None:
    from mmpretrain import ImageClassificationInferencer

    run(models['mmpretrain'], images, tmp_path)
    with open(tmp_path / 'predictions.csv', newline='') as file:
        rows = {row['image']: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(path.name for path in images.iterdir())
    inferencer = ImageClassificationInferencer(
        models['mmpretrain'][0], pretrained=models['mmpretrain'][1], device='cpu'
    )
    for path in images.iterdir():
        (expected,) = inferencer(str(path))
        order = np.argsort(-expected['pred_scores'])
        assert [rows[path.name][f'class_{place}'] for place in range(1, 6)] == [NAMES[label] for label in order[:5]]
        assert float(rows[path.name]['score_1']) == pytest.approx(expected['pred_score'], abs=1e-4)
        assert (tmp_path / 'drawn' / path.name).is_file()


def test_predictors_of_the_three_libraries_share_a_process(models, images) -> None:
    """Their own inferencers do not: one leaves its default scope to the next."""
    path = min(images.iterdir())
    predictors = {host: Predictor(*models[host], device='cpu', score_thr=0.0) for host in HOSTS}
    for predictor in predictors.values():
        (result,) = predictor(path)
        (again,) = predictor([cv2.imread(str(path))])
        for one, other in zip(_values(result), _values(again), strict=True):
            assert torch.equal(one, other)
        drawn = predictor.draw(path, result)
        assert drawn.dtype == np.uint8 and drawn.shape == (64, 64, 3)
        assert not np.array_equal(drawn, cv2.imread(str(path))[:, :, ::-1])


def _values(sample) -> list[torch.Tensor]:
    if 'pred_instances' in sample:
        return [sample.pred_instances[name] for name in ('bboxes', 'scores', 'labels', 'masks')]
    return [sample.pred_sem_seg.data] if 'pred_sem_seg' in sample else [sample.pred_score]


def test_an_interrupted_run_goes_on(models, images, tmp_path, monkeypatch) -> None:
    whole = run(models['mmdet'], images, tmp_path / 'whole', batch_size=1)
    assert whole.predicted == 4
    compute, calls = Predictor.predict_batch, []

    def stops(self, prepared):
        calls.append(prepared)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, 'predict_batch', stops)
        with pytest.raises(KeyboardInterrupt):
            run(models['mmdet'], images, tmp_path / 'parts', batch_size=1)
    assert not (tmp_path / 'parts' / 'predictions.json').exists()
    with open(tmp_path / 'parts' / 'records.jsonl', 'a') as file:
        file.write('{"id": "torn')
    parts = run(models['mmdet'], images, tmp_path / 'parts', batch_size=1)
    assert (parts.predicted, parts.kept) == (2, 2)
    for name in ('predictions.json', 'records.jsonl'):
        assert (tmp_path / 'whole' / name).read_text() == (tmp_path / 'parts' / name).read_text()
    weights = torch.load(models['mmdet'][1], weights_only=True)
    weights['state_dict']['roi_head.bbox_head.fc_cls.bias'] += 1
    torch.save(weights, tmp_path / 'other.pth')
    with pytest.raises(CommandError, match='another model'):
        run((models['mmdet'][0], tmp_path / 'other.pth'), images, tmp_path / 'parts')


def test_processes_divide_whole_batches() -> None:
    for world in (1, 2, 3, 7):
        shares = [Processes(rank, world, torch.device('cpu')).share(range(20), 3) for rank in range(world)]
        assert sorted(sum(shares, [])) == list(range(20))
        assert all(share[:3] == [3 * rank, 3 * rank + 1, 3 * rank + 2] for rank, share in enumerate(shares[:6]))


def test_an_error_of_the_first_process_is_that_of_all(tmp_path) -> None:
    def refuse() -> None:
        raise CommandError('another model')

    def run_in(rank: int) -> None:
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=rank, world_size=2)
        with pytest.raises(CommandError, match='^another model$'):
            Processes(rank, 2, torch.device('cpu')).in_first(refuse)
        Processes(rank, 2, torch.device('cpu')).in_first((tmp_path / 'opened').mkdir)
        torch.distributed.destroy_process_group()

    started = [multiprocessing.get_context('fork').Process(target=run_in, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    assert (tmp_path / 'opened').is_dir()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_one_process_goes_on_where_one_of_two_was_killed(models, images, tmp_path, monkeypatch) -> None:
    run(models['mmdet'], images, tmp_path / 'whole', batch_size=1)
    monkeypatch.setattr(Processes, 'wait', lambda self: None)
    monkeypatch.setattr(Processes, 'gather', lambda self, values: list(values))
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', lambda values: None)
    options = PredictOptions(*models['mmdet'], [str(images)], str(tmp_path / 'parts'), batch_size=1, workers=0)
    for rank in range(2):
        _predict(options, Processes(rank, 2, torch.device('cpu')))
    with open(tmp_path / 'parts' / 'records-1.jsonl', 'a') as file:
        file.write('{"id": "torn')
    # Two of four images by the first process, and of the other two one by the second.
    assert (run(models['mmdet'], images, tmp_path / 'parts', batch_size=1)).kept == 3
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize(('host', 'count'), [('mmdet', 2), ('mmseg', 3), ('mmpretrain', 3)])
def test_processes_share_the_images(host, count, models, images, tmp_path, environment, free_port) -> None:
    shutil.copytree(images, tmp_path / 'in')
    for path in sorted(images.iterdir()):
        with Image.open(path) as image:
            image.resize((80, 48)).save(tmp_path / 'in' / f'wide-{path.name}')
    (tmp_path / 'in' / 'words.png').write_text('no image')
    arguments = [*models[host], tmp_path / 'in', '--out', tmp_path / 'shared', '--workers', '0', '--batch-size', '2']
    launch = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={count}', f'--master_port={free_port}']
    command = [*map(str, [*launch, TOOL, *arguments]), '--device', 'cpu', '--launcher', 'pytorch']
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and result.stderr.count('error: 1 images could not be read') == 1, result.stderr
    assert result.stdout.count('predicted on 8 images') == 1
    alone = run(models[host], tmp_path / 'in', tmp_path / 'alone', batch_size=2)
    assert alone.predicted == 8
    assert contents(tmp_path / 'shared') == contents(tmp_path / 'alone')
    if host == 'mmpretrain':
        weights = torch.load(models[host][1], weights_only=True)
        weights['state_dict']['head.fc.bias'] += 1
        torch.save(weights, tmp_path / 'other.pth')
        command[command.index(models[host][1])] = str(tmp_path / 'other.pth')
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode != 0 and 'holds predictions of another model' in result.stderr
        assert 'predict.py", line' not in result.stderr, result.stderr


def test_images_that_cannot_be_read_do_not_stop_the_rest(models, images, tmp_path, tool, capsys) -> None:
    folder = tmp_path / 'in'
    shutil.copytree(images, folder)
    (folder / 'words.png').write_text('no image')
    command = [*models['mmpretrain'], str(folder), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert tool.main(command) == 2
    captured = capsys.readouterr()
    assert 'predicted on 4 images' in captured.out
    assert f'unreadable: {folder / "words.png"}: no image, or damaged' in captured.err
    assert [each['id'] for each in read(tmp_path / 'out' / 'unreadable.jsonl')] == ['words.png']
    (folder / 'words.png').unlink()
    assert tool.main(command) == 0
    assert not (tmp_path / 'out' / 'unreadable.jsonl').exists()


def test_results_of_two_images_do_not_share_a_file(models, images, tmp_path) -> None:
    path = min(images.iterdir())
    for suffix in ('.png', '.bmp'):
        with Image.open(path) as image:
            image.save(tmp_path / f'same{suffix}')
    with pytest.raises(CommandError, match='would both be written to'):
        run(models['mmseg'], tmp_path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def large(images) -> np.ndarray:
    """An image of 96x160 pixels."""
    one, other = (cv2.imread(str(path)) for path in sorted(images.iterdir())[:2])
    return np.tile(np.hstack([one, other]), (2, 2, 1))[:96, :160].copy()


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_windows_are_predicted_on_like_images(host, models, large) -> None:
    predictor = Predictor(*models[host], device='cpu', window=64, overlap=16, batch_size=2)
    (result,) = predictor([large])
    whole = Predictor(*models[host], device='cpu')
    (corner,) = whole([large[:64, :64].copy()])
    if host == 'mmseg':
        # The core of the first window is that which no other sees better.
        assert result.pred_sem_seg.data.shape == (1, 96, 160)
        assert torch.equal(result.pred_sem_seg.data[0, :48, :56].long(), corner.pred_sem_seg.data[0, :48, :56])
        return
    boxes = result.pred_instances.bboxes
    assert boxes[:, 0::2].max() > 64 and boxes[:, 1::2].max() > 64
    assert result.pred_instances.masks[0]['size'] == [96, 160]
    centres = (corner.pred_instances.bboxes[:, :2] + corner.pred_instances.bboxes[:, 2:]) / 2
    (inside,) = torch.nonzero((centres[:, 0] < 48) & (centres[:, 1] < 48), as_tuple=True)
    kept = {tuple(box) for box in boxes.round(decimals=1).tolist()}
    best = corner.pred_instances.bboxes[inside].round(decimals=1).tolist()[:1]
    assert all(tuple(box) in kept for box in best)


def test_huge_images_are_drawn_small_and_kept_whole(models, large, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('ssm_backbones.prediction.drawing.MAX_SIDE', 80)
    cv2.imwrite(str(tmp_path / 'large.png'), large)
    for host in ('mmdet', 'mmseg'):
        run(models[host], tmp_path / 'large.png', tmp_path / host, window=[64], score_thr=0.0)
        with Image.open(tmp_path / host / 'drawn' / 'large.png') as drawn:
            assert drawn.size == (80, 48)
    with Image.open(tmp_path / 'mmseg' / 'labels' / 'large.png') as labels:
        assert labels.size == (160, 96)


def test_windows_are_not_for_classifiers(models, images, tmp_path) -> None:
    with pytest.raises(CommandError, match='classifier'):
        run(models['mmpretrain'], images, tmp_path / 'out', window=[32])


def test_scores_that_do_not_fit_into_memory_are_refused_with_the_remedy() -> None:
    from ssm_backbones.apis.images import UnreadableImage

    sizes = Sizes(None, 10**9, score_bytes=1200, memory=2**33)
    sizes.check((2000, 3000))
    with pytest.raises(UnreadableImage, match='112 GiB.*window'):
        sizes.check((10_000, 10_000))
    Sizes((1024, 1024), 10**9, 1200, 2**33).check((10_000, 10_000))


@pytest.mark.parametrize('host', ['mmseg', pytest.param('mmdet', marks=pytest.mark.slow)])
def test_videos(host, models, images, tmp_path) -> None:
    video = tmp_path / 'clip.mp4'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*'mp4v'), 12, (64, 64))
    for path in sorted(images.iterdir()):
        writer.write(cv2.imread(str(path)))
    writer.release()
    result = run(models[host], video, tmp_path / 'out')
    assert result.predicted == 4
    assert [each['id'] for each in read(tmp_path / 'out' / 'records.jsonl')] == [
        f'clip/{place:06d}.jpg' for place in range(4)
    ]
    drawn = cv2.VideoCapture(str(tmp_path / 'out' / 'drawn' / 'clip.mp4'))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (4, 12)
    assert run(models[host], video, tmp_path / 'out').kept == 4


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(score_thr=2.0), 'score_thr must be between 0 and 1'),
        (dict(window=[8], overlap=8), 'window must be larger than overlap=8'),
    ],
)
def test_bad_options(options, message, models, images, tmp_path) -> None:
    with pytest.raises(CommandError, match=message):
        run(models['mmseg'], images, tmp_path / 'out', **options)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('host', 'code'),
    [
        (
            'mmdet',
            "from mmdet.apis import DetInferencer\nDetInferencer({config!r}, {weights!r}, device='cpu')({image!r})",
        ),
        (
            'mmseg',
            "from mmseg.apis import MMSegInferencer\nMMSegInferencer({config!r}, {weights!r}, device='cpu')({image!r})",
        ),
        (
            'mmpretrain',
            'from mmpretrain import ImageClassificationInferencer\n'
            "ImageClassificationInferencer({config!r}, pretrained={weights!r}, device='cpu')({image!r})",
        ),
    ],
)
def test_inferencers_open_trained_checkpoints_in_a_fresh_process(
    host, code, write_config, images, tmp_path, train, environment
) -> None:
    """The checkpoint of a run, with mmengine's history in it; nothing but the config imports this package."""
    short = (
        'train_cfg = dict(max_iters=1, val_interval=1)'
        if host == 'mmseg'
        else 'train_cfg = dict(max_epochs=1, val_interval=1)'
    )
    hooks = '\ndefault_hooks = dict(checkpoint=dict(interval=1))'
    config = write_config(host, short + hooks)
    train(config, work_dir=str(tmp_path / 'work'))
    (weights,) = (tmp_path / 'work').glob('*_1.pth')
    # Where torchvision does not fit torch, mmseg itself needs this package's repair of it.
    start = 'try:\n    import torchvision\nexcept RuntimeError:\n    import ssm_backbones\n'
    filled = start + code.format(config=str(config), weights=str(weights), image=str(min(images.iterdir())))
    done = subprocess.run([sys.executable, '-c', filled], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
