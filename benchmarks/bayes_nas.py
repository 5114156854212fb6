"""What Bayesian and searched sparse networks cost: time and memory of steps and predictions, each arm in a process of its own.

    pip install torch-uncertainty bayesian-torch
    python benchmarks/bayes_nas.py ssvi --json ssvi.json
    python benchmarks/bayes_nas.py scoring --json scoring.json

Section ``ssvi``: a training step of a ResNet-20 on made pictures (deterministic; dense mean-field inference by bayesian-torch and by
torch-uncertainty, which draw one set of weights a batch, and by our layers; SSVI at 10 %, updates included), and a prediction of ten draws
(ten copies of the network; our layers; a stored sparse posterior). Memory is the growth of the process's largest resident set from before
the network was built. A library that isn't installed is left out, and said so.

Section ``scoring``: the loss of 100 random masks of the same ResNet-20 on a batch, as ``RandomSearch`` scores its candidates, in one copy
of the network; and by a loop that copies the network for each. Both must find the same losses. DASS's five evaluations against clones of
the model stand in ``benchmarks/architecture_search.py``.
"""

import argparse
import copy
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.bayes.conversion import bayes_layers, to_bayes
from lit_methods.bayes.layers import drawing
from lit_methods.bayes.prediction import posterior_logits
from lit_methods.bayes.stored import predictor, sparse_state
from lit_methods.callbacks.sparsity.masks import keep_largest, random_mask
from lit_methods.callbacks.sparsity.random_search.core import candidate_scores
from lit_methods.callbacks.sparsity.ssvi.core import active_count, removal_addition
from lit_methods.tasks.vision.networks import CifarResNet

BATCH, DENSITY, INTERVAL, DRAWS, CANDIDATES = 64, 0.1, 20, 10, 100
CPU = torch.device("cpu")


def resident() -> float:
    """Largest resident set so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def network() -> nn.Module:
    """The network of all arms, drawn alike."""
    torch.manual_seed(0)
    return CifarResNet(depth=20, width=16, num_classes=10)


def sparse_network() -> nn.Module:
    """Converted, all layers but the first at 10 %."""
    net = network()
    to_bayes(net, mean_std=0.01)
    with torch.no_grad():
        for layer in list(bayes_layers(net).values())[1:]:
            layer.mask.copy_(keep_largest(torch.rand(layer.mask.shape), active_count(layer.mask.numel(), DENSITY)))
            layer.weight.mul_(layer.mask)
            layer.rho.mul_(layer.mask)
    return net


# ---- training steps --------------------------------------------------------------------------------------------------------------------


def replaced(net: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The network with its linear layers and convolutions replaced by somebody else's."""
    for part in list(net.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                setattr(part, name, make(child))
    return net


def of_bayesian_torch(layer: nn.Module) -> nn.Module:
    from bayesian_torch.layers import Conv2dReparameterization, LinearReparameterization

    options: dict[str, Any] = {"prior_mean": 0, "prior_variance": 0.005, "posterior_mu_init": 0, "posterior_rho_init": -7.0}
    kind, sizes = LinearReparameterization, [getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)]
    if isinstance(layer, nn.Conv2d):
        kind, sizes = Conv2dReparameterization, [layer.in_channels, layer.out_channels, layer.kernel_size]
        options |= {"stride": layer.stride, "padding": layer.padding}
    made = kind(*sizes, bias=layer.bias is not None, **options)
    made.dnn_to_bnn_flag = True  # the forward pass returns the output alone
    return made


def of_torch_uncertainty(layer: nn.Module) -> nn.Module:
    from torch_uncertainty.layers.bayesian import BayesConv2d, BayesLinear

    if isinstance(layer, nn.Conv2d):
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        return BayesConv2d(*sizes, stride=layer.stride, padding=layer.padding, bias=layer.bias is not None)
    return BayesLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)


def no_divergence(net: nn.Module) -> Tensor | float:
    return 0.0


def ours(net: nn.Module) -> Tensor:
    return torch.stack([layer.kl(0.0, 0.005) for layer in bayes_layers(net).values()]).sum()


def theirs(net: nn.Module) -> Tensor:
    return torch.stack([part.kl_loss() for part in net.modules() if hasattr(part, "kl_loss") and part is not net]).sum()


def of_samples(net: nn.Module) -> Tensor:
    """torch-uncertainty keeps log-densities of what it drew."""
    layers = [part for part in net.modules() if hasattr(part, "log_variational_posterior")]
    return torch.stack([layer.log_variational_posterior - layer.log_prior for layer in layers]).sum()


def dense() -> nn.Module:
    net = network()
    to_bayes(net, mean_std=0.01)
    return net


STEPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str | None]] = {
    "deterministic": (network, no_divergence, None),
    "dense, bayesian-torch": (lambda: replaced(network(), of_bayesian_torch), theirs, "bayesian_torch"),
    "dense, torch-uncertainty": (lambda: replaced(network(), of_torch_uncertainty), of_samples, "torch_uncertainty"),
    "dense, ours": (dense, ours, None),
    "dense, ours, one draw a batch": (dense, ours, None),
    "SSVI": (sparse_network, ours, None),
    "SSVI, one draw a batch": (sparse_network, ours, None),
}


def training(arm: str, steps: int) -> dict[str, float]:
    """Median seconds of a step, and memory."""
    build, divergence, _ = STEPS[arm]
    before = resident()
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    layers = list(bayes_layers(net).values()) if arm.startswith("SSVI") else []
    seconds = []
    for step in range(1, steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad()
        with drawing("weights" if arm.endswith("one draw a batch") else None):
            loss = F.cross_entropy(net(images), labels)
        (loss + 1e-6 * divergence(net)).backward()
        with torch.no_grad():
            if layers and step % INTERVAL == 0:
                for layer in layers:
                    assert layer.weight.grad is not None
                    found = removal_addition(layer.weight, layer.rho, layer.mask, layer.weight.grad, 0.3)
                    layer.mask.copy_(found.mask)
                    layer.weight.copy_(found.mu)
                    layer.rho.copy_(found.rho)
            else:
                optimizer.step()
            for layer in layers:
                layer.weight.mul_(layer.mask)
                layer.rho.mul_(layer.mask)
        seconds.append(time.perf_counter() - start)
    mean = sum(seconds[2:]) / steps  # updates come in some steps only: the median would leave them out
    return {"seconds": statistics.median(seconds[2:]), "mean_seconds": mean, "mib": resident() - before}


# ---- predictions -----------------------------------------------------------------------------------------------------------------------


def copies() -> Callable[[Tensor], Tensor]:
    """Ten networks with drawn weights, kept side by side."""
    net = sparse_network()
    drawn = []
    for _ in range(DRAWS):
        one = copy.deepcopy(net)
        with torch.no_grad():
            for layer in bayes_layers(one).values():
                layer.weight.add_(layer.sigma() * torch.randn_like(layer.weight))
        drawn.append(one.eval())

    def predict(images: Tensor) -> Tensor:
        with drawing("mean"):
            return torch.stack([one(images).softmax(1) for one in drawn]).mean(0)

    return predict


def posterior(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net.eval()
    return lambda images: posterior_logits(lambda: net(images), DRAWS, 0, CPU).softmax(1)


PREDICTIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ten copies": copies,
    "Bayes layers": lambda: posterior(sparse_network()),
    "stored sparse posterior": lambda: posterior(predictor(network(), sparse_state(sparse_network()))),
}


@torch.no_grad()
def prediction(arm: str, steps: int) -> dict[str, float]:
    """Median seconds of ten draws of a batch, and memory."""
    before = resident()
    predict = PREDICTIONS[arm]()
    images, seconds = torch.rand(BATCH, 3, 32, 32), []
    for _ in range(max(3, steps // 5) + 1):
        start = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "mib": resident() - before}


# ---- scoring of candidates -------------------------------------------------------------------------------------------------------------


def candidates(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Random masks, each made when it is asked for."""
    for place in range(CANDIDATES):
        generator = torch.Generator().manual_seed(place)
        yield {name: random_mask(weight.shape, DENSITY, generator, exact=True) for name, weight in weights.items()}


def one_copy(net: nn.Module, weights: dict[str, Tensor], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """As RandomSearch does it: the masked weights of each candidate are written into the same network."""
    own, begin = dict(net.named_parameters()), {name: value.detach().clone() for name, value in net.named_parameters()}

    def score(values: dict[str, Tensor]) -> Tensor:
        for name, value in own.items():
            value.copy_(values.get(name, begin[name]))
        return loss(net)

    return candidate_scores({name: begin[name] for name in weights}, candidates(weights), score)


def loop_of_copies(net: nn.Module, weights: dict[str, Tensor], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """A copy of the network for each candidate, all of which stay until the best one is known."""
    copied, scores = [], []
    for masks in candidates(weights):
        one = copy.deepcopy(net)
        for name, value in one.named_parameters():
            if name in masks:
                value.mul_(masks[name])
        copied.append(one)
        scores.append(loss(one))
    return torch.stack(scores)


SCORINGS: dict[str, Callable[[nn.Module, dict[str, Tensor], Callable[[nn.Module], Tensor]], Tensor]] = {
    "one copy": one_copy,
    "loop of copies": loop_of_copies,
}


@torch.no_grad()
def scoring(arm: str, steps: int) -> dict[str, float]:
    """Seconds of all candidates, memory, and the sum of their losses."""
    torch.manual_seed(1)
    images, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(images), labels)

    net = network()
    loss(net)
    before = resident()
    net = copy.deepcopy(net)
    weights = {name: value for name, value in net.named_parameters() if value.ndim > 1}
    start = time.perf_counter()
    scores = SCORINGS[arm](net, weights, loss)
    return {"seconds": time.perf_counter() - start, "mib": resident() - before, "sum": float(scores.double().sum())}


# ---- the command -----------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[dict[str, Any], Callable[[str, int], dict[str, float]]]] = {
    "training": (STEPS, training),
    "prediction": (PREDICTIONS, prediction),
    "scoring": (SCORINGS, scoring),
}
SECTIONS = {"ssvi": ("training", "prediction"), "scoring": ("scoring",)}


def main() -> None:
    """Run the sections, or one arm as the process that the command has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--steps", type=int, default=40, help="timed training steps; a fifth of them predictions")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.arm:
        part, arm = options.arm
        print(json.dumps(PARTS[part][1](arm, options.steps)))
        return
    rows = []
    for part in SECTIONS[options.section]:
        for arm, entry in PARTS[part][0].items():
            needs = entry[2] if isinstance(entry, tuple) else None
            if needs is not None and importlib.util.find_spec(needs) is None:
                print(f"{part:12}{arm:32}left out: {needs} isn't installed")
                continue
            words = [sys.executable, __file__, options.section, "--steps", str(options.steps), "--arm", part, arm]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{part:12}{arm:32}failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"part": part, "arm": arm, **found})
            print(f"{part:12}{arm:32}{found['seconds'] * 1e3:9.1f} ms{found['mib']:9.0f} MiB")
    sums = [row["sum"] for row in rows if "sum" in row]
    assert all(abs(value - sums[0]) < 1e-4 * abs(sums[0]) for value in sums), f"the two ways find other losses: {sums}"
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
