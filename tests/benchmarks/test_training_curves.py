"""benchmarks.bench_training_curves: the data, what is compared, and a run of a few steps that is stored and resumed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_training_curves as curves


def cell(losses, accuracy, saved=1e6, folded=0):
    return {"first_losses": losses, "accuracies": [0.1, accuracy], "saved_bytes": saved, "folded_convolutions": folded}


def test_summary_by_hand():
    cells = {}
    for dtype in curves.DTYPES:
        for seed, (eager, contiguous, folded) in enumerate(((0.5, 0.5, 0.75), (1.0, 0.5, 0.25))):
            cells |= {
                f"net {dtype} eager {seed}": cell([3.0, 2.0], eager),
                f"net {dtype} contiguous {seed}": cell([3.0 + 0.25 * seed, 1.5], contiguous),
                f"net {dtype} folded {seed}": cell([3.0, 2.0 + seed], folded, 5e5, 7),
            }
    rows = curves.summary(cells, {"net": curves.RUNS["resnet20"]}, (0, 1))
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    apart = curves.deviations(cells, "net", ("float32", "folded"), ("float32", "eager"), (0, 1))
    assert apart == [0.0, 1.0]
    for row in rows:
        others = {"first": 0.25, "largest": 0.5}, {"first": 0.0, "largest": 1.0}
        assert [row[kind]["from_eager"] for kind in ("contiguous", "folded")] == list(others)
        same = {
            "accuracy_mean": 0.75,
            "accuracy_low": 0.5,
            "accuracy_high": 1.0,
            "saved_megabytes": 1.0,
            "folded_convolutions": 0,
        }
        half = row["dtype"] == "bfloat16"
        assert row["eager"] == same | ({"from_float32": {"first": 0.0, "largest": 0.0}} if half else {})
        assert row["folded"].get("from_float32") == (others[1] if half else None)
        assert (row["folded"]["saved_megabytes"], row["folded"]["folded_convolutions"]) == (0.5, 7)
    lines = curves.table(rows).splitlines()
    assert lines[3].split()[:5] == ["net", "float32", "0.5", "1", "75.0%"]
    assert lines[4].split()[:7] == ["net", "bfloat16", "0.5", "1", "0", "1", "75.0%"]
    assert "50.0% (25.0% to 75.0%)" in lines[3]
    assert lines[-1].split() == ["net", "bfloat16", "1.0", "MB", "0.5", "MB", "7"]


def test_textures_are_a_function_of_the_seed():
    images, labels = curves.textures(3, 64, seed=4)
    again, _ = curves.textures(3, 64, seed=4)
    other, _ = curves.textures(3, 64, seed=5)
    assert images.shape == (30, 64, 64, 3)
    assert images.dtype == torch.uint8
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert labels.bincount().tolist() == [3] * curves.CLASSES
    assert abs(images.float().mean() - 128) < 2
    # waves of class 0 run from row to row
    zero = images[labels == 0].float()
    mean_of_columns, mean_of_rows = (zero.mean(d).std(1).mean() for d in (1, 2))
    assert mean_of_rows > 3 * mean_of_columns


@pytest.fixture
def tiny(monkeypatch):
    """One network of the three, and a few steps."""
    monkeypatch.setattr(curves, "RUNS", {"bottleneck56": curves.RUNS["bottleneck56"]})
    monkeypatch.setitem(
        curves.NETWORKS, "bottleneck56", lambda: curves.cifar_resnet(11, bottleneck=True, shortcut="B", in_channels=1)
    )


def test_quick_run(tiny, tmp_path, capsys, monkeypatch):
    assert curves.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("% after ") == 6
    results = json.loads((tmp_path / "training_curves.json").read_text())["results"]
    cells = results["cells"]
    assert list(cells) == [f"bottleneck56 {d} {k} 0" for d in curves.DTYPES for k in curves.KINDS]
    for key, found in cells.items():
        assert found["steps"] == len(found["first_losses"]) == 4
        assert len(found["accuracies"]) == 2
        assert found["test_images"] == 355
        assert found["folded_convolutions"] == (6 if "folded" in key else 0)
        assert abs(found["first_losses"][0] - cells["bottleneck56 float32 eager 0"]["first_losses"][0]) < 0.05
    eager, contiguous, folded = (cells[f"bottleneck56 float32 {kind} 0"] for kind in curves.KINDS)
    assert eager["first_losses"][0] == pytest.approx(folded["first_losses"][0], abs=1e-4)
    assert eager["first_losses"][0] == pytest.approx(contiguous["first_losses"][0], abs=1e-4)
    assert folded["saved_bytes"] < 0.7 * eager["saved_bytes"] == 0.7 * contiguous["saved_bytes"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    # A second run takes what is there, and makes only what is missing.
    stored = json.loads((tmp_path / "training_curves.json").read_text())
    del stored["results"]["cells"]["bottleneck56 bfloat16 folded 0"]
    stored["results"]["cells"]["bottleneck56 float32 eager 0"]["accuracies"][-1] = 0.5
    (tmp_path / "training_curves.json").write_text(json.dumps(stored))
    assert curves.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("% after ") == 1
    assert "50.0% (50.0% to 50.0%)" in printed

    # What another commit or other settings made is not taken.
    path = tmp_path / "training_curves.json"
    now = json.loads(path.read_text())
    settings = now["results"]["settings"]
    assert len(curves.stored(path, now["environment"], settings)) == 6
    assert curves.stored(path, now["environment"] | {"commit": "0"}, settings) == {}
    assert len(curves.stored(path, now["environment"] | {"commit": "0"}, settings, any_commit=True)) == 6
    assert curves.stored(path, now["environment"] | {"torch": "0"}, settings, any_commit=True) == {}
    other = {"bottleneck56": settings["bottleneck56"] | {"lr": 1.0}}
    assert curves.stored(path, now["environment"], other) == {}


def test_quick_is_no_measurement(capsys):
    with pytest.raises(SystemExit) as exit:
        curves.main(["--quick"])
    assert exit.value.code == 2
    assert "--quick is no measurement: say with --out where to write" in capsys.readouterr().err
