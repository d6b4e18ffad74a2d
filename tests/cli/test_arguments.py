"""Wrong arguments: one line on stderr that names what is wrong, nothing on stdout, exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres
from fusedres.cli import main

WRONG = [
    ("", "a command is needed: info, verify, demo, train"),
    ("polish", "invalid choice: 'polish'"),
    ("info --yaml", "unrecognized arguments: --yaml"),
    ("train --lr fast", "argument --lr: invalid float value: 'fast'"),
    ("train --lr 0", "--lr must be above 0, got 0.0"),
    ("train --lr nan", "--lr must be above 0, got nan"),
    ("train --epochs 0", "--epochs must be at least 1, got 0"),
    ("train --epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("train --batch-size 1", "--batch-size must be at least 2 (batch statistics), got 1"),
    ("train --batch-size 5000", "--batch-size 5000 is more than the 1442 training images there are"),
    ("train --momentum 1", "--momentum must be in [0, 1), got 1.0"),
    ("train --weight-decay -1", "--weight-decay must be 0 or more, got -1.0"),
    ("train --label-smoothing 1", "--label-smoothing must be in [0, 1), got 1.0"),
    ("train --warmup-epochs -1", "--warmup-epochs must be 0 or more, got -1.0"),
    ("train --seed -1", "--seed must be in [0, 2**31), got -1"),
    ("train --workers -1", "--workers must be 0 or more, got -1"),
    ("train --image-size 4", "--image-size must be at least 8, got 4"),
    ("train --amp fp8", "argument --amp: invalid choice: 'fp8'"),
    ("train --fused --eager", "argument --eager: not allowed with argument --fused"),
    ("train --model resnet19", "--model: no network is called 'resnet19'; there are resnet18"),
    ("train --device toaster", "--device must be auto, cpu or cuda, got 'toaster'"),
    ("train --data mnist", "--data must be digits, cifar10:PATH, imagefolder:PATH or synthetic[:IMAGES], got 'mnist'"),
    ("train --data digits:somewhere", "--data must be digits, without a path, got 'digits:somewhere'"),
    ("train --data cifar10", "--data must be cifar10:PATH, got 'cifar10'"),
    ("train --data cifar10:nowhere", "--data cifar10: there is no nowhere"),
    ("train --data cifar10:.", "has no data_batch_1, data_batch_2"),
    ("train --data imagefolder:nowhere", "--data imagefolder: there is no folder nowhere"),
    ("train --data imagefolder:.", "needs at least two folders, one for each class, got 0"),
    ("train --data synthetic:few", "--data synthetic:IMAGES needs a number of at least 20, got 'few'"),
    ("train --resume", "--resume: there is no checkpoint"),
    ("demo --epochs 0", "--epochs must be at least 1, got 0"),
    ("traffic --model resnet19", "--model: no network is called 'resnet19'; there are resnet18"),
    ("traffic --batch 1", "--batch must be at least 2, got 1"),
    ("traffic --image 7", "--image must be at least 8, got 7"),
    ("traffic --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
    ("demo --seed x", "argument --seed: invalid int value: 'x'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[arguments or "none" for arguments, _ in WRONG])
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments.split())
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.startswith("fusedres")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_from_the_shell(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedres.__file__).parents[1])}
    command = [sys.executable, "-m", "fusedres", "train", "--data", "cifar10:nowhere"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fusedres train: error: --data cifar10: there is no nowhere\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten_by_accident(tmp_path, capsys):
    tiny = "--data synthetic:40 --image-size 8 --batch-size 20 --epochs 1 --device cpu"
    arguments = ["train", *tiny.split(), "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert (
        "already holds a run: --resume continues it, --overwrite or another --out starts anew"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--overwrite"]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert main(["train", "--resume", "--lr", "3", "--out", str(tmp_path)]) == 2
    assert "--lr was 0.05 in the run to resume, got 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", *(f"{name} --help" for name in ("info", "train", "traffic", "demo"))]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "fusedres" in printed.out
    assert max(map(len, printed.out.splitlines())) < 130
