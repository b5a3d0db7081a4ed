"""Predict on images and videos with a config and a checkpoint: in Python, or into files."""

from ssm_backbones.prediction.predictor import Predictor
from ssm_backbones.prediction.run import PredictOptions, PredictResult, predict

__all__ = ['PredictOptions', 'PredictResult', 'Predictor', 'predict']
