"""Export feature maps to files, and read them back."""

from ssm_backbones.features.dataset import FeatureDataset

__all__ = ['FeatureDataset']
