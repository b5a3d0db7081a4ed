#!/usr/bin/env python
"""Test a model from an mmpretrain, mmdet or mmseg config."""

import sys

from ssm_backbones.cli import test_main

if __name__ == '__main__':
    sys.exit(test_main())
