"""The names and shapes in the authors' published files, read from published_layouts.txt."""

import functools
from pathlib import Path

_FILE = Path(__file__).with_name('published_layouts.txt')


@functools.cache
def published_layouts():
    """Family, such as 'VMamba v2', and model, such as 'tiny-s1l8', to {name: shape as a list}."""
    layouts = {}
    for line in _FILE.read_text(encoding='utf-8').splitlines():
        if line.startswith('['):
            family, _, models = line[1:].partition('] ')
            section = [layouts.setdefault((family, model), {}) for model in models.split()]
            depths = [{} for _ in section]
        elif line and not line.startswith('#'):
            name, *cells = line.split()
            cells = cells if len(cells) == len(section) else cells * len(section)
            for layout, depth, cell in zip(section, depths, cells, strict=True):
                _add(layout, depth, name, cell)
    return layouts


def _add(layout, depth, name, cell):
    if name.endswith('.blocks') or name[:-1].endswith('stages.'):
        depth[name] = int(cell)
        return
    shape = [int(size) for size in cell.split('x')]
    stage, star, rest = name.partition('.*.')
    if star:
        layout.update({f'{stage}.{block}.{rest}': shape for block in range(depth[stage])})
    else:
        stage = name.partition('.END')[0]
        layout[name.replace('END', str(depth.get(stage)))] = shape
