#!/usr/bin/env python
"""Train a model from an mmpretrain, mmdet or mmseg config."""

import sys

from ssm_backbones.cli import train_main

if __name__ == '__main__':
    sys.exit(train_main())
