"""Small models of Hugging Face's transformers, built from a config; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET))


def mobilenet_v2() -> nn.Module:
    """A classifier that can't be traced, because it pads by the size of the image."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=64)
    return transformers.MobileNetV2ForImageClassification(config)


def rt_detr(blocks: int = 2, **options: Any) -> nn.Module:
    """A detector: its backbone's BatchNorms are frozen as in DETR, those of its hybrid encoder are ordinary ones.

    Args:
        blocks: Number of blocks in each stage of the backbone.
        **options: More of the detector's config.
    """
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 24, 32],
        depths=[blocks] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 24, 32],
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_queries=5,
        **options,
    )
    return transformers.RTDetrForObjectDetection(config)
