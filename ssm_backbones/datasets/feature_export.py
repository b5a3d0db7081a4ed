"""Former place of :class:`ssm_backbones.features.FeatureDataset`, kept for code that imports it from here."""

from ssm_backbones.features.dataset import FeatureDataset

__all__ = ['FeatureDataset']
