"""``lit idf``, ``lit encode`` and ``lit search``: document frequencies, vectors for other engines, and searches that are measured."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_methods.cli.commands import Parser, parsed
from lit_methods.cli.quiet import quiet
from lit_methods.errors import CommandError

FORMATS = ("anserini", "opensearch", "sentence-transformers")

# ---- lit idf -----------------------------------------------------------------------------------------------------------------------------

_vocabulary: Any = None  # of a worker process
_longest = 512


def _start_worker(tokenizer: str, max_length: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    from lit_methods.datamodules.retrieval.tokens import WordPieces

    global _vocabulary, _longest
    _vocabulary, _longest = WordPieces(tokenizer), max_length


def _count(lines: list[tuple[int, bytes]], file: str, on_broken: str) -> tuple[int, Any, list[str]]:
    """Documents, counts (V,) of some lines of a corpus, and what was wrong with those that are left out."""
    from lit_methods.datamodules.errors import BrokenRecordError
    from lit_methods.retrieval.idf import count_documents

    texts: list[str] = []
    wrong: list[str] = []
    for number, line in lines:
        try:
            record = json.loads(line)
            text = f"{record.get('title') or ''} {record['text'] or ''}".strip()
            if not text:
                raise ValueError("the document is empty")
            texts.append(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            problem = BrokenRecordError(file, f"line {number}", f"{error!r}: expected an object with a text, or set --on-broken skip")
            if on_broken == "raise":
                raise problem from error
            wrong.append(str(problem))
    return len(texts), count_documents(_vocabulary.encode(texts, _longest), len(_vocabulary.tokens)), wrong


def _chunks(file: Path, size: int) -> Iterator[tuple[list[tuple[int, bytes]], int]]:
    """Numbered lines that aren't blank, and how many bytes they are, with those between them."""
    some: list[tuple[int, bytes]] = []
    taken = 0
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            taken += len(line)
            if line.strip():
                some.append((number, line))
            if len(some) == size:
                yield some, taken
                some, taken = [], 0
    if some:
        yield some, taken


def count_corpus(
    file: Path, tokenizer: str, workers: int, max_length: int, on_broken: str = "raise", advance: Callable[[int], None] | None = None
) -> tuple[int, Any, list[str]]:
    """Count in how many documents of a ``corpus.jsonl`` each token occurs, by several processes.

    Args:
        file: A JSON object with ``text`` and perhaps ``title`` in each line.
        tokenizer: Folder, hub name or ``package:<name>`` of a tokenizer of transformers.
        workers: Processes; 1: this one.
        max_length: Tokens of a document that are looked at.
        on_broken: ``raise`` or ``skip``.
        advance: Is told how many bytes are done.

    Returns:
        Documents N, counts (V,), and what was wrong with the lines that were left out.
    """
    total, counts = 0, 0
    wrong: list[str] = []
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer, max_length)) if workers > 1 else None
    try:
        if pool is None:
            _start_worker(tokenizer, max_length)
        pending: list[tuple[Any, int]] = []
        for lines, taken in _chunks(file, 2000):
            pending.append((pool.submit(_count, lines, str(file), on_broken) if pool else _count(lines, str(file), on_broken), taken))
            while pending and (pool is None or len(pending) > 2 * workers):
                total, counts = _add(pending, total, counts, wrong, advance)
        while pending:
            total, counts = _add(pending, total, counts, wrong, advance)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return total, counts, wrong


def _add(pending: list[Any], total: int, counts: Any, wrong: list[str], advance: Callable[[int], None] | None) -> tuple[int, Any]:
    found, taken = pending.pop(0)
    number, some, problems = found.result() if hasattr(found, "result") else found
    wrong += problems
    if advance is not None:
        advance(taken)
    return total + number, counts + some


def idf(argv: list[str]) -> int:
    """``lit idf <corpus.jsonl> <out.json> --tokenizer NAME``: make a table of inverse document frequencies."""
    parser = Parser(
        prog="lit idf",
        description="Write the inverse document frequencies of a tokenizer's tokens in a corpus: ln(1 + (N - n + 0.5) / (n + 0.5)).",
    )
    parser.add_argument("corpus", help="a file with a JSON object with text (and title) in each line, or a folder with corpus.jsonl")
    parser.add_argument("out", help="the JSON file to write: token -> value")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of a tokenizer of transformers, or package:<name>")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: as many as cores)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a document that are looked at (default 512)")
    parser.add_argument("--on-broken", choices=("raise", "skip"), default="raise", help="stop at the first broken line, or skip and count")
    parser.add_argument("--force", action="store_true", help="overwrite out")
    options = parsed(parser, argv)
    if options is None:
        return 0
    corpus, out = Path(options.corpus).expanduser(), Path(options.out).expanduser()
    corpus = corpus / "corpus.jsonl" if corpus.is_dir() else corpus
    if not corpus.is_file():
        raise CommandError(f"{corpus} is no file: give a corpus.jsonl, or a folder with one")
    if out.exists() and not options.force:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    if options.workers < 1 or options.max_length < 1:
        raise CommandError("--workers and --max-length must be 1 or more")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lit_methods.datamodules.retrieval.tokens import WordPieces
    from lit_methods.retrieval.idf import idf_of_counts, write_idf

    try:
        vocabulary = WordPieces(options.tokenizer)
        tokens = vocabulary.tokens
        with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn()) as bar:
            task = bar.add_task(corpus.name, total=corpus.stat().st_size)
            done = lambda taken: bar.update(task, advance=taken)  # noqa: E731
            number, counts, wrong = count_corpus(corpus, options.tokenizer, options.workers, options.max_length, options.on_broken, done)
    except (ValueError, ImportError) as error:  # BrokenRecordError is a ValueError
        raise CommandError(str(error), exit_code=1) from error
    if not number:
        raise CommandError(f"{corpus} has no document that can be read", exit_code=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    counts[vocabulary.special_ids] = 0  # whose value is 1, as in the released table
    write_idf(out, tokens, idf_of_counts(counts, number))
    left = f"; {len(wrong)} lines are left out, the first: {wrong[0]}" if wrong else ""
    print(f"{out}: {int((counts > 0).sum()):,} of {len(tokens):,} tokens occur in {number:,} documents{left}")
    return 0


# ---- lit encode and lit search -----------------------------------------------------------------------------------------------------------


@dataclass
class System:
    """A trained retriever with a whole collection that it has encoded."""

    name: str
    module: Any
    data: Any
    queries: Any
    documents: Any
    ranking: Any


def encode_all(what: str, overrides: Sequence[str] = (), texts: bool = True) -> System:
    """Build the retriever of ``config`` or ``config=checkpoint`` and let it encode the test's queries and documents.

    Args:
        what: The config, with its checkpoint or without one.
        overrides: Further words of the command.
        texts: Encode them; False: the retriever is only set up for its data, and there are no vectors.
    """
    from lightning.pytorch import Trainer

    from lit_methods.cli.lightning_cli import planned
    from lit_methods.retrieval.base import Retriever

    config, _, checkpoint = what.partition("=")
    with quiet("lightning.pytorch"):
        cli, _ = planned(["predict", "--config", config, *overrides])
        parts = cli.config["predict"]
        if parts.get("data") is None:
            raise CommandError(f"{config} has no data section: add one by --data")
        data, module = cli.built("data", parts.data), cli.built("model", parts.model)
        if not isinstance(module, Retriever):
            raise CommandError(f"{config} has a {type(module).__name__}: give a config of a SparseRetriever or a DenseRetriever")
        kept: dict[str, Any] = {}
        module.write_run = lambda *found: kept.update(found=found)  # type: ignore[method-assign]  # no run folder here
        trainer = Trainer(
            accelerator=parts.trainer.accelerator, devices=1, precision=parts.trainer.precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            limit_predict_batches=None if texts else 0,
        )  # fmt: skip
        trainer.predict(module, datamodule=data, ckpt_path=checkpoint or None, return_predictions=False)
    if not texts:
        kept["found"] = (None, None, None)
    if "found" not in kept:
        raise CommandError(f"{config}: its data have no query or no document to encode", exit_code=1)
    return System(Path(config).parent.parent.name if Path(config).stem == "config" else Path(config).stem, module, data, *kept["found"])


def encode(argv: list[str]) -> int:
    """``lit encode <config>=<checkpoint> <out> --format anserini``: documents or model for other software."""
    parser = Parser(prog="lit encode", description="Write a sparse retriever's documents, or the retriever itself, for other software.")
    parser.add_argument("what", metavar="config=checkpoint", help="such as runs/x/<time>/config.yaml=runs/x/<time>/checkpoints/last.ckpt")
    parser.add_argument("out", help="a new folder; with --format opensearch a new file")
    parser.add_argument("--format", default="anserini", help=f"one of {', '.join(FORMATS)}")
    options = parsed(parser, argv)
    if options is None:
        return 0
    if options.format not in FORMATS:
        raise CommandError(f"--format is {options.format!r}: give one of {', '.join(FORMATS)}")
    out = Path(options.out).expanduser()
    if out.exists():
        raise CommandError(f"{out} exists: choose another name")
    from lit_methods.retrieval.exports import save_sentence_transformers, write_anserini, write_opensearch

    of_model = options.format == "sentence-transformers"
    found = encode_all(options.what, texts=not of_model)
    if not found.module.sparse:
        raise CommandError(f"{options.what} has a {type(found.module).__name__}: only the vectors of a SparseRetriever have such a form")
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "anserini":
        write_anserini(out, found.module, found.queries, found.documents, found.data)
    elif options.format == "opensearch":
        write_opensearch(out, found.documents, found.data)
    else:
        tokenizer = getattr(found.data.vocabulary, "inner", None)
        if tokenizer is None:
            raise CommandError("the data have no tokenizer of transformers: set data.init_args.tokenizer")
        try:
            save_sentence_transformers(out, found.module, tokenizer)
        except ValueError as error:
            raise CommandError(str(error)) from error
    print(f"{out}: {'the model' if of_model else f'{len(found.documents.numbers):,} documents'}, {options.format}")
    return 0


def search(argv: list[str]) -> int:
    """``lit search <config>=<checkpoint>... <out>``: index, query, and measure several retrievers and BM25."""
    parser = Parser(
        prog="lit search",
        description="Encode a collection by each retriever, index it in qdrant, query it, and print nDCG@10, MRR and Recall@100 by "
        "trec_eval, FLOPS, index size and query latency, beside BM25.",
    )
    parser.add_argument("what", nargs="+", metavar="config=checkpoint", help="of each retriever; without =checkpoint it is as it starts")
    parser.add_argument("--out", required=True, help="a new folder: indexes, run files, search.json")
    parser.add_argument("--url", help="a qdrant server, such as http://localhost:6333; default: qdrant's local mode, in the folder")
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")
    parser.add_argument("--top-k", type=int, default=100, help="documents of a query (default 100)")
    options = parsed(parser, argv)
    if options is None:
        return 0
    out = Path(options.out).expanduser()
    if out.exists():
        raise CommandError(f"{out} exists: choose another name")
    from lit_methods.retrieval.measured_search import bm25_row, retriever_row, table_of

    try:
        systems = [encode_all(what) for what in options.what]
        out.mkdir(parents=True)
        first = systems[0]
        rows = [] if options.no_bm25 else [bm25_row(first.data, first.queries.numbers.tolist(), out, options.top_k)]
        for place, one in enumerate(systems, start=1):
            name = one.name if [other.name for other in systems].count(one.name) == 1 else f"{one.name}_{place}"
            rows.append(retriever_row(name, one.module, one.data, one.queries, one.documents, out, options.url, options.top_k))
    except (ImportError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    from lit_methods.files import write_json

    write_json(out / "search.json", rows)
    print(table_of(rows))
    return 0


__all__ = ["System", "count_corpus", "encode", "encode_all", "idf", "search"]
