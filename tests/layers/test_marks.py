"""A fold is right whatever a model does at run time: each case against the same layers with eval() BatchNorms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import assert_close
from helpers.model_checks import randomized
from helpers.networks import images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convbn import measure_memory, set_mode

Layers = nn.Sequential
Use = Callable[[Layers, Tensor], Any]


def layers() -> Layers:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    return randomized(made.double().eval())  # type: ignore[return-value]


def found(net: Layers, use: Use) -> list[Tensor | None]:
    """The output, and all gradients."""
    image = images(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    output = use(net, image)
    output.square().sum().backward()
    return [output.detach(), image.grad, *(parameter.grad for parameter in net.parameters())]


def assert_as_eval(use: Use, mode: Any) -> None:
    plain, converted = layers(), layers()
    set_mode(converted, mode)
    expected, actual = found(plain, use), found(converted, use)
    assert [one is None for one in actual] == [one is None for one in expected]
    assert_close([one for one in actual if one is not None], [one for one in expected if one is not None], 1e-10)


def stem_of_ones_own(net: Layers, x: Tensor) -> Tensor:
    return net[1](x.repeat(1, 2, 1, 1)[:, :4])


def tap_beside(net: Layers, x: Tensor) -> Tensor:
    return net[1](net[0](x)) + net[0](x)


def tap_kept_and_read_later(net: Layers, x: Tensor) -> Tensor:
    kept = net[0](x)
    return net[1](kept) + kept


def something_between(net: Layers, x: Tensor) -> Tensor:
    return net[1](net[0](x) + 1)


def written_in_place_between(net: Layers, x: Tensor) -> Tensor:
    y = net[0](x)
    y.add_(1)
    y[:, 0] = 0
    return net[1](y)


def norm_of_another_domain(net: Layers, x: Tensor) -> Tensor:
    other = copy.deepcopy(layers()[1])
    return other(net[0](x)) + net[1](net[0](x))


def convolution_without_gradients(net: Layers, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net[0](x)
    return net[1](y)


def norm_without_gradients(net: Layers, x: Tensor) -> Tensor:
    y = net[0](x)
    with torch.no_grad():
        z = net[1](y)
    return net(x) + z.mean()


def shared_by_two_inputs(net: Layers, x: Tensor) -> Tensor:
    return net(x) - net(2 * x)


def a_convolution_behind_it(net: Layers, x: Tensor) -> Tensor:
    return net[3](net[0](x))


def by_the_functional_form(net: Layers, x: Tensor) -> Tensor:
    return F.batch_norm(net[0](x), net[1].running_mean, net[1].running_var)  # type: ignore[arg-type]


def as_numpy(net: Layers, x: Tensor) -> Tensor:
    return net(x) * float(net[0](x).detach().numpy().sum())


def in_a_list_and_a_dict(net: Layers, x: Tensor) -> Tensor:
    features = {"low": [net[0](x)]}
    return torch.cat([*features["low"], net[1](features["low"][0])])


def by_an_operator(net: Layers, x: Tensor) -> Tensor:
    return torch.ops.aten.mul(net[0](x), 2.0)  # type: ignore[no-any-return]


def pickled(net: Layers, x: Tensor) -> Tensor:
    return copy.deepcopy(net[0](x).detach()) * net(x).mean()


def after_a_checkpoint(net: Layers, x: Tensor) -> Tensor:
    y: Any = checkpoint(net[0], x, use_reentrant=False)
    return net[1](y)


def within_vmap(net: Layers, x: Tensor) -> Tensor:
    def one(image: Tensor) -> Tensor:
        y = net[0](image[None])
        return (net[1](y) + y)[0]

    return torch.func.vmap(one)(x)


def within_grad(net: Layers, x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (net[1](net[0](y)) + net[0](y)).square().sum())(x)


def hook_that_returns_another_tensor(net: Layers, x: Tensor) -> Tensor:
    handle = net[0].register_forward_hook(lambda module, args, output: 2 * output)
    output = net(x)
    handle.remove()
    return output


def hook_that_stores(net: Layers, x: Tensor) -> Tensor:
    stored: list[Tensor] = []
    handle = net[0].register_forward_hook(lambda module, args, output: stored.append(output))
    output = net(x)
    handle.remove()
    return output.mean() + stored[0].mean()


def hook_on_the_norm(net: Layers, x: Tensor) -> Tensor:
    handle = net[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    output = net(x)
    handle.remove()
    return output


def hook_on_gradients(net: Layers, x: Tensor) -> Tensor:
    net[0].register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    net[4].register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))
    return net(x)


def norm_called_twice_and_written(net: Layers, x: Tensor) -> Tensor:
    y = net[0](x)
    first = net[1](y)
    first.relu_()
    return first + net[1](y)


def written_through_a_view(net: Layers, x: Tensor) -> Tensor:
    y = net[0](x)
    y.flatten(2).mul_(2)
    return net[1](y)


def view_of_what_is_written_later(net: Layers, x: Tensor) -> Tensor:
    y = net[0](x)
    view = torch.flatten(input=y, start_dim=2)
    y.mul_(2)
    return view + 0


USES: list[Use] = [
    norm_called_twice_and_written,
    written_through_a_view,
    view_of_what_is_written_later,
    stem_of_ones_own,
    tap_beside,
    tap_kept_and_read_later,
    something_between,
    written_in_place_between,
    norm_of_another_domain,
    convolution_without_gradients,
    norm_without_gradients,
    shared_by_two_inputs,
    a_convolution_behind_it,
    by_the_functional_form,
    as_numpy,
    in_a_list_and_a_dict,
    by_an_operator,
    pickled,
    after_a_checkpoint,
    within_vmap,
    within_grad,
    hook_that_returns_another_tensor,
    hook_that_stores,
    hook_on_the_norm,
    hook_on_gradients,
]


@pytest.mark.parametrize("mode", ["eval", "tune", "deploy"])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_done_with_a_folded_output_is_done_with_evals(use: Use, mode: Any) -> None:
    assert_as_eval(use, mode)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_a_convolution_that_was_replaced_is_normalised(mode: Any) -> None:
    plain, converted = layers(), layers()
    set_mode(converted, mode)
    for net in (plain, converted):
        net[0] = nn.Conv2d(3, 4, 1).double()
        nn.init.ones_(net[0].weight)
        nn.init.zeros_(net[0].bias)
    image = images(2, 3, 8, 8, dtype=torch.float64)
    assert_close([converted(image)], [plain(image)], 1e-12)


def test_a_write_to_the_input_before_the_output_is_read_is_an_error_that_names_the_layer() -> None:
    net = layers()
    set_mode(net, "tune")
    image = images(2, 3, 8, 8, dtype=torch.float64)
    output = net[0](image)
    image.add_(1)
    with pytest.raises(RuntimeError, match=r"Conv2d\(3, 4, .*input or the weight of the convolution was written"):
        output.mean()


def test_what_a_mark_says_of_shape_and_dtype_needs_no_computation() -> None:
    net = layers()
    set_mode(net, "tune")
    output: Any = net[0](images(2, 3, 8, 8, dtype=torch.float64))
    assert (output.shape, output.dim(), output.dtype, output.size(1), len(output)) == (
        (2, 4, 8, 8),
        4,
        torch.float64,
        4,
        2,
    )
    flat: Any = torch.ones(2 * 4 * 8 * 8)
    assert flat.view_as(output).shape == flat.reshape_as(output).shape == torch.ones(1).expand_as(output).shape


def test_only_gamma_trained_never_keeps_more_than_eval() -> None:
    """Eval mode keeps the output then; where that is smaller than the input, the pair runs as in Eval mode."""
    for conv in (
        nn.Conv2d(16, 2, 3),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(2, 16, 1),
        nn.ConvTranspose2d(4, 4, 2, 2),
    ):
        net = nn.Sequential(conv.requires_grad_(False), nn.BatchNorm2d(conv.out_channels))
        image = images(4, conv.in_channels, 12, 12)
        for wanted in (image, image.clone().requires_grad_()):
            kept = {mode: measure_memory(net, wanted, mode=mode).saved_bytes for mode in ("eval", "tune")}  # type: ignore[arg-type]
            assert kept["tune"] <= kept["eval"], (conv, kept)
