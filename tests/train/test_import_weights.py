"""`cftrain import-weights`: state dicts of the released code become models of ours."""

import json
import pickle

import pytest
import torch
from click.testing import CliRunner
from plain_crossfusion import PlainCrossFusion
from safetensors.torch import save_file

from cftrain.checkpoints import load_model, load_released, save_weights
from cftrain.cli import main
from cftrain.errors import WeightsError
from cftrain.models import BagBatch, build

KINDS = {
    "CrossFusion": "crossfusion",
    "CrossFusionConcat": "crossfusion-concat",
    "CrossFusionSingle": "crossfusion-single",
}


@pytest.fixture
def bags():
    torch.manual_seed(1)
    return {scale: torch.randn(n, 24) for scale, n in ((5, 3), (10, 7), (20, 19))}


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model_state_dict", "DataParallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_released_file_becomes_a_model_with_the_same_answers(tmp_path, bags, kind, wrapped):
    torch.manual_seed(2)
    plain = PlainCrossFusion(kind, embed_dim=32, layers=2, backbone_dim=24).eval()
    state = plain.state_dict()
    if wrapped == "DataParallel":
        state = {f"module.{key}": value for key, value in state.items()}
    elif wrapped:
        state = {wrapped: state, "epoch": 3}
    torch.save(state, tmp_path / "best_model.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "best_model.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"], told["options"]["n_layers"]) == (KINDS[kind], 24, 2)
    model = load_model(tmp_path / "best_model.safetensors")
    with torch.no_grad():
        logits = model(BagBatch.pack(["slide"], [bags])).logits[0]
        torch.testing.assert_close(logits, plain(*bags.values()), rtol=0, atol=1e-5)


def test_weights_of_a_run_can_be_read_back_with_their_options(tmp_path, bags):
    model = build("crossfusion", 24, embed_dim=32, n_heads=2, variant="text").eval()
    save_weights(model, tmp_path / "last.safetensors", epoch="7")
    again = load_model(tmp_path / "last.safetensors")
    assert again.options == model.options
    batch = BagBatch.pack(["slide"], [bags])
    assert torch.equal(again(batch).logits, model(batch).logits)


def test_safetensors_of_the_released_names_are_read_too(tmp_path):
    plain = PlainCrossFusion(embed_dim=32, backbone_dim=24)
    save_file(plain.state_dict(), tmp_path / "official.safetensors")
    assert load_released(tmp_path / "official.safetensors").name == "crossfusion"


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


def bad_files(folder):
    plain = PlainCrossFusion(embed_dim=32, backbone_dim=24).state_dict()
    (folder / "code.pt").write_bytes(pickle.dumps(Harmful()))
    (folder / "text.pt").write_text("epoch,loss\n1,0.5\n")
    (folder / "empty.pt").write_bytes(b"")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"layer.weight": torch.zeros(2)}, folder / "other.pt")
    torch.save({key: value for key, value in plain.items() if key != "c_lin_proj.1.bias"}, folder / "missing.pt")
    (folder / "text.safetensors").write_text("nothing")


BAD = {
    "code.pt": "never loaded",
    "text.pt": "cannot be read as a state dict",
    "empty.pt": "cannot be read as a state dict",
    "list.pt": "holds a list, not tensors by name",
    "other.pt": r"these 1 tensors are no released weights of abmil, .*: layer\.weight",
    "missing.pt": r"do not have the same tensors: coarse_projection\.1\.bias",
    "text.safetensors": "cannot be read",
}


@pytest.mark.parametrize(("name", "message"), BAD.items(), ids=BAD.keys())
def test_a_bad_file_is_refused_by_name_and_nothing_in_it_runs(tmp_path, capsys, name, message):
    bad_files(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        load_released(tmp_path / name)
    assert name in str(error.value)
    assert "this ran" not in capsys.readouterr().out


def test_heads_that_do_not_fit_are_refused(tmp_path):
    torch.save(PlainCrossFusion(embed_dim=32, backbone_dim=24).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt: crossfusion: embed_dim must be a multiple of n_heads"):
        load_released(tmp_path / "w.pt", n_heads=5)


def test_weights_that_do_not_say_what_they_are_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="does not say which model it is"):
        load_model(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_model(tmp_path / "not there.safetensors")


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    torch.save(PlainCrossFusion(embed_dim=32, backbone_dim=24).state_dict(), tmp_path / "w.pt")
    call = ["import-weights", str(tmp_path / "w.pt")]
    assert CliRunner().invoke(main, call).exit_code == 0
    again = CliRunner().invoke(main, call)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert CliRunner().invoke(main, [*call, "--force"]).exit_code == 0
