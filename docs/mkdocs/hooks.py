"""What MkDocs is told beside its configuration: equations become MathML, which browsers draw without a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Draw fenced blocks named ``math``, as GitHub does."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})
    return config


def equation(source: str, *_: Any, **__: Any) -> str:
    """Turn LaTeX into a MathML block."""
    return f'<div class="math">{convert(source, display="block")}</div>'
