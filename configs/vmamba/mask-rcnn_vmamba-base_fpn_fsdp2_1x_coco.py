# The 1x training with the backbone's blocks divided among the processes: tools/dist_train.sh starts it.
_base_ = './mask-rcnn_vmamba-base_fpn_1x_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(type='FSDP2Strategy', param_dtype='bfloat16', activation_checkpointing=True)
