"""The ops: schema, reference, fake kernel and autograd.Function of each family, one file a family."""

from . import add_act, batch_norm_act, batch_norm_act_max_pool, batch_norm_sync, conv1x1_bn_act, registry

__all__ = ["add_act", "batch_norm_act", "batch_norm_act_max_pool", "batch_norm_sync", "conv1x1_bn_act", "registry"]
