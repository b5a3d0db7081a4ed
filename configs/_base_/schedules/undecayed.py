# What weight decay leaves alone in a backbone, beside norms: the scan's rates and gains and the position embedding,
# none of which anything should pull towards zero. The schedules take it into their custom keys. Mamba2D's authors do so
# too; VMamba's decay A_log and dt_bias, and in detectors and segmentors D (docs/recipes.md).
undecayed = {
    'mixer.D': dict(decay_mult=0.0),
    '.A_log': dict(decay_mult=0.0),
    '.dt_bias': dict(decay_mult=0.0),
    '.pos_embed': dict(decay_mult=0.0),
    '.cls_token': dict(decay_mult=0.0)
}
