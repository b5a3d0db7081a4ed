"""Fuzz the readers of checkpoints and of exported features by coverage: `make fuzz`.

Every input is read or refused by an error of our own; whatever else happens is a finding, which atheris stores in the
working folder. Arguments are libFuzzer's, such as ``-max_total_time=600`` and a folder for the corpus.
"""

import io
import sys
import tempfile
from pathlib import Path

import atheris
import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parents[2]
# Not as tests.features: "tests" may be a package of another project.
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'features')]

with atheris.instrument_imports(include=['ssm_backbones.checkpoints', 'ssm_backbones.features']):
    from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint, read_checkpoint
    from ssm_backbones.features import FeatureDataset
    from ssm_backbones.features.store import read_records
from exports import write_export

from ssm_backbones.utils.errors import CommandError

FOLDER = Path(tempfile.mkdtemp(prefix='fuzz-'))
EXPORT = write_export(FOLDER / 'export')
(SHARD,) = (EXPORT / 'features').iterdir()
CHECKPOINTS = ('checkpoint.pth', 'checkpoint.safetensors')
PARTS = {path: path.read_bytes() for path in (EXPORT / 'export.json', EXPORT / 'index.jsonl', SHARD)}


def seeds() -> list[bytes]:
    """A valid input for each reader; the first byte chooses it."""
    tensors = {'layers.0.weight': torch.ones(2, 3), 'layers.0.bias': torch.ones(3)}
    buffers = [io.BytesIO(), io.BytesIO()]
    torch.save({'state_dict': tensors, 'meta': {'epoch': 1}}, buffers[0])
    torch.save({'state_dict': tensors}, buffers[1], _use_new_zipfile_serialization=False)
    contents = [(0, buffers[0].getvalue()), (0, buffers[1].getvalue()), (1, save(tensors))]
    contents += [(2 + place, content) for place, content in enumerate(PARTS.values())]
    return [bytes([choice]) + content for choice, content in contents]


def read(data: bytes) -> None:
    """Give an input to the reader that its first byte chooses."""
    choice, content = (data[0] if data else 0) % 5, data[1:]
    if choice < 2:
        path = FOLDER / CHECKPOINTS[choice]
        path.write_bytes(content)
        try:
            convert_checkpoint(read_checkpoint(path))
        except (CheckpointError, CommandError):
            pass
        return
    path = list(PARTS)[choice - 2]
    path.write_bytes(content)
    try:
        list(read_records(EXPORT))
        dataset = FeatureDataset(EXPORT, crop=True)
        for index in range(min(len(dataset), 4)):
            dataset.cell_edges(index)
            dataset[index]
    except CommandError:
        pass
    finally:
        path.write_bytes(PARTS[path])


if __name__ == '__main__':
    corpus = FOLDER / 'corpus'
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / f'seed{number}').write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], read)
    atheris.Fuzz()
