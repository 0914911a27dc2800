"""Regularizers: the terms of R(x̂) in DeepInversion."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_regularizers(register: Register) -> None:
    """Register the terms of DeepInversion, of generators, and of networks without BatchNorm."""
    register("tv", "dreamkit.regularizers.tv:TotalVariation")
    register("l2", "dreamkit.regularizers.l2:L2Norm")
    register("bn_feature", "dreamkit.regularizers.bn_feature:BNFeature")
    register("js_compete", "dreamkit.regularizers.js_compete:JSCompete")
    register("one_hot", "dreamkit.regularizers.one_hot:OneHot")
    register("information_entropy", "dreamkit.regularizers.information_entropy:InformationEntropy")
    register("activation", "dreamkit.regularizers.activation:Activation")
    register("patch_similarity", "dreamkit.regularizers.patch_similarity:PatchSimilarity")
    register("gram", "dreamkit.regularizers.gram:Gram")
    register("feature_prior", "dreamkit.regularizers.feature_prior:FeaturePrior")
    register("natural_spectrum", "dreamkit.regularizers.natural_spectrum:NaturalSpectrum")
    register("adversarial", "dreamkit.regularizers.adversarial:Adversarial")
