"""One training step against the same step written out, and the schedule."""

import math

import pytest
import torch
from torch.nn import functional as F

from fusedres.training.config import TrainConfig
from fusedres.training.data import load_data
from fusedres.training.learner import Learner, learning_rate_factor
from fusedres.training.networks import build_model, plain_twin

CPU = torch.device("cpu")


def make(**settings):
    config = TrainConfig.from_settings({"data": "synthetic:64", "image_size": 8, "batch_size": 16, **settings})
    data = load_data(config, device=CPU)
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    return config, data, model


def test_step_is_sgd_on_smoothed_cross_entropy():
    config, data, model = make(label_smoothing=0.1, fused=False, epochs=2, warmup_epochs=1.0)
    model = plain_twin(model)
    reference = plain_twin(model).to(memory_format=torch.channels_last)
    learner = Learner(model, config, steps_per_epoch=4, device=CPU)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = [*data.train_batches(0), *data.train_batches(1)]
    assert len(batches) == 8
    for step, (images, labels) in enumerate(batches):
        loss = learner.step(images, labels)
        logits = reference(images)
        # Label smoothing by its definition (https://arxiv.org/abs/1512.00567, section 7).
        target = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
        wanted = -(target * logits.log_softmax(1)).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = learner.lr_at(step)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=2e-4, atol=0)
    for ours, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-3)


def test_fused_and_eager_start_alike():
    config, data, model = make()
    twin = plain_twin(model)
    learners = [Learner(network, config, steps_per_epoch=4, device=CPU) for network in (model, twin)]
    images, labels = next(data.train_batches(0))
    losses = [learner.step(images, labels).item() for learner in learners]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_autocast_trains():
    config, data, model = make(amp="bf16", epochs=3)
    learner = Learner(model, config, steps_per_epoch=4, device=CPU)
    losses = [learner.step(*batch).item() for epoch in range(3) for batch in data.train_batches(epoch)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_evaluate_counts_every_image_once():
    config, data, model = make()
    learner = Learner(model, config, steps_per_epoch=4, device=CPU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score = learner.evaluate(data.test_batches())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    batches = list(data.test_batches())
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert len(images) == data.test_size == 16
    model.eval()
    with torch.no_grad():
        logits = model(images)
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert score.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_schedule():
    factor = [learning_rate_factor(step, warmup=4, total=20) for step in range(21)]
    assert factor[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor[4] == 1.0
    assert factor[12] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert factor[20] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_factor(0, warmup=0, total=1) == 1.0
