"""``python -m cuda_ops``: what is compiled, for which torch, and which backend serves which device."""

import torch

from cuda_ops import _library


def report() -> str:
    """The state of the compiled library and of each device, as lines of text."""
    status = _library.STATUS
    lines = [f'torch                {torch.__version__}',
             f'compiled library     {"in use" if status.compiled else "not in use"}: {status.reason}']
    lines += [f'  {key:<18} {value}' for key, value in status.info.items()]
    for device, present in (('cpu', True), ('cuda', torch.cuda.is_available())):
        if not present:
            serves = 'no such device here'
        elif device in status.devices:
            serves = 'compiled kernels'
            if device == 'cpu':
                serves += f', {torch.ops.cuda_ops.cpu_capability()} instructions'
        else:
            serves = f'PyTorch reference: {_library.why_reference(device)}'
        lines.append(f'{device:<20} {serves}')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(report())
