"""The backbones under timm's names: ``import ssm_backbones.timm``, then ``timm.create_model('vmamba_tiny')``.

So does everything that builds its backbones by ``timm.create_model``, segmentation_models_pytorch's
``'tu-vmamba_tiny'`` and transformers' ``TimmBackbone`` among them. timm is needed (``pip install
'ssm-backbones[timm]'``); ``import ssm_backbones`` alone does not import it.
"""

from ssm_backbones.compat import keep_names_in_transformers
from ssm_backbones.timm.classifier import SSMClassifier
from ssm_backbones.timm.entrypoints import MODELS
from ssm_backbones.timm.features import SSMFeatures

keep_names_in_transformers()

__all__ = ['MODELS', 'SSMClassifier', 'SSMFeatures']
