"""Which sparsity callback works on which module, and beside what. The tables of docs/sparse_training.md come from here.

``python tests/test_sparsity_matrix.py`` writes them. Every cell is a test: "yes" trains, another cell quotes the refusal.
"""

import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from lightning.pytorch.demos import Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import Classifier, Images, TwoOptimisers, cloned_state, compiled_classifier, tiny_trainer
from lit_methods.callbacks import (
    CAST,
    DSL,
    DSnoT,
    DynamicSparsity,
    EMATeacher,
    IterativeSoftShrinkage,
    LossTerm,
    MaskedBNSparsity,
    NMSparsity,
    RandomPruning,
    ScorePruning,
    SparseGPT,
    SparseIFT,
    SparsityReport,
)
from lit_methods.callbacks.sparsity.sparse_ift.surgery import iso_flop_transform

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sparse_training.md"

# ---- modules ---------------------------------------------------------------------------------------------------------------------------


class Words(torch.utils.data.Dataset):
    """``size`` pairs of 6 token ids below 32 and a label in 0..3."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 32, (size, 6), generator=generator)
        self.labels = torch.randint(0, 4, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]


class Logits(nn.Module):
    """The ``logits`` of a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, 4)."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


class NextWord(nn.Module):
    """Lightning's demo Transformer: the word after each word."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer(vocab_size=32, ninp=16, nhead=2, nhid=16, nlayers=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, 32): of the last place."""
        out: Tensor = self.transformer(tokens, tokens)
        return out.view(len(tokens), -1, 32)[:, -1]


def resnet() -> Classifier:
    """At 64 x 64 pixels: on smaller maps most entries of its last kernels meet padding alone, and have no gradient."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    return Classifier(nn.Sequential(nn.Upsample(scale_factor=8), resnet18(num_classes=4)))


def timm_vit() -> Classifier:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(7)
    return Classifier(VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4))


def bert() -> Classifier:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return Classifier(Logits(transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, num_labels=4, **sizes))))


def demo_transformer() -> Classifier:
    torch.manual_seed(7)
    return Classifier(NextWord())


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "torchvision ResNet-18": resnet,
    "timm ViT": timm_vit,
    "Hugging Face BERT": bert,
    "Lightning's Transformer": demo_transformer,
    "two optimisers, manual": TwoOptimisers,
    "compiled": compiled_classifier,
}


def loader(module: str) -> DataLoader:
    words = module in ("Hugging Face BERT", "Lightning's Transformer")
    return DataLoader(Words() if words else Images(12 if module == "torchvision ResNet-18" else 24), batch_size=6)


# ---- callbacks -------------------------------------------------------------------------------------------------------------------------

CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "RandomPruning": lambda: RandomPruning(0.4, exact=True),
    "RandomPruning, SNIP": lambda: RandomPruning(0.4, method="snip", positions="score", logits="network", samples_per_class=1),
    "DynamicSparsity, static": lambda: DynamicSparsity(0.4, "static"),
    "DynamicSparsity, SET": lambda: DynamicSparsity(0.4, "set", interval=1, end_fraction=1.0),
    "DynamicSparsity, RigL": lambda: DynamicSparsity(0.4, "rigl", interval=1, end_fraction=1.0),
    "DSL": lambda: DSL(0.4, interval=1),
    "NMSparsity": lambda: NMSparsity(1, 2),
    "NMSparsity, SdGf": lambda: NMSparsity(1, 2, recipe="sdgf_stepwise", stages=1),
    "ScorePruning": lambda: ScorePruning(0.4, pretrain_steps=1, prune_steps=1),
    "CAST": lambda: CAST(1, 2, distill="network", probe_interval=0),
    "IterativeSoftShrinkage": lambda: IterativeSoftShrinkage(0.5, prune_iters=1),
    "MaskedBNSparsity": lambda: MaskedBNSparsity("global_sparsity", forward="network"),
    "DSnoT": lambda: DSnoT(0.5, samples=12, at_step=1),
    "SparseGPT": lambda: SparseGPT(0.5, samples=12),
    "SparseIFT, wide": lambda: SparseIFT(0.5, "wide", interval=1, end_fraction=1.0, flops_tolerance=None),
    "SparseIFT, factorized": lambda: SparseIFT(0.5, "factorized", interval=1, end_fraction=1.0, flops_tolerance=None),
}
KINDS: dict[str, str] = {
    **dict.fromkeys(CALLBACKS, "weights are masked"),
    **dict.fromkeys(("NMSparsity", "NMSparsity, SdGf", "ScorePruning", "CAST"), "the forward pass sees other weights"),
    "MaskedBNSparsity": "channels are cut",
    **dict.fromkeys(("SparseIFT, wide", "SparseIFT, factorized"), "layers are replaced"),
}
ONE_OF_EACH_KIND = tuple({kind: name for name, kind in reversed(KINDS.items())}.values())
WITH_ADAM = ("CAST",)  # it replaces Adam
DENSE = ("MaskedBNSparsity",)  # until channels are cut, which is another stage
TRANSFORMED = {"SparseIFT, wide": "wide", "SparseIFT, factorized": "factorized"}
TRANSFORMERS = ("timm ViT", "Hugging Face BERT", "Lightning's Transformer")
REFUSALS: dict[tuple[str, str], str] = {
    **{("MaskedBNSparsity", module): "has no batch norm with scale and shift" for module in TRANSFORMERS},
    **{("SparseIFT, wide", module): "holds weights of its own, whose widths aren't known" for module in TRANSFORMERS},
    ("SparseIFT, factorized", "Lightning's Transformer"): "MultiheadAttention is none of Linear, Conv1d, Conv2d, Conv3d",
    ("CAST", "two optimisers, manual"): "set distill_weight to 0, and add kl_to_teacher to the loss there",
}
"""(callback, module) -> part of the refusal."""


def adam(module: pl.LightningModule) -> None:
    """Let the module train with Adam, one optimiser where it has one."""
    whole = list(module.parameters())
    parts = [whole[:4], whole[4:]] if isinstance(module, TwoOptimisers) else [whole]
    optimizers = [torch.optim.Adam(part, lr=0.01) for part in parts]
    module.configure_optimizers = lambda: optimizers if len(optimizers) > 1 else optimizers[0]  # type: ignore[method-assign]


def prepared(callback: str, module: pl.LightningModule) -> pl.LightningModule:
    if callback in WITH_ADAM:
        adam(module)
    return module


def masks_of(callbacks: list[Any]) -> dict[str, Tensor]:
    return {name: mask for callback in callbacks if hasattr(callback, "sparsity_masks") for name, mask in callback.sparsity_masks().items()}


def assert_sparse(module: pl.LightningModule, masks: dict[str, Tensor]) -> None:
    """Removed weights are 0, the others aren't, and the share is what was asked for."""
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    assert masks
    for name, mask in masks.items():
        assert not state[name][~mask].any(), name
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert 0.3 < kept / total < 0.6, "of all cases"


def thorough(pairs: Iterable[tuple[str, str]], is_quick: Callable[[str, str], bool]) -> list[Any]:
    """Parameters of a test of pairs: those that aren't quick are left to `make test-all`."""
    return [pytest.param(*pair, marks=[] if is_quick(*pair) else pytest.mark.thorough) for pair in pairs]


@pytest.mark.parametrize(
    ("module", "callback"),
    # a ResNet-18 takes seconds: one of each kind, and what is about its channels
    thorough(product(MODULES, CALLBACKS), lambda module, callback: module != "torchvision ResNet-18" or callback in ONE_OF_EACH_KIND),
)
def test_callback_on_module(callback: str, module: str) -> None:
    own, plain, added = prepared(callback, MODULES[module]()), MODULES[module](), CALLBACKS[callback]()
    trainer = tiny_trainer(max_epochs=1, callbacks=[added, SparsityReport()], limit_val_batches=0)
    if (callback, module) in REFUSALS:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(REFUSALS[callback, module])):
            trainer.fit(own, loader(module))
        return
    before = cloned_state(own)
    trainer.fit(own, loader(module))
    if callback not in DENSE:
        assert_sparse(own, masks_of([added]))
    if callback in TRANSFORMED:
        iso_flop_transform(plain, TRANSFORMED[callback], 0.5)  # type: ignore[arg-type]
    plain.load_state_dict(own.state_dict())
    changed = [name for name, value in cloned_state(plain).items() if name in before and not torch.equal(value, before[name])]
    assert changed, "it learned"


# ---- beside each other -----------------------------------------------------------------------------------------------------------------


class Shrink(LossTerm):
    """A term on the outputs of the head."""

    def term(self, inputs: dict[str, Any]) -> Tensor:
        """Mean square."""
        return inputs["features"]["network.7"].square().mean()


PARTNERS: dict[str, Callable[[], tuple[list[pl.Callback], dict[str, Any]]]] = {
    "SparsityReport": lambda: ([SparsityReport()], {}),
    "EMATeacher": lambda: ([EMATeacher(decay=0.9)], {}),
    "EMAWeightAveraging": lambda: ([EMAWeightAveraging(decay=0.9)], {}),
    "LossTerm": lambda: ([Shrink(["network.7"])], {}),
    "clipping": lambda: ([], {"gradient_clip_val": 0.1}),
    "accumulation": lambda: ([], {"accumulate_grad_batches": 2}),
    "bf16": lambda: ([], {"precision": "bf16-mixed"}),
    "ModelPruning": lambda: ([ModelPruning("l1_unstructured", amount=0.3)], {}),
}
MASKED = "it renames the weights while fit runs"
REPARAMETRISED = "both replace the weights while fit runs"
LATENT = ("NMSparsity", "NMSparsity, SdGf", "ScorePruning", "CAST")  # the forward pass sees other weights than the optimiser
LOST = "its checkpoints hold the weights of the forward pass only, so a resumed average would lose the latent"
PAIR_REFUSALS: dict[tuple[str, str], str] = {
    **{(callback, "ModelPruning"): REPARAMETRISED if callback in LATENT else MASKED for callback in CALLBACKS},
    **{(callback, "EMAWeightAveraging"): LOST for callback in LATENT},
}
"""(callback, partner) -> why it is refused."""


def average_of(callbacks: list[Any]) -> dict[str, Tensor]:
    """What an averaged copy computes with."""
    for callback in callbacks:
        if isinstance(callback, EMATeacher):
            return callback.teacher.module.state_dict()
    return {}


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("partner", PARTNERS)
def test_callback_beside(callback: str, partner: str) -> None:
    added = CALLBACKS[callback]()
    others, settings = PARTNERS[partner]()
    module = prepared(callback, Classifier())
    trainer = tiny_trainer(max_epochs=2, callbacks=[added, *others], limit_val_batches=0, **settings)
    if (callback, partner) in PAIR_REFUSALS:
        with pytest.raises(ValueError, match=re.escape(PAIR_REFUSALS[callback, partner])):
            trainer.fit(module, loader(""))
        assert trainer.global_step == 0, "refused before training"
        return
    trainer.fit(module, loader(""))
    masks = masks_of([added])
    if callback not in DENSE:
        assert_sparse(module, masks)
    averaged = average_of(others)
    for name, mask in masks.items():
        if name in averaged and callback in LATENT:  # it masks its own average, which may leave others
            assert (averaged[name] != 0).sum() <= mask.sum(), "the teacher is as sparse"
        elif name in averaged:
            assert not averaged[name][~mask.to(averaged[name].device)].any(), "the teacher is as sparse"


@pytest.mark.parametrize(
    ("second", "first"),
    # the square of the callbacks is left to `make test-all`
    thorough(
        product(*[[name for name in CALLBACKS if name not in DENSE]] * 2),
        lambda second, first: first == second or {first, second} & set(ONE_OF_EACH_KIND) != set(),
    ),
)
def test_two_sparsity_callbacks(first: str, second: str) -> None:
    """On the same weights they refuse, whatever their order; two of a class already when the Trainer is made."""

    def train() -> None:
        module = Classifier()
        if {first, second} & set(WITH_ADAM):
            adam(module)
        tiny_trainer(max_epochs=1, callbacks=[CALLBACKS[first](), CALLBACKS[second]()]).fit(module, loader(""))

    with pytest.raises(
        (ValueError, RuntimeError),
        match=r"both mask|more than one stateful callback|belongs to another|no linear|must come after the transformation",
    ):
        train()


# ---- the page --------------------------------------------------------------------------------------------------------------------------


def table(columns: dict[str, Any], refusals: dict[tuple[str, str], str]) -> str:
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    notes: list[str] = []
    for callback in CALLBACKS:
        cells = []
        for column in columns:
            why = refusals.get((callback, column))
            if why and why not in notes:
                notes.append(why)
            cells.append(f"refused ({notes.index(why) + 1})" if why else "yes")
        lines.append(f"| {callback} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. “{note}”" for number, note in enumerate(notes, start=1))]).strip()


def filled(page: str) -> str:
    """The page with both tables as they are now."""
    for name, found in (("modules", table(MODULES, REFUSALS)), ("partners", table(PARTNERS, PAIR_REFUSALS))):
        marks = f"<!-- {name}: written by tests/test_sparsity_matrix.py -->", f"<!-- end of {name} -->"
        assert all(page.count(mark) == 1 for mark in marks), f"the page has lost the comments around the table of {name}"
        page = page[: page.index(marks[0]) + len(marks[0])] + f"\n\n{found}\n\n" + page[page.index(marks[1]) :]
    return page


def test_the_page_has_these_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python tests/test_sparsity_matrix.py"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.name}: the tables are up to date")
