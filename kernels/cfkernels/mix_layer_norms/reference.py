"""A weighted sum of LayerNorms in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mix_layer_norms_reference(
    maps: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    mix_weight: Tensor,
    mix_bias: Tensor,
    eps: float,
) -> Tensor:
    """As `cfkernels.mix_layer_norms`.

    What multiplies a LayerNorm may as well multiply its weight and bias: there D elements, not T x D.
    """
    normed: list[Tensor] = []
    for x, weight, bias, share in zip(maps, weights, biases, mix_weight.unbind(), strict=True):
        offset = share * bias if normed else share * bias + mix_bias
        parameters = (share * weight).to(x.dtype), offset.to(x.dtype)
        normed.append(functional.layer_norm(x, x.shape[-1:], *parameters, eps=eps).to(maps[0].dtype))
    return sum(normed[1:], start=normed[0])
