"""torch.compile takes the whole model as one graph, in evaluation and in training, and computes the same."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from cftrain.models import BagBatch, build

D = 24
NAMES = ("crossfusion", "crossfusion-concat", "crossfusion-single", pytest.param("transmil", marks=pytest.mark.slow))


def one_batch():
    generator = torch.Generator().manual_seed(5)
    bags = [
        {scale: torch.randn(n, D, generator=generator) for scale, n in zip((5, 10, 20), sizes, strict=True)}
        for sizes in ((2, 7, 19), (3, 4, 5))
    ]
    return BagBatch.pack(["a", "b"], bags)


def gradients(model, forward):
    model.zero_grad()
    torch.manual_seed(3)  # the same dropout masks
    output = forward(one_batch())
    output.risk.sum().backward()
    return output.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_when_compiled(name, training, backend):
    torch._dynamo.reset()
    torch.manual_seed(2)
    model = build(name, D, embed_dim=32, n_heads=2).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    (ours, ours_grad), (theirs, theirs_grad) = gradients(model, model), gradients(model, compiled)
    assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert_close(theirs_grad, ours_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_one_graph(name, training):
    assert_same_when_compiled(name, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_compiles_it_for_the_cpu():
    assert_same_when_compiled("crossfusion", training=False, backend="inductor")
