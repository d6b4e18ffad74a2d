"""`fusedres traffic`: the bytes of a training step, against the byte model of ResNet-50."""

from __future__ import annotations

import json

import pytest
import torch

from fusedres.cli import main
from fusedres.ops import folded_call, folding, registry
from fusedres.training import traffic


def run(options):
    return main(["traffic", *options.split()])


def megabytes(found, variant, *names):
    """Per image, of some ops."""
    ops = found["variants"][variant]["ops"]
    return sum(ops[name]["loads"] + ops[name]["stores"] for name in names)


@pytest.fixture(scope="module")
def resnet50():
    from fusedres.cli.traffic import measure

    return measure("resnet50", 256, 224, "bf16")


def test_eager_and_fused(resnet50):
    """348 MB per image, of which 314 are those of the regions that are fused, as in benchmarks/TRAFFIC.md."""
    eager, fused = (resnet50["variants"][v] for v in ("eager", "fused"))
    assert eager["batch_norm_and_elementwise"] == pytest.approx(348, abs=0.5)
    sums = megabytes(resnet50, "eager", "aten::add")  # of the gradients at the inputs of blocks
    assert sums == pytest.approx(33.7, abs=0.1) == megabytes(resnet50, "fused", "aten::add")
    head = megabytes(resnet50, "eager", "aten::mean", "aten::div")
    assert eager["batch_norm_and_elementwise"] - sums - head == pytest.approx(314.3, abs=0.1)
    of_ops = megabytes(resnet50, "fused", *(name for name in fused["ops"] if name.startswith("fusedres::")))
    assert of_ops == pytest.approx(182.8, abs=0.2)
    head = megabytes(resnet50, "fused", "aten::mean", "aten::div", "aten::clone")
    assert fused["batch_norm_and_elementwise"] == pytest.approx(of_ops + sums + head, abs=0.01)


def test_eager_by_hand(resnet50):
    """In elements of activations: 53 batch norms have 11.1 million for an image, 49 ReLUs 9.6, 16 additions 5.5."""
    t = 1e-6 * 2
    norms, relus = 11_113_984 * t, 9_608_704 * t
    assert megabytes(resnet50, "eager", "aten::native_batch_norm") == pytest.approx(3 * norms, abs=0.01)
    assert megabytes(resnet50, "eager", "aten::native_batch_norm_backward") == pytest.approx(5 * norms, abs=0.01)
    assert megabytes(resnet50, "eager", "aten::relu_") == pytest.approx(2 * relus, abs=0.01)
    assert megabytes(resnet50, "eager", "aten::threshold_backward") == pytest.approx(3 * relus, abs=0.01)
    assert megabytes(resnet50, "eager", "aten::add_") == pytest.approx(3 * 5_519_360 * t, abs=0.01)
    assert resnet50["variants"]["eager"]["ops"]["aten::native_batch_norm"]["calls"] == 53


def test_convolutions(resnet50):
    """Forward, gradient of the input but not of the images, gradient of the weight; a folded one is no library call."""
    eager, always = (resnet50["variants"][v]["ops"] for v in ("eager", "always"))
    of_all = megabytes(resnet50, "eager", "aten::convolution", "aten::convolution_backward")
    assert of_all == pytest.approx(resnet50["convolutions_of_eager"], abs=0.001) == pytest.approx(124.5, abs=0.1)
    launches = eager["aten::convolution_backward"]["launches"]
    assert launches["weight gradient"] == pytest.approx(eager["aten::convolution"]["launches"]["forward"], abs=0.001)
    assert (eager["aten::convolution"]["calls"], always["aten::convolution"]["calls"]) == (53, 17)  # 3x3 and the stem
    for found in resnet50["variants"].values():
        everything = sum(op["loads"] + op["stores"] for op in found["ops"].values())
        assert found["all"] == pytest.approx(everything, abs=0.01)
        assert found["batch_norm_and_elementwise"] == pytest.approx(everything - of_all, abs=0.01)


def test_folded_moves_less(resnet50):
    """Blocks as one Function: a fifth of eager's bytes, no sums of gradients; a pass more where y1 is recomputed.

    A model by hand of the same passes, without the average pool, has 69.5 and 77.
    """
    auto, always, fused = (resnet50["variants"][v] for v in ("auto", "always", "fused"))
    assert fused["batch_norm_and_elementwise"] > 215
    assert auto["batch_norm_and_elementwise"] == pytest.approx(69.5, abs=0.8)
    assert always["batch_norm_and_elementwise"] == pytest.approx(77, abs=0.8)
    y1 = 1_906_688 * 2e-6  # the outputs of 16 first convolutions
    recomputed = always["batch_norm_and_elementwise"] - auto["batch_norm_and_elementwise"]
    assert recomputed == pytest.approx(2 * y1, abs=0.01)
    for found in (auto, always):
        assert found["ops"]["fusedres::conv1x1_moments"]["calls"] == 20  # the end of 16 blocks, four projections
        assert not {"aten::add", "fusedres::batch_norm_add_batch_norm_act"} & set(found["ops"])


def test_only_always_folds_half_of_a_pair(capsys):
    """The projections of a network of basic blocks, whose own convolutions are 3x3."""
    assert run("--model resnet18 --batch 16 --image 64 --dtype fp32 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "fusedres::conv1x1_bn_act_apply" not in found["variants"]["auto"]["ops"]
    assert found["variants"]["always"]["ops"]["fusedres::conv1x1_bn_act_apply"]["calls"] == 1  # the rest: few pixels
    assert (found["image"], found["dtype"], found["unit"]) == (64, "fp32", "MB per image")


def test_float16_is_not_folded(capsys):
    assert run("--model resnet20 --batch 8 --dtype fp16 --json") == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert variants["fused"] == variants["auto"] != variants["eager"]
    assert not any("conv1x1" in name for name in variants["always"]["ops"])  # which only computes activations again


def test_batch_and_dtype_scale(capsys):
    found = {}
    for batch, dtype in ((64, "bf16"), (64, "fp32"), (128, "bf16")):
        assert run(f"--model resnet20 --batch {batch} --dtype {dtype} --json") == 0
        found[batch, dtype] = json.loads(capsys.readouterr().out)["variants"]
    for variant in traffic.VARIANTS:
        base = found[64, "bf16"][variant]["batch_norm_and_elementwise"]
        assert found[128, "bf16"][variant]["batch_norm_and_elementwise"] == pytest.approx(base, rel=0.01)
        assert found[64, "fp32"][variant]["batch_norm_and_elementwise"] == pytest.approx(2 * base, rel=0.02)


def test_table(capsys):
    assert run("--model resnet20 --batch 32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet20, 32 images of 32x32, bf16: MB per image that a training step moves"
    assert lines[2].split() == list(traffic.VARIANTS)
    rows = {line[: lines[2].index("eager") - 2].strip(): line.split()[-4:] for line in lines if line}
    every, least, rest = (
        [float(v) for v in rows[name]]
        for name in ("all", "of which eager's convolutions, at least", "batch norm and elementwise")
    )
    assert [a - b for a, b in zip(every, least, strict=True)] == pytest.approx(rest, abs=0.11)
    assert rest[0] > rest[1]
    assert max(map(len, lines)) < 120


def test_nothing_is_left_behind():
    names = ("folding_choice", "never_gains")
    before = [getattr(folded_call, name) for name in names]
    traffic.step_traffic("resnet20", batch=4, image=8, dtype=torch.float32, variant="always")
    assert [getattr(folded_call, name) for name in names] == before == [getattr(folding, name) for name in names]
    assert registry.backend() == "auto"
