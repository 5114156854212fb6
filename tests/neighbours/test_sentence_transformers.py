"""sentence-transformers itself: its SparseEncoder loads what we save, and its scores are ours.

pip install "lit-methods[peers]"
"""

import json

import pytest
import torch

from lit_methods import MaskedLM, SparseRetriever
from lit_methods.datamodules.retrieval.tokens import padded

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason='sentence-transformers is not installed: pip install "lit-methods[peers]"'
)
pytestmark = pytest.mark.slow
TEXTS = ["the red fox follows the hen", "a quiet owl", "hens see foxes near the river by the old bridge"]
QUERIES = ["fox fox hen", "the owl near the bridge", "river"]
CONFIG = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizerFast

    words = sorted({word for text in [*TEXTS, *QUERIES] for word in text.split()})
    file = tmp_path_factory.mktemp("words") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast(str(file), model_max_length=64)


@pytest.mark.parametrize(
    "options", [{}, {"double_log": True}, {"idf_mode": "penalty"}, {"idf_mode": "none", "query_weight": 3.0}, {"siamese": True}], ids=str
)
def test_scores_are_equal(options, tokenizer, tmp_path):
    from lit_methods.retrieval.exports import save_sentence_transformers

    torch.manual_seed(0)
    module = SparseRetriever(
        MaskedLM(config={**CONFIG, "vocab_size": len(tokenizer), "initializer_range": 0.5}),
        special_token_ids=tokenizer.all_special_ids,
        **options,
    ).eval()
    module.set_idf(torch.rand(len(tokenizer)) + 0.1)
    save_sentence_transformers(tmp_path / "model", module, tokenizer)
    theirs = sentence_transformers.SparseEncoder(str(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        ours = [
            module.represent(*padded([tokenizer(text)["input_ids"] for text in texts], 0), queries)
            for texts, queries in ((QUERIES, True), (TEXTS, False))
        ]
    found = theirs.encode_query(QUERIES).to_dense(), theirs.encode_document(TEXTS).to_dense()
    assert ours[0].count_nonzero() > 5
    torch.testing.assert_close(found[0], ours[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], ours[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.similarity(*found), ours[0] @ ours[1].T, rtol=1e-5, atol=1e-4)
    assert json.loads((tmp_path / "model" / "config_sentence_transformers.json").read_text())["similarity_fn_name"] == "dot"


def test_flops_equal_theirs_for_one_slot():
    from sentence_transformers.sparse_encoder.losses.flops import FlopsLoss

    from lit_methods.retrieval.sparse_retriever.core import flops_penalty

    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).relu()
    torch.testing.assert_close(flops_penalty(rows), FlopsLoss(None).compute_loss_from_embeddings(rows))
