"""``python -m cuda_ops``: what is compiled, for which torch, and which backend serves which device."""

from cuda_ops import backend_status

if __name__ == '__main__':
    print(backend_status())
