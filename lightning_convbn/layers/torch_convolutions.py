"""The classes that the convolutions and linear layers of ``torch.nn`` are swapped to."""

from __future__ import annotations

from torch import nn

from lightning_convbn.layers.convolutions import ConvGeometry, ConvTransposeGeometry, Deploy, LinearGeometry, Tune


class TuneConv1d(Tune, ConvGeometry, nn.Conv1d):
    """`torch.nn.Conv1d` with its BatchNorm folded on the fly."""

    dims = 3


class TuneConv2d(Tune, ConvGeometry, nn.Conv2d):
    """`torch.nn.Conv2d` with its BatchNorm folded on the fly."""

    dims = 4


class TuneConv3d(Tune, ConvGeometry, nn.Conv3d):
    """`torch.nn.Conv3d` with its BatchNorm folded on the fly."""

    dims = 5


class TuneConvTranspose1d(Tune, ConvTransposeGeometry, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with its BatchNorm folded on the fly."""

    dims = 3


class TuneConvTranspose2d(Tune, ConvTransposeGeometry, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with its BatchNorm folded on the fly."""

    dims = 4


class TuneConvTranspose3d(Tune, ConvTransposeGeometry, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with its BatchNorm folded on the fly."""

    dims = 5


class TuneLinear(Tune, LinearGeometry, nn.Linear):
    """`torch.nn.Linear` with its BatchNorm1d folded on the fly."""

    dims = 2


class DeployConv1d(Deploy, ConvGeometry, nn.Conv1d):
    """`torch.nn.Conv1d` with its BatchNorm folded once."""

    dims = 3


class DeployConv2d(Deploy, ConvGeometry, nn.Conv2d):
    """`torch.nn.Conv2d` with its BatchNorm folded once."""

    dims = 4


class DeployConv3d(Deploy, ConvGeometry, nn.Conv3d):
    """`torch.nn.Conv3d` with its BatchNorm folded once."""

    dims = 5


class DeployConvTranspose1d(Deploy, ConvTransposeGeometry, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with its BatchNorm folded once."""

    dims = 3


class DeployConvTranspose2d(Deploy, ConvTransposeGeometry, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with its BatchNorm folded once."""

    dims = 4


class DeployConvTranspose3d(Deploy, ConvTransposeGeometry, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with its BatchNorm folded once."""

    dims = 5


class DeployLinear(Deploy, LinearGeometry, nn.Linear):
    """`torch.nn.Linear` with its BatchNorm1d folded once."""

    dims = 2
