"""The benchmarks' own tests: a wrong shape, a wrong byte count or a wrong clock would make every number wrong."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.cases import OPS, Case, case_traffic
from benchmarks.environment import device_slug, environment
from benchmarks.harness import Ratio, compare, copy_bandwidth, geometric_mean
from benchmarks.plain_resnet import PlainBasicBlock, plain_resnet18, plain_resnet50
from benchmarks.shapes import Shape, resnet_shapes
from benchmarks.steps import PLAIN, Step, gate, saved_storages


def _regions(model: nn.Module) -> Counter[tuple[str, bool, tuple[int, ...]]]:
    """The fused regions of a plain model, read off the norms and blocks that really run."""
    seen: Counter[tuple[str, bool, tuple[int, ...]]] = Counter()
    with torch.device("meta"):
        x = torch.empty(8, 3, 224, 224)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            tail = name.endswith(("bn3", "bn2" if isinstance(model.layer1[0], PlainBasicBlock) else "bn3"))
            kind = "tail" if tail else "shortcut" if "downsample" in name else "stem" if name == "bn1" else "inner"
            block = model.get_submodule(name.rsplit(".", 1)[0]) if tail else None

            def hook(_m: nn.Module, _i: object, out: torch.Tensor, kind: str = kind, block: object = block) -> None:
                size = tuple(out.shape)
                if kind == "tail":
                    projects = block.downsample is not None
                    seen["batch_norm_add_batch_norm_act" if projects else "batch_norm_act", not projects, size] += 1
                    seen["add_act", True, size] += 1
                elif kind != "shortcut":
                    seen["batch_norm_act_max_pool" if kind == "stem" else "batch_norm_act", False, size] += 1

            module.register_forward_hook(hook)
    model.to("meta")(x)
    return seen


@pytest.mark.parametrize(("name", "make"), [("resnet18", plain_resnet18), ("resnet50", plain_resnet50)])
def test_shapes_are_those_a_model_runs(name: str, make: object) -> None:
    table = {(s.op, s.residual, (s.n, s.c, s.h, s.w)): dict(s.uses)[name] for s in resnet_shapes((name,))}
    assert table == dict(_regions(make()))


def test_shapes_are_distinct_and_cover_every_op() -> None:
    shapes = resnet_shapes()
    assert len({s.key for s in shapes}) == len(shapes) == 31
    assert {s.op for s in shapes} == set(OPS)


def test_plain_models_have_the_published_sizes() -> None:
    assert sum(p.numel() for p in plain_resnet18().parameters()) == 11_689_512
    assert sum(p.numel() for p in plain_resnet50().parameters()) == 25_557_032


def test_plain_resnet_is_torchvisions() -> None:
    with contextlib.suppress(
        RuntimeError
    ):  # torchvision without its compiled ops still imports when their schemas exist
        schemas = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = plain_resnet50(), torchvision.models.resnet50()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_fused_models_take_the_plain_models_weights_and_losses(name: str) -> None:
    steps = {kind: Step(name, kind, batch=4) for kind in ("eager", "fusedres")}
    for step in steps.values():
        step.x = step.x[..., :64, :64].contiguous(memory_format=torch.channels_last)
    curves = gate(name, "float32", steps, rounds=1)
    assert set(curves) == {"eager", "fusedres"}


def test_gate_refuses_other_losses() -> None:
    steps = {
        kind: Step("cifar_resnet20", "eager", batch=4, seed=seed) for seed, kind in enumerate(("eager", "fusedres"))
    }
    with pytest.raises(AssertionError, match="are not eager's"):
        gate("cifar_resnet20", "float32", steps, rounds=1)


def test_traffic_counts_passes() -> None:
    t = 8 * 64 * 56 * 56 * 4
    m = t // 32
    found = case_traffic(Shape("batch_norm_act", True, 8, 64, 56, 56), torch.float32)
    vectors = 64 * 4
    assert found.forward.floor == 4 * t + m + 9 * vectors  # 2 affine, 2 running in and out, 3 saved
    assert found.backward.floor == 6 * t + 2 * m + 6 * vectors  # 1 affine and 3 saved in, 2 gradients out
    assert found.touched == 6 * t + m
    pool = case_traffic(Shape("batch_norm_act_max_pool", False, 8, 64, 112, 112), torch.bfloat16)
    x = 8 * 64 * 112 * 112 * 2
    assert pool.forward.floor - 9 * vectors == 2 * x + x // 4
    assert pool.backward.floor - 7 * vectors == 3 * x + x // 2
    assert pool.touched == 2 * x + x // 2
    for shape in resnet_shapes():
        of = case_traffic(shape, torch.bfloat16)
        assert of.touched <= of.floor


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_gate_passes_what_is_right_and_refuses_what_is_not(
    op: str, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(Shape(op, op == "add_act", 4, 24, 12, 12), dtype, layout)
    case.gate("eager")
    case.gate("fusedres")
    from benchmarks import cases

    monkeypatch.setitem(cases.PEERS, "wrong", lambda *at: cases.PEERS["eager"](*at) * 1.05)
    with pytest.raises(AssertionError, match="is off by"):
        case.gate("wrong")


def test_compare_finds_a_known_ratio() -> None:
    def work(n: int) -> None:
        for _ in range(n):
            pass

    done = compare({"eager": lambda: work(60_000), "half": lambda: work(30_000)}, min_rounds=15, max_rounds=15)
    assert done.rounds == 15
    assert 1.7 < done.ratio("half").value < 2.3
    assert done.ratio("half").low <= done.ratio("half").value <= done.ratio("half").high
    assert done.ratio("eager") == Ratio(1.0, 1.0, 1.0)


def test_compare_passes_values_along_and_times_each_stage() -> None:
    got = []
    pipeline = [lambda: 41, lambda v: v + 1, got.append]
    done = compare({"eager": pipeline}, min_rounds=3, max_rounds=3, warmup=1, min_sample_seconds=0)
    assert got == [42] * (1 + 2 * 3)  # warm-up, and in each round one call that does not count and one that does
    assert [len(s) for s in done.timings["eager"].stages] == [3, 3, 3]
    assert done.timings["eager"].seconds == [sum(s) for s in zip(*done.timings["eager"].stages, strict=True)]


def test_compare_counts_faults() -> None:
    import mmap

    def touch() -> None:
        with mmap.mmap(-1, 64 * mmap.PAGESIZE) as memory:
            for page in range(64):
                memory[page * mmap.PAGESIZE] = 1

    done = compare({"eager": touch, "idle": lambda: None}, min_rounds=3, max_rounds=3, min_sample_seconds=0)
    assert done.timings["eager"].faults_per_call >= 64
    assert done.timings["idle"].faults_per_call < 1


def test_compare_needs_its_baseline() -> None:
    with pytest.raises(ValueError, match="baseline 'eager'"):
        compare({"fusedres": lambda: None})


def test_saved_storages_counts_each_storage_once_without_parameters() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(8, 4, requires_grad=True)
    with saved_storages(layer) as storages:
        y = layer(x)
        (y * y).sum()
    assert sorted(storages.values()) == [8 * 4 * 4, 8 * 4 * 4]  # x and y; neither weight nor y a second time


def test_copy_bandwidth_is_plausible_and_measured_once() -> None:
    first = copy_bandwidth(1 << 20)
    assert 1e8 < first < 1e13
    assert copy_bandwidth(1 << 20) == first


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_environment_names_no_host_and_no_path() -> None:
    import json
    import platform

    text = json.dumps(environment("recycled"))
    assert platform.node() not in text or not platform.node()
    assert str(Path.home()) not in text
    assert device_slug().startswith("cpu-")
