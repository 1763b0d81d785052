"""All layers together: compiled, checkpointed, under autocast, data-parallel, copied; exact ones train as torch's."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import blocks
import pytest
import torch
import torch.utils.checkpoint
from bits import assert_same_bits
from blocks import Exact, data, gradients, loss_of, model
from torch import Tensor, nn

import pyzo
from pyzo.memory import account
from pyzo.optim import ZOSGD, ForwardGradSGD

ROOT = Path(__file__).parents[2]
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def step(network: nn.Module, run: Step = loss_of, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients; the same masks of dropout each time."""
    x, y = (t.to(device) for t in data(4, seed=0))
    torch.manual_seed(1)
    network.zero_grad()
    loss = run(network, x, y)
    loss.backward()
    return loss.detach(), gradients(network)


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_same_bits(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert_same_bits(got[1][name], gradient, name)


def test_compiled_without_a_break(device):
    network = model().to(device)
    want = step(network, device=device)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    got = step(network, lambda _, x, y: loss_of(compiled, x, y), device)
    torch.testing.assert_close(got[0], want[0])
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")
    torch.compiler.reset()


def test_checkpointed(device):
    network = model().to(device)
    want = step(network, device=device)

    def checkpointed(network: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        for block in network:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return (x - y).square().mean()

    assert_same(step(network, checkpointed, device), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype, device):
    """Gradients of a scaled loss under autocast are near those in float32, and float32 as the parameters."""
    network = model().to(device)
    want = step(network, device=device)[1]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.0)

    def scaled(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            loss = loss_of(network, x, y)
        return scaler.scale(loss)

    step(network, scaled, device)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for name, gradient in gradients(network).items():
        assert gradient.dtype == torch.float32
        error = (gradient - want[name]).norm() / want[name].norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01), (name, error)


def test_accumulated_gradients():
    network = model()
    first = step(network)[1]
    first = {name: g.clone() for name, g in first.items()}
    torch.manual_seed(1)
    loss_of(network, *data(4, seed=0)).backward()
    second = gradients(network)
    for name, gradient in first.items():
        assert_same_bits(second[name], gradient + gradient, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(mode):
    network, (x, _) = model(), data(4, seed=0)
    torch.manual_seed(1)
    want = network(x)
    with mode():
        torch.manual_seed(1)
        kept = account(lambda: network(x), network)
    assert kept.nbytes == 0
    torch.testing.assert_close(kept.result, want)


def test_double_backward_says_so():
    network, (x, _) = model(), data(4, seed=0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"derivative|differentiated"):
        gradient.square().sum().backward()


def test_two_ranks_average_their_gradients(tmp_path):
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "nn", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, blocks.__file__, str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = []
    for rank in range(2):
        network = model()
        torch.manual_seed(rank)
        loss_of(network, *data(4, seed=rank)).backward()
        alone.append(gradients(network))
    for name in alone[0]:
        assert_same_bits(found[0][name], found[1][name], name)
        torch.testing.assert_close(found[0][name], (alone[0][name] + alone[1][name]) / 2)


def test_copies_and_pickles():
    network = model()
    want = step(network)
    assert_same(step(copy.deepcopy(network)), want)
    assert_same(step(pickle.loads(pickle.dumps(network))), want)
    other = model()
    other.load_state_dict(network.state_dict())
    assert_same(step(other), want)


def test_exact_layers_train_as_those_of_torch(one_thread):
    """120 steps of AdamW from one state dict, which fits both: one loss curve, to float32's rounding and its growth.

    The first gradients are compared too, as AdamW does not see by what factor they are wrong.
    """
    torch.manual_seed(0)
    networks = [nn.Sequential(Exact(own), nn.Linear(blocks.WIDTH, 1)) for own in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    assert list(networks[0].state_dict()) == list(networks[1].state_dict())
    own, plain = (step(network)[1] for network in networks)
    for name, gradient in plain.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    curves = []
    for network in networks:
        optimizer, curve = torch.optim.AdamW(network.parameters(), lr=3e-3), []
        for i in range(120):
            loss = loss_of(network, *data(16, seed=i % 10))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_zeroth_order_steps_see_the_same_dropout():
    """With hardly any perturbation the two losses of a step agree: the masks are drawn again as nn.Dropout's are."""
    network, (x, y) = model(), data(4, seed=0)
    opt = ZOSGD([p for p in network.parameters() if p.requires_grad], lr=0.0, eps=1e-6, store="snapshot", seed=1)
    opt.step(lambda: loss_of(network, x, y))
    positive, negative = opt.last.losses[:2].tolist()
    assert positive == pytest.approx(negative, rel=1e-4)
    torch.manual_seed(5)
    assert loss_of(network, x, y).item() != pytest.approx(positive, rel=1e-4)  # another mask is another loss


LAYERS = (
    pyzo.nn.ReGELU2(),
    pyzo.nn.OutputActivation("silu"),
    pyzo.nn.SeededDropout(0.25),
    pyzo.nn.MSLayerNorm(8, affine=True),
    pyzo.nn.MSRMSNorm(8),
    pyzo.nn.SwiGLU(),
    pyzo.nn.LoRALinear(nn.Linear(8, 3), 2, dropout=0.25),
    pyzo.nn.GatedLoRALinear(nn.Linear(8, 3), 2, dropout=0.25),
    pyzo.nn.GatedLinear(8, 3),
    pyzo.nn.ActivationLinear(8, 3),
)


def inputs_of(layer: nn.Module) -> int:
    return 2 if isinstance(layer, (pyzo.nn.SwiGLU, pyzo.nn.GatedLinear, pyzo.nn.GatedLoRALinear)) else 1


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_no_tangent_is_dropped(layer):
    """torch would return a zero derivative where nothing requires a gradient."""
    x = torch.randn(4, 8)
    for position in range(inputs_of(layer)):

        def run(moving: Tensor, position: int = position) -> Tensor:
            return layer(*(moving if i == position else x for i in range(inputs_of(layer))))

        with pytest.raises(NotImplementedError, match="expected a tensor without a tangent"):
            torch.func.jvp(run, (x,), (x,))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_shapes_without_memory(layer):
    """On the meta device, which has no autocast: more than any machine holds."""
    layer = copy.deepcopy(layer).to("meta")
    inputs = [torch.empty(2**40, 8, device="meta", requires_grad=True) for _ in range(inputs_of(layer))]
    y = layer(*inputs)
    y.sum().backward()
    assert y.shape == (2**40, y.shape[-1]) and all(x.grad.shape == x.shape for x in inputs)


def test_forward_gradients_refuse_by_name():
    network, (x, y) = model(), data(4, seed=0)
    opt = ForwardGradSGD([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(RuntimeError, match=r"pyzo::.*no forward-mode rule"):
        opt.step(lambda: loss_of(network, x, y))
