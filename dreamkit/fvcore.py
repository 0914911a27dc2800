"""The parts of fvcore that dreamkit uses, without the warnings that importing it gives."""

import warnings

with warnings.catch_warnings():
    # fvcore scripts its losses at import, which newer torch calls deprecated.
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.precise_bn import update_bn_stats

__all__ = ["FlopCountAnalysis", "update_bn_stats"]
