"""``python -m ssm_backbones``: one page on what is installed, what serves which device, and what needs fixing.

Where the package itself cannot be imported, since PyTorch or mmengine is missing, the same page is printed by Python on
its folder, ``python path/to/ssm_backbones``, which imports nothing first.
"""

import importlib
import sys

if not __package__:
    from pathlib import Path

    # Python has put this folder first, whose modules would hide others of their names.
    folder = Path(__file__).resolve().parent
    sys.path[0] = str(folder)
    main = importlib.import_module('doctor').main
    sys.path[0] = str(folder.parent)
else:
    from ssm_backbones.doctor import main

if __name__ == '__main__':
    sys.exit(main())
