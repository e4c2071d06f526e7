"""The command ``lightning-convbn``: what would be folded, what would be saved, and the model that ships."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from lightning_convbn.command.actions import (
    BUDGET_HOLDS,
    DTYPES,
    WHAT_IS_COMPARED,
    export_model,
    inspect_model,
    installed,
    measure_model,
)
from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.measurement import VARIANTS

MODEL_HELP = """\
MODEL is one of
  torchvision:resnet50      by its name in torchvision, random weights
  timm:efficientnet_b0      by its name in timm, random weights
  package.module:factory    a callable without required arguments that returns a model, a model class, or a model;
                            the current directory is importable
  path/to/last.ckpt         a Lightning checkpoint, with --class package.module:LightningModuleClass
No weights are downloaded. The model is looked at in its eval state: dropout is off, auxiliary heads do not run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for what it could not do, 130 after Ctrl-C.

    Example:
        >>> main(["inspect", "torchvision:resnet81"])  # says on stderr that there is no such model
        1
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.typed = shlex.join(["lightning-convbn", *arguments])
    try:
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"lightning-convbn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again as it ends
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-convbn",
        description="See what Tune mode would fold and save in a model, and export the folded model.",
        epilog=f"{MODEL_HELP}\n`lightning-convbn inspect --help` and so on tell more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed('lightning-convbn')}")
    commands = parser.add_subparsers(required=True, metavar="inspect|measure|export")

    inspect = _command(
        commands,
        "inspect",
        "list what becomes of every BatchNorm, and why",
        """\
examples:
  lightning-convbn inspect torchvision:resnet50
  lightning-convbn inspect timm:efficientnet_b0 --json pairs.json
  lightning-convbn inspect my_project.models:build --size 224""",
    )
    inspect.add_argument(
        "--size", help="record a forward pass on such an input, too: it proves what can't be traced; as in measure"
    )
    _add_json(inspect)
    inspect.set_defaults(run=inspect_model)

    measure = _command(
        commands,
        "measure",
        "measure memory and time in Eval and Tune mode, and of a Deploy copy",
        """\
examples:
  lightning-convbn measure torchvision:resnet50 --batch-size 32
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB      (counts only: no data, no waiting)
  lightning-convbn measure timm:efficientnet_b0 --html report.html --plot report.png

"""
        + "\n".join(fill(note, 110) for note in (WHAT_IS_COMPARED, BUDGET_HOLDS)),
    )
    _add_input(measure, batch=8)
    measure.add_argument(
        "--modes", nargs="+", choices=VARIANTS, default=VARIANTS, help="what to measure beside eval; default: all"
    )
    measure.add_argument("--dtype", choices=DTYPES, default="float32", help="of model and input; default: %(default)s")
    measure.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    measure.add_argument(
        "--rounds",
        type=_not_negative,
        default=7,
        help="steps to time in each mode, interleaved; default: 7, 0 times none",
    )
    measure.add_argument("--budget", help="find the largest batch that fits in so much: 8GiB, 500MB")
    _add_json(measure)
    measure.add_argument("--plot", type=Path, metavar="FILE", help="draw what each part keeps: .png, .svg, .pdf")
    measure.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with every block")
    measure.set_defaults(run=measure_model)

    export = _command(
        commands,
        "export",
        "write the folded model, and read it back to compare it with Eval mode",
        """\
examples:
  lightning-convbn export my_project.models:trained model.onnx --size 224
  lightning-convbn export last.ckpt model.pt2 --class my_project.models:Classifier""",
    )
    export.add_argument(
        "path", type=Path, metavar="PATH", help=".onnx, .pt2 (torch.export), .pt or .safetensors (weights alone)"
    )
    _add_input(export, batch=2)
    export.add_argument("--static-batch", action="store_true", help="fix the batch size to --batch-size")
    export.set_defaults(run=export_model)
    return parser


def _command(commands: Any, name: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{MODEL_HELP}",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s MODEL {'PATH ' if name == 'export' else ''}[options]",
    )
    parser.add_argument("model", metavar="MODEL", help="what to look at, see above")
    parser.add_argument(
        "--class", dest="checkpoint_class", metavar="MODULE:CLASS", help="the LightningModule class of a checkpoint"
    )
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON, to stdout and instead of tables without FILE"
    )


def _add_input(parser: argparse.ArgumentParser, *, batch: int) -> None:
    parser.add_argument("--batch-size", type=_positive, default=batch, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--size",
        default="224",
        help="of one sample: 224 is 3 × 224 × 224, anything else is spelled out, as 1x28x28; default: %(default)s",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _not_negative(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


# argparse names the type in its message: "invalid int, 0 or more value".
_positive.__name__, _not_negative.__name__ = "int, 1 or more,", "int, 0 or more,"
