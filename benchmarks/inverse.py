"""What inverse problems cost: operators, a step of CIRIM, hypergradients.

Operators stand beside deepinv's, the step beside a plain formulation of the same block, and hypergradients beside those of autograd through
all iterations of the lower solve.

    python benchmarks/inverse.py [--section operators cirim hypergradient] [--rounds 9] [--threads 1] [--device cpu] [--json FILE]

Both sides run in turns in one process; seconds are the shortest of all rounds. MiB are those of all tensors that a call makes, which is the
same on any machine; of hypergradients they are those that autograd's graphs keep at most. Ratios are ours over the other side's. The
script fails when two sides give other values. Without deepinv the operators are timed alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_methods.inverse_problems.bilevel import BilevelProblem
from lit_methods.inverse_problems.cirim.core import CIRIMNetwork, RIMBlock, accumulated_loss
from lit_methods.inverse_problems.maid.core import Solver, hypergradient
from lit_methods.inverse_problems.masks import make_mask
from lit_methods.inverse_problems.mri import MultiCoilMRI, normalise_maps
from lit_methods.inverse_problems.operators import BicubicDownsampling, Blur, Inpainting, gaussian_kernel, motion_kernel
from lit_methods.inverse_problems.problems import make_problem

Call = Callable[[], Any]
Row = dict[str, Any]


class MadeBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make; views of others don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.total += x.untyped_storage().nbytes()
        return found


def made(call: Call) -> float:
    """MiB that a call makes."""
    with MadeBytes() as counter:
        call()
    return counter.total / 2**20


class _Held:
    """A tensor that a graph keeps; its storage counts once."""

    def __init__(self, tensor: Tensor, counter: "KeptBytes") -> None:
        self.tensor, self.counter, self.place = tensor, counter, tensor.untyped_storage().data_ptr()
        counter.change(self.place, 1, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.counter.change(self.place, -1, self.tensor.untyped_storage().nbytes())


class KeptBytes:
    """The most bytes that autograd's graphs keep at a time while a call runs."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0
        self.holders: dict[int, int] = {}

    def change(self, place: int, by: int, size: int) -> None:
        """A graph takes or lets go of a storage."""
        before = self.holders.get(place, 0)
        self.holders[place] = before + by
        self.now += size * ((before == 0 and by > 0) - (before == 1 and by < 0))
        self.most = max(self.most, self.now)

    def of(self, call: Call) -> float:
        """MiB."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, self), lambda held: held.tensor):
            call()
        return self.most / 2**20


def seconds(calls: dict[str, Call], rounds: int, device: str) -> dict[str, float]:
    """The shortest time of each, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first is a warm-up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def compared(name: str, calls: dict[str, Call], options: argparse.Namespace, memory: Callable[[Call], float] = made) -> Row:
    """A row of the table: ours and theirs."""
    times = seconds(calls, options.rounds, options.device)
    row: Row = {"name": name}
    for side, call in calls.items():
        row |= {f"{side} ms": 1000 * times[side], f"{side} MiB": memory(call)}
    first, *others = calls
    for side in others:
        row |= {f"{what} ratio to {side}": row[f"{first} {what}"] / row[f"{side} {what}"] for what in ("ms", "MiB")}
    print("  ".join([f"{name:34}", *(f"{key} {value:10.3f}" for key, value in row.items() if key != "name")]), flush=True)
    return row


# ---- operators --------------------------------------------------------------------------------------------------------------------------


def operators(options: argparse.Namespace) -> list[Row]:
    """Forward and adjoint of each, ours and deepinv's."""
    try:
        import deepinv
    except ImportError:
        deepinv = None
        print("deepinv isn't installed: pip install 'lit-methods[peers]'")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 256, 256, generator=generator).to(options.device)
    image = torch.rand(2, 320, 320, 2, generator=generator).to(options.device)
    motion, small = motion_kernel(61, generator).float(), gaussian_kernel(9, 2.0).float()
    mask = torch.rand(256, 256, generator=generator) < 0.5
    maps = normalise_maps(torch.randn(2, 8, 320, 320, 2, generator=generator))
    sampled = torch.rand(1, 1, 320, 320, 1, generator=generator) < 0.25

    def theirs(name: str) -> Any:
        if deepinv is None:
            return None
        physics = deepinv.physics
        return {
            "blur, 61 pixels": lambda: physics.BlurFFT(img_size=(3, 256, 256), filter=motion[None, None]),
            "blur, 9 pixels": lambda: physics.Blur(filter=small[None, None], padding="circular"),
            "bicubic, 4 times smaller": lambda: physics.Downsampling(img_size=(3, 256, 256), filter="bicubic", factor=4),
            "inpainting": lambda: physics.Inpainting(img_size=(3, 256, 256), mask=mask[None].float().expand(3, -1, -1)),
            "8 coils": lambda: physics.MultiCoilMRI(
                mask=sampled[:, 0, ..., 0].float(), coil_maps=torch.view_as_complex(maps), img_size=(2, 320, 320)
            ),
        }[name]().to(options.device)

    ours = {
        "blur, 61 pixels": (Blur(motion), x),
        "blur, 9 pixels": (Blur(small), x),
        "bicubic, 4 times smaller": (BicubicDownsampling((256, 256), 4), x),
        "inpainting": (Inpainting(mask, flat=False), x),
        "8 coils": (MultiCoilMRI(maps, sampled), image),
    }
    rows = []
    for name, (operator, given) in ours.items():
        operator = operator.to(options.device)
        other = theirs(name)
        foreign = given if name != "8 coils" else given.permute(0, 3, 1, 2).contiguous()
        y = operator(given)
        calls: dict[str, Call] = {"ours": lambda operator=operator, given=given: operator(given)}
        back: dict[str, Call] = {"ours": lambda operator=operator, y=y: operator.adjoint(y)}
        if other is not None:
            y_theirs = other.A(foreign)
            calls["theirs"] = lambda other=other, foreign=foreign: other.A(foreign)
            back["theirs"] = lambda other=other, y=y_theirs: other.A_adjoint(y)
            if name not in ("bicubic, 4 times smaller", "blur, 61 pixels"):  # other borders, another place of the kernel's middle
                same = y if name != "8 coils" else y.permute(0, 4, 1, 2, 3)
                torch.testing.assert_close(y_theirs, same, rtol=1e-3, atol=1e-4)
        rows += [compared(f"{name}, forward", calls, options), compared(f"{name}, adjoint", back, options)]
    return rows


# ---- CIRIM ------------------------------------------------------------------------------------------------------------------------------


def plain_gradient(image: Tensor, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    """The likelihood's gradient with real arithmetic, coil by coil."""
    total = torch.zeros_like(image)
    for coil in range(kspace.shape[1]):
        a, b = maps[:, coil, ..., 0], maps[:, coil, ..., 1]
        real, imaginary = image[..., 0] * a - image[..., 1] * b, image[..., 0] * b + image[..., 1] * a
        seen = torch.fft.ifftshift(torch.complex(real, imaginary), dim=(-2, -1))
        k = torch.view_as_real(torch.fft.fftshift(torch.fft.fft2(seen, norm="ortho"), dim=(-2, -1)))
        residual = torch.where(mask[:, 0], k - kspace[:, coil], 0)
        left = torch.fft.ifft2(torch.fft.ifftshift(torch.view_as_complex(residual), dim=(-2, -1)), norm="ortho")
        back = torch.view_as_real(torch.fft.fftshift(left, dim=(-2, -1)))
        total = total + torch.stack([a * back[..., 0] + b * back[..., 1], a * back[..., 1] - b * back[..., 0]], -1)
    return torch.cat([image, total], -1).permute(0, 3, 1, 2)


def plain_block(block: RIMBlock, kspace: Tensor, maps: Tensor, mask: Tensor, image: Tensor, hidden: Any) -> Any:
    """A block as one might write it at first, with the weights of ours."""
    first, second = hidden or block.start(image)
    images = []
    for _ in range(block.time_steps):
        features = F.pad(plain_gradient(image, kspace, maps, mask), (2, 2, 2, 2), mode="replicate")
        first = block.rnn0(torch.relu(block.conv0(features)), first)
        second = block.rnn1(torch.relu(block.conv1(F.pad(first, (2, 2, 2, 2), mode="replicate"))), second)
        image = image + block.conv2(F.pad(second, (1, 1, 1, 1), mode="replicate")).permute(0, 2, 3, 1)
        images.append(image)
    return torch.stack(images), (first, second)


def cirim(options: argparse.Namespace) -> list[Row]:
    """Forward, loss and backward of two cascades; ours once more with checkpointing."""
    import numpy as np

    rows = []
    for size, coils in ((64, 4), (128, 12)):
        torch.manual_seed(0)
        maps = normalise_maps(torch.randn(1, coils, size, size, 2)).to(options.device)
        mask = torch.from_numpy(make_mask("gaussian_2d", (size, size), 4.0, 0.02, np.random.default_rng(0)))[None, None, ..., None]
        mask, target = mask.to(options.device), torch.randn(1, size, size, 2).to(options.device)
        kspace = MultiCoilMRI(maps, mask)(target)
        network = CIRIMNetwork(2, 32, 4).to(options.device)
        frugal = CIRIMNetwork(2, 32, 4, checkpointing=True).to(options.device)
        frugal.load_state_dict(network.state_dict())

        def step(net: CIRIMNetwork, data: tuple[Tensor, ...], truth: Tensor) -> Tensor:
            net.zero_grad()
            loss = accumulated_loss(net(*data), truth)[0]
            loss.backward()
            return loss.detach()

        def plain(net: CIRIMNetwork, data: tuple[Tensor, ...], truth: Tensor) -> Tensor:
            net.zero_grad()
            image, hidden, found = -plain_gradient(torch.zeros_like(truth), *data)[:, 2:].permute(0, 2, 3, 1), None, []
            for block in net.cascades:
                images, hidden = plain_block(block, *data, image, hidden)  # type: ignore[arg-type]
                image = images[-1]
                found.append(images)
            loss = accumulated_loss(torch.stack(found), truth)[0]
            loss.backward()
            return loss.detach()

        words = ((kspace, maps, mask), target)
        torch.testing.assert_close(step(network, *words), plain(network, *words), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(step(network, *words), step(frugal, *words))
        calls: dict[str, Call] = {
            "ours": lambda net=network, words=words: step(net, *words),
            "plain": lambda net=network, words=words: plain(net, *words),
            "checkpointing": lambda net=frugal, words=words: step(net, *words),
        }
        rows.append(compared(f"step, {coils} coils, {size} x {size}", calls, options))
    return rows


# ---- hypergradients ---------------------------------------------------------------------------------------------------------------------


def unrolled(problem: BilevelProblem, theta: Tensor, x: Tensor, iterations: int) -> Tensor:
    """The gradient of the upper loss by autograd through accelerated gradient steps on the lower one."""
    theta = theta.detach().requires_grad_()
    mu, smoothness = problem.constants(theta.detach())
    root = (mu / smoothness) ** 0.5
    before = x = x.detach().requires_grad_()
    for _ in range(iterations):
        point = x + (1 - root) / (1 + root) * (x - before)
        (slope,) = torch.autograd.grad(problem.lower(point, theta), point, create_graph=True)
        before, x = x, point - slope / smoothness
    (found,) = torch.autograd.grad(problem.upper(x), theta)
    return found


def hypergradients(options: argparse.Namespace) -> list[Row]:
    """By the implicit function theorem, as MAID has them, and by autograd through as many iterations as the lower solve took."""
    from lit_methods.datamodules import NoisyImagesDataModule, WeightDecayDataModule

    rows = []
    for name, data in (("weight_decay", WeightDecayDataModule()), ("tv", NoisyImagesDataModule(number=4, size=64))):
        data.setup("fit")
        assert data.problem is not None
        problem = make_problem(name, {key: value.to(options.device) for key, value in data.problem.items()})  # type: ignore[arg-type]
        theta, x = problem.start()
        accuracy = 1e-4 if name == "weight_decay" else 1e-2
        solver = Solver(max_iterations=20000)
        found = hypergradient(problem, theta, x, accuracy, accuracy * 1e-4, solver)
        steps = found.lower_iterations + 1
        other = unrolled(problem, theta, x, steps)
        error = float(torch.linalg.vector_norm(found.z - other) / torch.linalg.vector_norm(other))
        assert error < 0.02, f"the two gradients differ by {error:.3f} of their length"
        calls: dict[str, Call] = {
            "ours": lambda p=problem, t=theta, x=x, a=accuracy, s=solver: hypergradient(p, t, x, a, a * 1e-4, s),
            "unrolled": lambda p=problem, t=theta, x=x, n=steps: unrolled(p, t, x, n),
        }
        rows.append(compared(f"{name}, {steps} iterations", calls, options, lambda call: KeptBytes().of(call)))
    return rows


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "operators": operators,
    "cirim": cirim,
    "hypergradient": hypergradients,
}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: SECTIONS[name](options) for name in options.section}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
