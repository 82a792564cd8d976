"""Every kernel compiles for three GPUs, without one, within what they have; and the gate that says so can fail."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cfkernels
from cfkernels import triton_support

TOOL = Path(__file__).resolve().parents[2] / "tools" / "kernel_resources.py"
ARCHITECTURES = {80, 86, 90}


def run(*words, **environment):
    """The tool in a process of its own; `TRITON_INTERPRET` is read when kernels are defined."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, TOOL, *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=inherited | environment)


@pytest.fixture(scope="module")
def tool():
    """The tool as a module, in this process: for what needs no compiler."""
    spec = importlib.util.spec_from_file_location("kernel_resources", TOOL)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOL.parent)  # its cases lie beside it
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def kernels():
    """Names of all functions that end in `_kernel`, in the files where kernels live."""
    files = Path(cfkernels.__path__[0]).glob("*/kernel.py")
    nodes = [node for path in files for node in ast.parse(path.read_text()).body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}


def test_every_kernel_compiles_for_every_architecture_within_its_limits(tmp_path):
    done = run("-o", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    compiled = {}
    for row in report["rows"]:
        compiled.setdefault(row["kernel"], set()).add(row["arch"])
    assert compiled == dict.fromkeys(kernels(), ARCHITECTURES)
    assert report["complaints"] == []
    assert {"triton", "torch", "ptxas", "cpu", "cores", "commit", "dirty"} <= report.keys()


@pytest.mark.slow
def test_rarer_configurations_compile_too():
    done = run("--all", "--markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| kernel | case | sm_80 | sm_86 | sm_90 |")


def test_the_gate_fails_and_names_kernel_architecture_and_numbers():
    done = run("--op", "dropout_add", "--arch", 86, "--limit-registers", 1000)
    assert done.returncode == 1
    text = "in each of 128 threads, there are 1000"
    lines = [line for line in done.stderr.splitlines() if line.endswith(text)]
    assert [line.partition(":")[0] for line in lines] == [
        "dropout_add_fwd_kernel (bf16), sm_86",
        "dropout_add_bwd_kernel (bf16), sm_86",
    ]


def test_machine_code_and_ptx_have_the_same_tensor_core_instructions(tmp_path):
    counts = []
    for words in ((), ("--machine-code",)):
        run("--op", "attention_column_sums", "--arch", 90, "-o", tmp_path / "report.json", *words)
        (row, *_) = json.loads((tmp_path / "report.json").read_text())["rows"]
        counts.append((row["counts"]["HGMMA"], row["counts"]["HMMA"]))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_the_gate_does_not_run_under_the_interpreter():
    done = run("--op", "dropout_add", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


FINE = {
    "op": "attention", "kernel": "some_kernel", "case": "head_dim 128", "dtype": "bf16", "arch": 90, "warps": 8,
    "stages": 2, "registers": 255, "spilled_bytes": 0, "shared_bytes": 227 * 1024, "serialized": None,
    "counts": {"HGMMA": 4, "HMMA": 0}, "head_dim": 128, "seconds": 1.0,
}  # fmt: skip
OLD = {"HGMMA": 0, "HMMA": 4}
NONE = {"HGMMA": 0, "HMMA": 0}
BROKEN = {
    "a spill": ({"spilled_bytes": 8}, "spills 8 bytes"),
    "shared memory, sm_90": ({"shared_bytes": 227 * 1024 + 1}, "takes 232449 bytes of shared memory, there are 232448"),
    "shared memory, sm_86": ({"arch": 86, "shared_bytes": 101_377, "counts": OLD}, "there are 101376"),
    "shared memory, sm_80": ({"arch": 80, "shared_bytes": 166_913, "counts": OLD}, "there are 166912"),
    "registers": ({"warps": 16}, "takes 255 registers in each of 512 threads, there are 65536"),
    "serialized wgmma": ({"serialized": "a reason"}, "ptxas serialized its wgmma: a reason"),
    "older tensor cores on sm_90": ({"counts": OLD}, "has 0 wgmma (HGMMA) and 4 older tensor core instructions (HMMA)"),
    "both on sm_90": ({"counts": {"HGMMA": 4, "HMMA": 1}}, "has 4 wgmma (HGMMA) and 1 older"),
    "no tensor cores on sm_86": ({"arch": 86, "shared_bytes": 0, "counts": NONE}, "uses no tensor cores"),
    "no tensor cores in narrow heads": ({"head_dim": 32, "counts": NONE}, "uses no tensor cores"),
}


@pytest.mark.parametrize(("changed", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_limit_is_a_complaint(tool, changed, text):
    (complaint,) = tool.complaints_about(tool.Resources(**FINE | changed))
    arch = changed.get("arch", 90)
    assert complaint.startswith(f"some_kernel (bf16, head_dim 128), sm_{arch}: ")
    assert text in complaint


ACCEPTED = {
    "wgmma": {},
    "older tensor cores before sm_90": {"arch": 80, "shared_bytes": 163 * 1024, "counts": OLD},
    "older tensor cores in narrow heads": {"head_dim": 32, "counts": OLD},
    "float32": {"dtype": "fp32", "counts": NONE},
    "what is no attention": {"head_dim": None, "counts": NONE},
    "what multiplies no matrices": {"kernel": "attention_delta_kernel", "counts": NONE},
}


@pytest.mark.parametrize("changed", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_keeps_to_the_limits_is_accepted(tool, changed):
    assert tool.complaints_about(tool.Resources(**FINE | changed)) == []


def kernel_with(*parameters):
    """What the tool reads of a kernel; each parameter is (name, is_constexpr, do_not_specialize)."""
    params = [
        SimpleNamespace(name=name, is_constexpr=constant, do_not_specialize=general, default=None)
        for name, constant, general in parameters
    ]
    function = SimpleNamespace(__module__="somewhere", __name__="a_kernel")
    return SimpleNamespace(params=params, arg_names=[param.name for param in params], fn=function)


def test_a_launch_becomes_what_tritons_launcher_would_compile(tool):
    names = ("x_ptr", "odd_ptr", "seed_ptr", "n", "stride", "one", "odd", "large", "scale")
    kernel = kernel_with(*((name, False, name == "n") for name in names), ("BLOCK", True, False))
    x = torch.empty(64, dtype=torch.bfloat16)
    arguments = (x, x[1:], None, 16, 512, 1, 7, 2**31, 0.5)
    launch = triton_support.Launch(kernel, (1,), arguments, {"BLOCK": 32, "num_warps": 8})
    one = tool.build(launch, 86)
    assert dict(one.signature) == {
        "x_ptr": "*bf16", "odd_ptr": "*bf16", "seed_ptr": "constexpr", "n": "i32", "stride": "i32", "one": "constexpr",
        "odd": "i32", "large": "i64", "scale": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip
    assert dict(one.constants) == {"seed_ptr": None, "one": 1, "BLOCK": 32}
    assert one.aligned == ("x_ptr", "stride", "large")
    assert dict(one.options) == {"enable_fp_fusion": True, "num_warps": 8}


@pytest.mark.parametrize(("general", "n_complaints"), [(False, 2), (True, 0)], ids=["specialised", "general"])
def test_a_kernel_that_is_compiled_anew_for_other_lengths_is_a_complaint(tool, general, n_complaints):
    kernel = kernel_with(("n_rows", False, general))

    def launches(dtype, grids):
        rows = sum(side * side for side in grids)
        triton_support.launch(kernel, (1,), rows)
        return torch.empty(rows), []

    _, complaints = tool.collect([tool.Case("an_op", "", torch.float32, launches)], [80])
    assert len(complaints) == n_complaints
    assert all(text.startswith("an_op, sm_80: a_kernel compiled anew for bags of") for text in complaints)


def test_tile_sizes_are_those_of_the_architecture_that_is_pretended(tool):
    device = torch.device("cpu")
    with tool.pretending(90):
        assert cfkernels.triton_support.architecture(device) == 90
    assert cfkernels.triton_support.architecture(device) == 86
