"""The argument parser of ``lightning-convbn``. It calls `inspect.py`, `measure.py` or `export.py`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.export import export_model
from lightning_convbn.command.inspect import inspect_model
from lightning_convbn.command.measure import measure_model
from lightning_convbn.command.notes import WHAT_IS_COMPARED, WHAT_THE_BUDGET_HOLDS
from lightning_convbn.command.option_values import DTYPES
from lightning_convbn.command.results import VARIANTS
from lightning_convbn.command.versions import installed_version

MODEL_HELP = """\
MODEL is one of
  torchvision:resnet50      its name in torchvision; random weights
  timm:efficientnet_b0      its name in timm; random weights
  package.module:factory    a callable without required arguments that returns a model, a model class, or a model;
                            the current directory is importable
  path/to/last.ckpt         a Lightning checkpoint, with --class package.module:LightningModuleClass
No weights are downloaded. The model is used in its eval state: dropout is off, and auxiliary heads do not run.
"""
INSPECT_EXAMPLES = """\
examples:
  lightning-convbn inspect torchvision:resnet50
  lightning-convbn inspect timm:efficientnet_b0 --json pairs.json
  lightning-convbn inspect my_project.models:build --size 224"""
MEASURE_EXAMPLES = """\
examples:
  lightning-convbn measure torchvision:resnet50 --batch-size 32
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB      (only counts: no data, no waiting)
  lightning-convbn measure timm:efficientnet_b0 --html report.html --plot report.png
"""
EXPORT_EXAMPLES = """\
examples:
  lightning-convbn export my_project.models:trained model.onnx --size 224
  lightning-convbn export last.ckpt model.pt2 --class my_project.models:Classifier"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after an error, or 130 after Ctrl-C.

    Example:
        >>> main(["inspect", "torchvision:resnet81"])  # says on stderr that there is no such model
        1
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    options.typed = shlex.join(["lightning-convbn", *arguments])
    try:
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"lightning-convbn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the pipe has stopped, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again at exit
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="lightning-convbn",
        description="See what Tune mode would fold and save in a model, and export the folded model.",
        epilog=f"{MODEL_HELP}\nFor the options, type `lightning-convbn inspect --help`, and so on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version('lightning-convbn')}")
    commands = parser.add_subparsers(required=True, metavar="inspect|measure|export")
    _add_inspect(commands)
    _add_measure(commands)
    _add_export(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    inspect = _add_command(
        commands, "inspect", "list which BatchNorms are folded, frozen and unfrozen, and why", INSPECT_EXAMPLES
    )
    inspect.add_argument(
        "--size",
        help="also run a forward pass on an input of this size; this proves pairs that can't be traced; "
        "224 is 3 × 224 × 224, other shapes are written out, as 1x28x28",
    )
    _add_json(inspect)
    inspect.set_defaults(run=inspect_model)


def _add_measure(commands: Any) -> None:
    notes = "\n".join(fill(note, 110) for note in (WHAT_IS_COMPARED, WHAT_THE_BUDGET_HOLDS))
    measure = _add_command(
        commands,
        "measure",
        "measure memory and time in Eval mode, in Tune mode, and of the Deploy copy",
        f"{MEASURE_EXAMPLES}\n{notes}",
    )
    _add_input(measure, batch=8)
    measure.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        help="what to measure; eval is always measured, to compare with; default: all",
    )
    measure.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of model and input; default: %(default)s"
    )
    measure.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda if there is a CUDA device, else cpu")
    measure.add_argument(
        "--rounds",
        type=_not_negative,
        default=7,
        help="how many steps to time for each variant, interleaved; default: 7; 0 times nothing",
    )
    measure.add_argument("--budget", help="find the largest batch that fits into this memory: 8GiB, 500MB")
    _add_json(measure)
    measure.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what each section of the model keeps: .png, .svg, .pdf"
    )
    measure.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with every block")
    measure.set_defaults(run=measure_model)


def _add_export(commands: Any) -> None:
    export = _add_command(
        commands, "export", "write the Deploy copy to a file, and compare the file with Eval mode", EXPORT_EXAMPLES
    )
    export.add_argument(
        "path", type=Path, metavar="PATH", help=".onnx, .pt2 (torch.export), .pt or .safetensors (only weights)"
    )
    _add_input(export, batch=2)
    export.add_argument("--static-batch", action="store_true", help="fix the batch size to --batch-size")
    export.set_defaults(run=export_model)


def _add_command(commands: Any, name: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{MODEL_HELP}",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s MODEL {'PATH ' if name == 'export' else ''}[options]",
    )
    parser.add_argument("model", metavar="MODEL", help="the model, see above")
    parser.add_argument(
        "--class", dest="checkpoint_class", metavar="MODULE:CLASS", help="the LightningModule class of a checkpoint"
    )
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE; without FILE, print it, and no tables"
    )


def _add_input(parser: argparse.ArgumentParser, *, batch: int) -> None:
    parser.add_argument("--batch-size", type=_positive, default=batch, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--size",
        default="224",
        help="size of one sample: 224 is 3 × 224 × 224, other shapes are written out, as 1x28x28; default: %(default)s",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _not_negative(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


# argparse puts the name of the type into its message: "invalid int, 0 or more, value".
_positive.__name__, _not_negative.__name__ = "int, 1 or more,", "int, 0 or more,"
