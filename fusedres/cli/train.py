"""``fusedres train``: train a ResNet, with fused ops or with eager PyTorch.

Writes last.pt, best.pt, epochs.csv and steps.csv to the folder given by --out. Ctrl-C saves a checkpoint;
--resume goes on from it. Under torchrun each process trains on its share of the images.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..training.config import ConfigError, TrainConfig, resumed

_EXAMPLES = """examples:
  fusedres train
  fusedres train --model resnet56 --data cifar10:cifar-10-python.tar.gz --amp bf16
  fusedres train --model resnet50 --data imagefolder:photos --workers 4 --out out/photos
  torchrun --nproc-per-node 2 -m fusedres train --data synthetic
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a ResNet on images",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was given: the rest comes from the preset or the checkpoint
    )
    what = parser.add_argument_group("what")
    what.add_argument("--model", metavar="NAME", help="resnet20 (of the CIFAR family), resnet18, resnet50, ...")
    what.add_argument(
        "--data", metavar="DATA", help="digits (scikit-learn's), cifar10:PATH, imagefolder:PATH or synthetic[:IMAGES]"
    )
    what.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    what.add_argument("--out", metavar="DIR", help="folder for checkpoints and logs (out/train)")
    what.add_argument("--resume", action="store_true", help="go on from last.pt in the folder given by --out")
    what.add_argument("--overwrite", action="store_true", help="start anew although the folder holds a run")

    how = parser.add_argument_group("how (defaults depend on the data)")
    how.add_argument("--epochs", type=int, metavar="N")
    how.add_argument("--batch-size", type=int, metavar="N", help="images per step and process")
    how.add_argument("--lr", type=float, metavar="X", help="highest learning rate, between warm-up and cosine")
    how.add_argument("--momentum", type=float, metavar="X", help="Nesterov momentum")
    how.add_argument("--weight-decay", type=float, metavar="X")
    how.add_argument("--warmup-epochs", type=float, metavar="X", help="epochs of rising learning rate")
    how.add_argument("--label-smoothing", type=float, metavar="X")
    how.add_argument("--seed", type=int, metavar="N")

    run_on = parser.add_argument_group("on what")
    kind = run_on.add_mutually_exclusive_group()
    kind.add_argument("--fused", action="store_true", help="batch norm, residual and ReLU as one op (default)")
    kind.add_argument("--eager", dest="fused", action="store_false", help="the same network in plain PyTorch")
    run_on.add_argument("--amp", choices=("bf16", "off"), help="autocast (off)")
    run_on.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="memory format of images and activations (on)"
    )
    run_on.add_argument("--device", metavar="NAME", help="auto (default: a GPU if there is one), cpu or cuda")
    run_on.add_argument("--workers", type=int, metavar="N", help="processes that decode images (imagefolder)")


def run(args: argparse.Namespace) -> int:
    from ..training import checkpoint
    from ..training.trainer import train

    given = {name: value for name, value in vars(args).items() if name not in ("command", "resume", "overwrite")}
    if getattr(args, "resume", False):
        state = checkpoint.load(TrainConfig(out=given.get("out", TrainConfig.out)).folder / "last.pt")
        config = resumed(state["config"], {"out": TrainConfig.out, **given})
    else:
        state, config = None, TrainConfig.from_settings(given)
        if (config.folder / "last.pt").exists() and not getattr(args, "overwrite", False):
            raise ConfigError(
                f"{config.out} already holds a run: --resume continues it, --overwrite or another --out starts anew"
            )

    outcome = train(config, state)
    if not outcome.writes:
        return 0 if outcome.signal is None else 128 + outcome.signal
    if outcome.signal is not None:
        saved = f"{outcome.signal.name}: saved {config.folder / 'last.pt'}"
        launcher = "torchrun ... -m " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"\n{saved}; go on with: {launcher}fusedres train --out {config.out} --resume")
        return 128 + outcome.signal
    accuracy = f"test accuracy {outcome.accuracy:.2%} (best {outcome.best_accuracy:.2%})"
    print(f"{accuracy}, in {config.out}: last.pt best.pt epochs.csv steps.csv")
    return 0
