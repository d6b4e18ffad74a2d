"""Whole runs: interrupted ones end in the bits of uninterrupted ones, and what is on disk is what was promised."""

import csv
import os
import signal

import pytest
import torch

from fusedres.training import checkpoint
from fusedres.training.config import ConfigError, TrainConfig, TrainingError, resumed
from fusedres.training.learner import Learner
from fusedres.training.trainer import EPOCH_FIELDS, STEP_FIELDS, Interrupt, train

TINY = {"data": "synthetic:64", "image_size": 8, "batch_size": 16, "epochs": 3, "device": "cpu"}
STEPS = 4  # in an epoch


def config(out, **settings):
    return TrainConfig.from_settings({**TINY, "out": str(out), **settings})


def rows(path, *, without=()):
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


def same(a, b):
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def interrupt_at(monkeypatch):
    """Sends this process a signal in a step counted over the test."""

    def arrange(step, number=signal.SIGINT):
        plain_step, count = Learner.step, 0

        def patched(self, images, labels):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), number)
            return plain_step(self, images, labels)

        monkeypatch.setattr(Learner, "step", patched)

    return arrange


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return out, train(config(out))


# In the first step, inside an epoch, in the last of an epoch (only the evaluation is left), in the last of all.
@pytest.mark.parametrize("step", [1, STEPS + 2, 2 * STEPS, 3 * STEPS])
def test_resumed_run_ends_in_the_same_bits(whole_run, tmp_path, interrupt_at, step):
    interrupt_at(step)
    outcome = train(config(tmp_path))
    assert outcome.signal == signal.SIGINT
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["epoch"] * STEPS + state["step"] == step
    torch.manual_seed(12345)  # whatever happens to the generators in between
    outcome = train(resumed(state["config"], {}), state)
    assert outcome.signal is None
    assert (outcome.accuracy, outcome.best_accuracy) == (whole_run[1].accuracy, whole_run[1].best_accuracy)

    expected, got = (torch.load(out / "last.pt", weights_only=True) for out in (whole_run[0], tmp_path))
    for key in expected.keys() - {"config", "seconds"}:
        assert same(expected[key], got[key]), key
    assert rows(tmp_path / "steps.csv") == rows(whole_run[0] / "steps.csv")
    times = ("seconds", "images_per_second")
    assert rows(tmp_path / "epochs.csv", without=times) == rows(whole_run[0] / "epochs.csv", without=times)


def test_twice_interrupted(whole_run, tmp_path, interrupt_at):
    interrupt_at(2)
    train(config(tmp_path))
    state = checkpoint.load(tmp_path / "last.pt")
    interrupt_at(3)
    train(resumed(state["config"], {}), state)
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 1)
    train(resumed(state["config"], {}), state)
    expected, got = (torch.load(out / "last.pt", weights_only=True) for out in (whole_run[0], tmp_path))
    assert same(expected["model"], got["model"])
    assert same(expected["optimizer"], got["optimizer"])


def test_killed_after_its_log_was_written(whole_run, tmp_path, interrupt_at):
    interrupt_at(2 * STEPS + 1)
    train(config(tmp_path))
    with (tmp_path / "epochs.csv").open("a") as file:
        file.write("3,0,0,0,0,0,0\n")
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("9,3,0,0\n")
    state = checkpoint.load(tmp_path / "last.pt")
    train(resumed(state["config"], {}), state)
    assert rows(tmp_path / "steps.csv") == rows(whole_run[0] / "steps.csv")


def test_logs(whole_run):
    out, outcome = whole_run
    steps, epochs = rows(out / "steps.csv"), rows(out / "epochs.csv")
    assert tuple(steps[0]) == STEP_FIELDS
    assert tuple(epochs[0]) == EPOCH_FIELDS
    assert [int(row["step"]) for row in steps] == list(range(1, 3 * STEPS + 1))
    assert [int(row["epoch"]) for row in steps] == [1] * STEPS + [2] * STEPS + [3] * STEPS
    losses = [float(row["loss"]) for row in steps]
    for index, row in enumerate(epochs):
        mean = sum(losses[index * STEPS : (index + 1) * STEPS]) / STEPS
        assert float(row["train_loss"]) == pytest.approx(mean, rel=1e-9)
        assert float(row["images_per_second"]) == pytest.approx(64 / float(row["seconds"]), rel=0.01)
    assert float(epochs[-1]["test_accuracy"]) == outcome.accuracy
    assert max(float(row["test_accuracy"]) for row in epochs) == outcome.best_accuracy
    assert losses[-1] < losses[0]
    rates = [float(row["lr"]) for row in steps]
    assert rates.index(max(rates)) == STEPS  # after an epoch of warm-up
    assert rates[-1] < 0.1 * max(rates)


def test_checkpoint_loads_into_the_plain_network(whole_run):
    from fusedres.models import cifar_resnet

    state = torch.load(whole_run[0] / "best.pt", weights_only=True)
    cifar_resnet(20).load_state_dict(state["model"], strict=True)
    assert state["classes"] == [f"pattern {i}" for i in range(10)]
    assert state["config"]["model"] == "resnet20"


def test_eager_continues_what_fused_began(tmp_path, interrupt_at):
    interrupt_at(STEPS + 1)
    train(config(tmp_path))
    state = checkpoint.load(tmp_path / "last.pt")
    outcome = train(resumed(state["config"], {"fused": False}), state)
    assert outcome.signal is None
    assert len(rows(tmp_path / "steps.csv")) == 3 * STEPS


def test_more_epochs_than_planned(whole_run, tmp_path):
    state = checkpoint.load(whole_run[0] / "last.pt")
    train(resumed(state["config"], {"epochs": 4, "out": str(tmp_path)}), state)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 4


@pytest.mark.parametrize("later", [False, True])
def test_second_interrupt(tmp_path, interrupt_at, monkeypatch, later):
    """A later one acts at once; one that comes with the first is the same key, delivered by torchrun too."""
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background job
    interrupt_at(2)
    save = checkpoint.save

    def interrupted_save(path, state):
        os.kill(os.getpid(), signal.SIGINT)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", interrupted_save)
    monkeypatch.setattr(Interrupt, "same_key", 0.0 if later else 60.0)
    if later:
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path))
        assert not (tmp_path / "last.pt").exists()
    else:
        assert train(config(tmp_path)).signal == signal.SIGINT
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_saves_too(tmp_path, interrupt_at):
    interrupt_at(2, signal.SIGTERM)
    assert train(config(tmp_path)).signal == signal.SIGTERM
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_settings_that_may_not_change(whole_run):
    saved = checkpoint.load(whole_run[0] / "last.pt")["config"]
    assert resumed(saved, {"workers": 3}).workers == 3
    assert resumed(saved, {"lr": saved["lr"]}).to_dict() == saved
    with pytest.raises(ConfigError, match=r"--batch-size was 16 in the run to resume, got 32"):
        resumed(saved, {"batch_size": 32})


def test_other_data_behind_the_same_name(whole_run, tmp_path):
    state = checkpoint.load(whole_run[0] / "last.pt")
    state["classes"] = ["a", "b"]
    with pytest.raises(ConfigError, match="the data behind synthetic:64 are not what the run was trained on"):
        train(resumed(state["config"], {"out": str(tmp_path)}), state)


def test_checkpoint_absent_or_broken(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no checkpoint .*last\.pt"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="not a checkpoint of `fusedres train`"):
        checkpoint.load(tmp_path / "last.pt")


def test_failed_save_keeps_the_last_one(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "last.pt", {"epoch": lambda: None})
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


def test_diverged_run_says_so(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) in epoch \d; a smaller --lr may help"):
        train(config(tmp_path, lr=1e18, warmup_epochs=0.0))
