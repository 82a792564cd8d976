"""TransMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.options import ModelInfo, Options, check_positive, check_rate


@dataclass(frozen=True)
class TransMILConfig(Options):
    """Options of TransMIL; the defaults are those of its authors' code."""

    scale: int = 20
    """The one scale it looks at."""
    embed_dim: int = 512
    """Width of every token, a multiple of n_heads."""
    n_heads: int = 8
    """Attention heads."""
    n_landmarks: int = 256
    """Means of consecutive tokens that stand for all of them; half of embed_dim in the authors' code."""
    pinv_iterations: int = 6
    """Steps towards the pseudo-inverse of the attention among landmarks."""
    dropout: float = 0.1
    """Of what each attention adds to the tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "embed_dim", "n_heads", "n_landmarks", "pinv_iterations", "n_bins")
        check_rate(self, "dropout")
        if self.embed_dim % self.n_heads:
            found = f"embed_dim={self.embed_dim}, n_heads={self.n_heads}"
            raise ConfigError(f"transmil: embed_dim must be a multiple of n_heads, got {found}")


TRANSMIL = ModelInfo(
    name="transmil",
    scales=(20,),
    reference="Shao et al. 2021, arXiv:2106.00908; TransMIL of RustinS/CrossFusion",
    summary="One scale; two layers of Nyström attention with a class token, a pyramid of convolutions between.",
    options=TransMILConfig,
    maps={
        "attention": "Attention that a patch's place receives from the class token in the last layer, mean over "
        "heads, as the Nyström method approximates it: it may be slightly below 0."
    },
)
