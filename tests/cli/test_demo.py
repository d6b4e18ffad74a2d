"""`fusedres demo --quick`: a table, a picture with something in it, and the numbers behind it."""

import json

import numpy as np
import pytest

from fusedres.cli import demo, main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    return out, json.loads((out / "demo.json").read_text())


def test_numbers(quick):
    _, result = quick
    steps = 2 * (1442 // 64)
    for name in ("eager", "fused"):
        run = result[name]
        assert len(run["step_losses"]) == len(run["turn_seconds"]) == steps
        assert len(run["epoch_accuracies"]) == 2
        assert run["test_accuracy"] == run["epoch_accuracies"][-1] > 0.4
        assert np.mean(run["step_losses"][-5:]) < 0.6 * np.mean(run["step_losses"][:5])
        predictions, labels = result["test_predictions"][name], result["test_labels"]
        assert np.mean(np.equal(predictions, labels)) == pytest.approx(run["test_accuracy"])
    eager, fused = result["eager"], result["fused"]
    ratio = np.median(eager["turn_seconds"]) / np.median(fused["turn_seconds"])
    assert result["speed_ratio"] == pytest.approx(ratio)
    assert fused["seconds_per_epoch"] == pytest.approx(np.median(fused["turn_seconds"]) * steps / 2)
    assert result["saved_ratio"] == fused["saved_for_backward_bytes"] / eager["saved_for_backward_bytes"]


def test_same_training(quick):
    """Equal until rounding has grown, and then no further apart than eager from itself in the other memory format."""
    _, result = quick
    eager, fused = (np.array(result[name]["step_losses"]) for name in ("eager", "fused"))
    itself = np.array(result["eager_itself_losses"])
    assert abs(eager[0] - fused[0]) <= 1e-5
    deviation = result["loss_deviation"]
    assert deviation["first"] == np.abs(eager - fused)[: deviation["first_steps"]].max()
    assert deviation["all"] == np.abs(eager - fused).max()
    assert np.abs(eager - fused).mean() <= 4 * np.abs(eager - itself).mean() + 1e-3


def test_who_ran_what(quick):
    _, result = quick
    assert result["eager"]["ops_per_step"] == {
        "aten::add": 9,
        "aten::native_batch_norm": 19,
        "aten::native_batch_norm_backward": 19,
        "aten::relu": 19,
        "aten::threshold_backward": 19,
    }
    text = demo.render(result)
    assert f"{result['speed_ratio']:.2f}x as fast" in text
    for served in result["served"].values():
        assert served["served_by"] in text
    for name in ("eager", "fused"):
        assert f"{result[name]['test_accuracy']:.2%}" in text


def test_picture(quick):
    from fusedres.training import plots

    Image = pytest.importorskip("PIL.Image")
    out, _ = quick
    pixels = np.asarray(Image.open(out / "demo.png").convert("RGB")).astype(int)
    assert pixels.shape[0] >= 1000
    assert pixels.shape[1] >= 1600
    assert (pixels == 255).all(2).mean() > 0.5  # a light background
    height, width = pixels.shape[:2]
    middle = slice(height // 3, 2 * height // 3)
    for name, part in (("loss", pixels[middle, : width // 2]), ("times", pixels[middle, width // 2 :])):
        for colour in (plots.FUSED, plots.BAND if name == "loss" else plots.EAGER):
            drawn = (abs(part - np.array(bytearray.fromhex(colour[1:]))) < 12).all(2)
            assert drawn.sum() > 500, (name, colour)
