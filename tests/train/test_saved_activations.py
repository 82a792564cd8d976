"""What a training step of CrossFusion keeps for the backward with the Triton kernels, counted on fake tensors.

Fake tensors have shapes and no data: the largest slide of the paper passes through the model in seconds, without a GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cfkernels import using
from cftrain.models import BagBatch, build

KERNELS = ("attention", "dropout_add", "gelu_dropout", "grouped_window_conv", "layer_norm", "mix_layer_norms", "ppeg")
AVERAGE, LARGEST = (895, 3449, 13496), (8624, 34498, 137990)


def saved_bytes(sizes):
    """Bytes of all storages kept for the backward, features included, parameters not, in bfloat16."""
    model = build("crossfusion", 1024).to(torch.bfloat16).train()
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        using(**dict.fromkeys(KERNELS, "triton")),
    ):
        bags = {s: torch.empty(n, 1024, dtype=torch.bfloat16) for s, n in zip((5, 10, 20), sizes, strict=True)}
        assert model(BagBatch.pack(["slide"], [bags])).logits.shape == (1, 4)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


@pytest.mark.parametrize(("sizes", "gib"), [(AVERAGE, 0.53), (LARGEST, 4.8)], ids=["average", "largest"])
def test_what_is_kept_grows_with_patches_never_with_their_pairs(sizes, gib):
    """The largest slide has 34,498 x 137,990 pairs: 4 heads of them would be 38 GB."""
    assert saved_bytes(sizes) < gib * 2**30
