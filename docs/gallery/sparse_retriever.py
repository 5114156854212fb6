"""The picture of the sparse retriever: a query's words by their IDF, and the weights of a document that it finds, said and added."""

from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, STEP = 1152, 648, 92, 34  # pixels; STEP: of a line
BACKGROUND, TEXT, FAINT = (13, 20, 33), (214, 222, 235), (130, 142, 165)
ASKED, SAID, ADDED = (120, 210, 140), (90, 160, 245), (250, 150, 80)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparse_retriever.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    module, data = load(run)
    table = module.query_table().detach()
    with torch.no_grad():
        documents = torch.tensor(data.all_documents)
        weights = module.represent_for_index(documents, torch.ones_like(documents), False)
    relevant = {query: set(data.judgements[data.judgements[:, 0] == query][:, 1].tolist()) for query in set(data.judgements[:, 0].tolist())}
    query, best = next(found for found in candidates(data, table, weights, relevant) if found is not None)
    asked, said = data.val_set.queries[query], set(data.all_documents[best].tolist())
    effective = weights[best] * table
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(22), ImageFont.load_default(18)
    pen.text((40, 18), "query: words by their IDF, no model", font=font, fill=TEXT)
    pen.text((500, 18), "relevant document: its largest weights, times the IDF", font=font, fill=TEXT)
    pen.text((500, 50), "in the document", font=small, fill=SAID)
    pen.text((680, 50), "added by the model", font=small, fill=ADDED)
    query_words = sorted(set(asked.tolist()), key=lambda token: -float(table[token]))
    bars(pen, small, [(data.tokens[t], float(table[t]), ASKED, False) for t in query_words], 40, 180, float(table[query_words].max()))
    order = effective.argsort(descending=True)[:15].tolist()
    rows = [(data.tokens[t], float(effective[t]), SAID if t in said else ADDED, t in query_words) for t in order]
    bars(pen, small, rows, 500, 330, float(effective.max()))
    pen.text((40, HEIGHT - 60), "underlined: a word of the query", font=small, fill=FAINT)
    return canvas


def candidates(data: Any, table: torch.Tensor, weights: torch.Tensor, relevant: dict[int, set[int]]) -> Any:
    """Held-out queries whose best document is relevant and shares no topic word with them."""
    for query in sorted(relevant):
        words = torch.tensor(sorted(set(data.val_set.queries[query].tolist())))
        best = int((weights[:, words] * table[words]).sum(dim=1).argmax())
        shared = set(words[words >= 40].tolist()) & set(data.all_documents[best].tolist())
        yield (query, best) if best in relevant[query] and not shared else None


def bars(pen: Any, font: Any, rows: Any, left: int, width: int, largest: float) -> None:
    """A line for each (word, value, colour, underlined)."""
    for place, (word, value, colour, underlined) in enumerate(rows):
        y = TOP + place * STEP
        pen.text((left, y), word, font=font, fill=TEXT)
        if underlined:
            pen.line([(left, y + 25), (left + pen.textlength(word, font=font), y + 25)], fill=ASKED, width=3)
        pen.rectangle([left + 210, y + 3, left + 210 + width * value / largest, y + 21], fill=colour)
        pen.text((left + 218 + width * value / largest, y), f"{value:.1f}", font=font, fill=FAINT)


def load(run: Path) -> tuple[Any, Any]:
    """The run's retriever and its data."""
    from lit_methods import SmallTextEncoder, SparseRetriever
    from lit_methods.datamodules import SynonymSearchDataModule
    from lit_methods.runs.checkpoints import load_into

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data = SynonymSearchDataModule(**config["data"]["init_args"])
    data.setup("fit")
    arguments = config["model"]["init_args"]
    module = SparseRetriever(**arguments | {"network": SmallTextEncoder(**arguments["network"]["init_args"])})
    load_into(module, run / "checkpoints" / "last.ckpt")
    return module.eval(), data
