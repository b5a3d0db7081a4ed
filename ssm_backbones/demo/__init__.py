"""Demos of each family and task: generate data, train a small model, evaluate it, and report the results."""

from ssm_backbones.demo.catalogue import DEMOS, Demo
from ssm_backbones.demo.run import run_demo

__all__ = ['DEMOS', 'Demo', 'run_demo']
