"""The variants of the benchmark: the modes of this package, and other tools for the same purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from examples.benchmarks.networks import Workload
from lightning_convbn import Mode, Recompute, fit_memory_budget, set_mode
from lightning_convbn.memory import measure_memory_abstractly
from lightning_convbn.memory.budget import fixed_bytes

INDUCTOR_PASS = "inductor_pass"
BUDGETS = (0.9, 0.7, 0.5, 0.35)  # of Eval's peak, beyond parameters and buffers
COMPILED_BUDGETS = {"compiled_75": 0.75, "compiled_half": 0.5, "compiled_25": 0.25, "compiled_0": 0.0}
TUNE_COMPILED_BUDGETS = {"tune_compiled_half": 0.5, "tune_compiled_25": 0.25}


def budget_name(share: float) -> str:
    """Return the name of the variant that may take a share of Eval's peak."""
    return f"tune_budget_{round(100 * share)}"


class Variant(NamedTuple):
    """One way to run a network.

    Attributes:
        title: Its name in tables.
        build: Builds a network from a workload; it shares the parameters that both have.
        colour: Its colour in plots.
        compiled: Whether it uses `torch.compile`.
        folded_weights: Whether it trains folded weights instead of the original ones.
        has_evals_gradients: Whether its gradients should equal those of Eval.
    """

    title: str
    build: Callable[[Workload], nn.Module]
    colour: str
    compiled: bool = False
    folded_weights: bool = False
    has_evals_gradients: bool = True


def _train(workload: Workload, recompute: Recompute = "none") -> nn.Module:
    model = workload.copy(workload.model, own_buffers=True).train()
    set_mode(model, "train", pairs=workload.pairs, recompute=recompute)
    return model


def _eval(workload: Workload) -> nn.Module:
    return workload.copy(workload.model)


def _mode(workload: Workload, mode: Mode, recompute: Recompute = "none") -> nn.Module:
    model = workload.copy(workload.model)
    set_mode(model, mode, pairs=workload.pairs, recompute=recompute)
    return model


def _within_budget(workload: Workload, share: float) -> nn.Module:
    """Take the least recomputation whose peak is at most a share of Eval's, beyond parameters and buffers."""
    model = workload.copy(workload.model)
    eval_peak = measure_memory_abstractly(model, workload.inputs, {}, mode="eval").peak_bytes
    if eval_peak is None:
        raise ValueError("its backward pass fails without data, so there is no peak to take a share of")
    budget = fixed_bytes(model) + int(share * eval_peak)
    plan = fit_memory_budget(model, *workload.inputs, memory_budget=budget, pairs=workload.pairs)
    if not plan.fits:
        raise ValueError(plan.complaint())
    return model


def _deploy(workload: Workload) -> nn.Module:
    return workload.copy(workload.fused)


def _compiled(workload: Workload, build: Callable[[Workload], nn.Module], **options: Any) -> nn.Module:
    model = build(workload)
    # Without dynamic shapes: otherwise the second batch size would be compiled for any size, unlike the first.
    # Without the cache on disk: inductor does not count the folds of cached code.
    model.get_submodule(workload.part).compile(dynamic=False, options={"fx_graph_cache": False, **options})
    return model


def _mmengine(workload: Workload) -> nn.Module:
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    model = workload.copy(workload.model)
    turn_on_efficient_conv_bn_eval(nn.ModuleDict({"model": model}), f"model.{workload.part}".rstrip("."))
    return model


def _compiled_within(workload: Workload, share: float, build: Callable[[Workload], nn.Module] = _eval) -> nn.Module:
    """The partitioner recomputes until a share of the activations is kept.

    A backend of its own: with that of `_compiled`, Dynamo would run the code that it has compiled without a budget.
    """

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=share):
            return compile_fx(graph, inputs, config_patches={"fx_graph_cache": False})

    model = build(workload)
    model.get_submodule(workload.part).compile(dynamic=False, backend=backend)
    return model


def _checkpointed(workload: Workload, units: str, build: Callable[[Workload], nn.Module] = _eval) -> nn.Module:
    names: list[str] = getattr(workload, units)
    if not names:
        raise ValueError(f"no {units} are known to checkpoint; see networks.py")
    model = build(workload)
    for name in names:
        stage = model.get_submodule(name)
        stage.forward = partial(_checkpoint, stage.forward, stage.training)
    return model


def _checkpoint(forward: Callable[..., Any], draws: bool, *inputs: Any) -> Any:
    def run(*inputs: Any) -> Any:
        return forward(*_copied(inputs))  # HRNet changes the list that it gets

    # DenseNet changes the list later that its layers get. Dropout and stochastic depth draw in training state alone.
    return checkpoint(run, *_copied(inputs), use_reentrant=False, preserve_rng_state=draws)


def _copied(containers: Any) -> Any:
    """Copy lists, tuples and dicts, not the tensors in them."""
    return tree_map(lambda leaf: leaf, containers)


VARIANTS: dict[str, Variant] = {
    "train": Variant("Train", _train, "#7c8594", has_evals_gradients=False),
    "train_recompute": Variant(
        "Train + elementwise", partial(_train, recompute="elementwise"), "#b07aa1", has_evals_gradients=False
    ),
    "train_blocks": Variant(
        "Train + blocks", partial(_train, recompute="blocks"), "#7b4a6e", has_evals_gradients=False
    ),
    "train_checkpoint_blocks": Variant(
        "checkpoint per block (Train)",
        partial(_checkpointed, units="blocks", build=_train),
        "#e58b8b",
        has_evals_gradients=False,
    ),
    "eval": Variant("Eval", _eval, "#d9772b"),
    "tune": Variant("Tune", partial(_mode, mode="tune"), "#12998c"),
    "tune_recompute": Variant("Tune + elementwise", partial(_mode, mode="tune", recompute="elementwise"), "#5fbf5a"),
    "tune_blocks": Variant("Tune + blocks", partial(_mode, mode="tune", recompute="blocks"), "#2c8f6b"),
    **{
        budget_name(share): Variant(
            f"Tune, budget {share:.2f} of Eval", partial(_within_budget, share=share), "#1f6f5c"
        )
        for share in BUDGETS
    },
    "tune_compiled": Variant(
        "Tune, compiled", partial(_compiled, build=partial(_mode, mode="tune")), "#2f7fd0", compiled=True
    ),
    **{
        name: Variant(
            f"Tune, compiled, memory budget {share}",
            partial(_compiled_within, share=share, build=partial(_mode, mode="tune")),
            "#1f5a99",
            compiled=True,
        )
        for name, share in TUNE_COMPILED_BUDGETS.items()
    },
    "deploy": Variant("Deploy copy", _deploy, "#a3adbb", folded_weights=True),
    "deploy_compiled": Variant(
        "Deploy copy, compiled", partial(_compiled, build=_deploy), "#8d9bd6", compiled=True, folded_weights=True
    ),
    "mmengine": Variant("mmengine", _mmengine, "#c25a9b"),
    INDUCTOR_PASS: Variant(
        "inductor's pass",
        partial(_compiled, build=_eval, efficient_conv_bn_eval_fx_passes=True),
        "#9467bd",
        compiled=True,
    ),
    "compiled": Variant("torch.compile alone", partial(_compiled, build=_eval), "#b5893c", compiled=True),
    **{
        name: Variant(
            f"torch.compile, memory budget {share}", partial(_compiled_within, share=share), "#8a6d1f", compiled=True
        )
        for name, share in COMPILED_BUDGETS.items()
    },
    "checkpoint": Variant("checkpoint per stage", partial(_checkpointed, units="stages"), "#d1495b"),
    "checkpoint_blocks": Variant("checkpoint per block", partial(_checkpointed, units="blocks"), "#8f2d3c"),
}


def forget_compiled() -> None:
    """Drop compiled code and counters, so that a cell of the benchmark does not depend on the one before.

    To Dynamo, each variant that is compiled is the same code with another backend. Above a limit it compiles no more.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2 * len(VARIANTS)
    counters.clear()


def folded_by_inductor() -> int:
    """Count the blocks that inductor's pass has folded since `forget_compiled`."""
    return int(counters["inductor"]["efficient_conv_bn_eval"])
