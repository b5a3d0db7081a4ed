"""Contact sheets and curves."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ssm_backbones.visualization.curves import History, read_history, save_curves
from ssm_backbones.visualization.sheets import (
    Instances,
    draw_instances,
    draw_label_map,
    draw_scores,
    save_contact_sheet,
)

CLASSES, PALETTE = ('disc', 'ring'), ((230, 60, 60), (60, 130, 240))


def instances(n: int, scores: bool = True) -> Instances:
    masks = np.zeros((n, 20, 30), dtype=bool)
    masks[:, 4:12, 5:15] = True
    boxes = np.tile([5.0, 4.0, 15.0, 12.0], (n, 1))
    return Instances(np.arange(n) % 2, boxes, masks, np.full(n, 0.75) if scores else None)


@pytest.mark.parametrize('scores', [True, False])
def test_draws_in_the_class_s_colour_and_leaves_the_rest(scores) -> None:
    image = np.full((20, 30, 3), 128, dtype=np.uint8)
    drawn = draw_instances(image, instances(1, scores), CLASSES, PALETTE, zoom=4)
    assert drawn.shape == (80, 120, 3) and drawn.dtype == np.uint8
    inside = drawn[36, 45].astype(int)
    assert inside[0] > 150 and inside[1] < 120
    assert (drawn[70:, 80:] == 128).all()


def test_draws_nothing_where_nothing_was_found() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw_instances(image, instances(0), CLASSES, PALETTE, zoom=1), image)


def test_label_map_in_the_classes_colours_and_dark_where_ignored() -> None:
    image = np.full((2, 3, 3), 200, dtype=np.uint8)
    labels = np.array([[0, 1, 255], [1, 1, 0]], dtype=np.uint8)
    drawn = draw_label_map(image, labels, PALETTE, zoom=2)
    assert drawn.shape == (4, 6, 3) and drawn.dtype == np.uint8
    red, blue, dark = drawn[0, 0].astype(int), drawn[0, 2].astype(int), drawn[0, 4].astype(int)
    assert red[0] > red[2] and blue[2] > blue[0] and dark.max() < min(red.max(), blue.max())
    with pytest.raises(ValueError, match='label 2 has no colour; the palette has 2'):
        draw_label_map(image, labels + np.uint8(1), PALETTE)


def test_scores_are_green_where_right_and_red_where_wrong() -> None:
    scores = np.array([0.9, 0.1])
    right, wrong = (draw_scores(scores, truth, CLASSES, (60, 200)).astype(int) for truth in (0, 1))
    assert right.shape == (60, 200, 3)
    bar = 15, 80
    assert right[bar][1] > right[bar][0] and wrong[bar][0] > wrong[bar][1]


def test_contact_sheet(tmp_path) -> None:
    left, right = (np.full((40, 60, 3), value, dtype=np.uint8) for value in (10, 200))
    save_contact_sheet([(left, right)] * 3, ('truth', 'prediction'), 'heading', tmp_path / 'sheet.png')
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png'))
    assert sheet.shape[0] > 2 * 40 and sheet.shape[1] > 4 * 60
    # Three pairs, in two columns: the place of each image, by its upper left corner.
    for value, corners in ((10, [(76, 10), (126, 10), (76, 164)]), (200, [(76, 74), (126, 74), (76, 228)])):
        for top, left in corners:
            assert (sheet[top : top + 40, left : left + 60] == value).all(), (value, top, left)
        assert (sheet == value).all(axis=2).sum() == 3 * 40 * 60
    assert [path.name for path in tmp_path.iterdir()] == ['sheet.png']
    with pytest.raises(ValueError, match='at least one pair'):
        save_contact_sheet([], ('truth', 'prediction'), 'heading', tmp_path / 'sheet.png')


def write_log(work_dir, run: str, records: list[dict]) -> None:
    folder = work_dir / run / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)) + '\n')


def test_history_joins_an_interrupted_training_with_its_continuation(tmp_path) -> None:
    def step(iteration: int, loss: float) -> dict:
        epoch = (iteration - 1) // 4 + 1
        return dict(loss=loss, loss_cls=loss / 2, lr=0.1, epoch=epoch, iter=iteration, step=iteration)

    write_log(
        tmp_path, '20260101_000000', [step(2, 8.0), step(4, 7.0), {'coco/bbox_mAP': 0.1, 'step': 1}, step(6, 6.0)]
    )
    write_log(tmp_path, '20260101_000100', [step(6, 5.0), step(8, 4.0), {'coco/bbox_mAP': 0.2, 'step': 2}])
    history = read_history(tmp_path)
    assert history.losses == {
        'loss': [(0.5, 8.0), (1.0, 7.0), (1.5, 5.0), (2.0, 4.0)],
        'loss_cls': [(0.5, 4.0), (1.0, 3.5), (1.5, 2.5), (2.0, 2.0)],
    }
    assert history.metrics == {'coco/bbox_mAP': [(1, 0.1), (2, 0.2)]}


def test_curves_are_those_of_the_history(tmp_path, monkeypatch) -> None:
    history = History(
        losses={'loss': [(0.5, 8.0), (1.0, 7.0)], 'loss_cls': [(0.5, 4.0), (1.0, 3.5)]},
        metrics={'coco/bbox_mAP': [(1, 10.0), (2, 20.0)], 'coco/bbox_mAP_50': [(1, 30.0)]},
    )
    figures, savefig = [], Figure.savefig

    def keep(self, *args, **kwargs) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', keep)
    shown = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
    save_curves(history, shown, 'heading', tmp_path / 'curves.png', scale=0.01)
    (figure,) = figures
    losses, metrics = ({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes)
    assert losses == {'total': [[0.5, 8.0], [1.0, 7.0]], 'cls': [[0.5, 4.0], [1.0, 3.5]]}
    assert metrics.keys() == {'box AP'}, 'a metric that was not logged has no curve, one that was not asked for neither'
    np.testing.assert_allclose(metrics['box AP'], [[1, 0.1], [2, 0.2]])
    assert [text.get_text() for text in figure.axes[1].texts] == ['0.200']
    assert figure.get_suptitle() == 'heading' and all(axes.get_xlabel() == 'epoch' for axes in figure.axes)
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.format == 'PNG' and image.convert('RGB').getextrema() != ((255, 255),) * 3
    assert [path.name for path in tmp_path.iterdir()] == ['curves.png']


def test_history_by_iteration(tmp_path) -> None:
    steps = [{'loss': 4.0 - i, 'decode.loss_ce': 1.0, 'iter': i, 'step': i} for i in (1, 2)]
    write_log(tmp_path, '20260101_000000', [*steps, {'mIoU': 20.0, 'aAcc': 60.0, 'data_time': 0.1, 'step': 2}])
    history = read_history(tmp_path)
    assert history.unit == 'iteration'
    assert history.losses == {'loss': [(1, 3.0), (2, 2.0)], 'decode.loss_ce': [(1, 1.0), (2, 1.0)]}
    assert history.metrics == {'mIoU': [(2, 20.0)], 'aAcc': [(2, 60.0)]}


def test_no_history(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match='no training was logged'):
        read_history(tmp_path)
