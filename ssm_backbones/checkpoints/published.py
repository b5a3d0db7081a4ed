"""URLs of the classifiers that the families' authors published, by family and arch."""

from __future__ import annotations

from ssm_backbones.backbones.base import SSMBackbone

_VMAMBA = 'https://github.com/MzeroMiko/VMamba/releases/download'
_MAMBA2D = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0'

# The same as in the families' metafile.yml. V2M's authors published none. Neither release names sizes or hashes.
CLASSIFIERS: dict[str, dict[str, str]] = {
    'VMamba': {
        'tiny-s1l8': f'{_VMAMBA}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth',
        'tiny-s2l5': f'{_VMAMBA}/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth',
        'small-s2l15': f'{_VMAMBA}/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth',
        'small-s1l20': f'{_VMAMBA}/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth',
        'base-s2l15': f'{_VMAMBA}/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth',
        'base-s1l20': f'{_VMAMBA}/%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth',
        'tiny-v0': f'{_VMAMBA}/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth',
        'small-v0': f'{_VMAMBA}/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
        'base-v0': f'{_VMAMBA}/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth',
    },
    'Mamba2D': {
        'nano': f'{_MAMBA2D}/M2D-N-backbone.ckpt',
        'tiny': f'{_MAMBA2D}/M2D-T-backbone.ckpt',
        'small': f'{_MAMBA2D}/M2D-S-backbone.ckpt',
    },
}


def published_classifier(family: type[SSMBackbone], arch: str) -> str | None:
    """Return the URL of the published classifier of an arch, named or by its alias; None without one."""
    aliases: dict[str, str] = getattr(family, 'ALIASES', {})
    return CLASSIFIERS.get(family.__name__, {}).get(aliases.get(arch, arch))
