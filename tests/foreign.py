"""LightningModules as others write them, tiny, each with data: the rows of ``test_foreign_modules.py``.

Nothing here knows our callbacks. What a row is made of is said by :class:`Foreign`: names of submodules and keys of the batch, which a
callback's arguments are filled with. Libraries are imported where a module is built, so the list of rows needs none of them.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CLASSES = 4
SAMPLES = 4  # a batch, and an epoch


@dataclass(frozen=True)
class Foreign:
    """A module that isn't ours, and where its parts are.

    Attributes:
        build: Makes the module.
        samples: Makes its training samples.
        needs: Import names of the libraries that ``build`` needs, beside torch and Lightning.
        collate: Makes a batch of samples; None: torch's own way.
        features: Submodule that gives (B, D) features, or other rows that a loss term can use.
        predictions: Submodule that gives (B, 1) or (B, classes) from them.
        logits: Submodule that gives (B, classes, ...) logits of the inputs.
        inputs: Key or position of the network's input in the batch.
        labels: Key or position of the labels; None: the batch has none.
        student: Submodule that learns.
        teacher: Submodule of the same layers that follows it.
        towers: Submodules that embed images and texts.
        trace: Submodule that can be traced, if the module can't.
        shape: Shape of an input, where a batch doesn't show it.
        index: Key or position of the samples' places in the data set; None: the batch has none.
        views: Whether the batch is one of :func:`masks`.
        pictures: Whether ``logits`` takes images of any size.
        validates: Whether it has a ``validation_step``.
        norms: Whether it has batch norms.
        adam: Whether its optimiser is Adam or AdamW.
        sparse: Patterns of the layers to make sparse; empty: the callback's own choice.
        steps: Steps of optimisers that a training batch makes.
    """

    build: Callable[[], pl.LightningModule]
    samples: Callable[[], list[Any]]
    needs: tuple[str, ...] = ()
    collate: Callable[[list[Any]], Any] | None = None
    features: str = ""
    predictions: str = ""
    logits: str = ""
    inputs: str | int = 0
    labels: str | int | None = None
    student: str = ""
    teacher: str = ""
    towers: tuple[str, str] | None = None
    trace: str = "forward"
    shape: tuple[int, ...] | None = None
    index: str | int | None = None
    views: bool = False
    pictures: bool = False
    validates: bool = False
    norms: bool = False
    adam: bool = True
    sparse: tuple[str, ...] = ()
    steps: int = 1

    def loader(self) -> DataLoader:
        return DataLoader(Items(self.samples()), batch_size=SAMPLES, collate_fn=self.collate)


class Items(Dataset):
    """Samples by their position, and by nothing else."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def vectors() -> list[Any]:
    """((16,) float, class, index)."""
    random = generator()
    return [(torch.randn(16, generator=random), index % CLASSES, index) for index in range(SAMPLES)]


def sequences() -> list[Any]:
    """((6, 16) float, class, index)."""
    random = generator()
    return [(torch.randn(6, 16, generator=random), index % CLASSES, index) for index in range(SAMPLES)]


def images() -> list[Any]:
    """((3, 8, 8) float, class, index)."""
    random = generator()
    return [(torch.randn(3, 8, 8, generator=random), index % CLASSES, index) for index in range(SAMPLES)]


def two_views() -> list[Any]:
    """([(3, 8, 8) float, (3, 8, 8) float], class, file name): a batch of lightly's data sets."""
    random = generator()
    return [
        ([torch.randn(3, 8, 8, generator=random), torch.randn(3, 8, 8, generator=random)], index % CLASSES, f"{index}.png")
        for index in range(SAMPLES)
    ]


def tokens() -> list[Any]:
    """Of a masked or causal language model: 8 token ids below 32, and their labels."""
    random = generator()
    found = []
    for _ in range(SAMPLES):
        ids = torch.randint(0, 32, (8,), generator=random)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return found


def captioned() -> list[Any]:
    """Of CLIP: an image and 6 token ids."""
    random = generator()
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=random), "input_ids": torch.randint(0, 32, (6,), generator=random)}
        for _ in range(SAMPLES)
    ]


def scenes() -> list[Any]:
    """Of torchgeo: image and class."""
    random = generator()
    return [{"image": torch.rand(3, 64, 64, generator=random), "label": index % CLASSES, "index": index} for index in range(SAMPLES)]


def measured() -> list[Any]:
    """Of torchgeo: image and number."""
    random = generator()
    return [{"image": torch.rand(3, 64, 64, generator=random), "label": float(index % CLASSES)} for index in range(SAMPLES)]


def masks() -> list[Any]:
    """Two views of an image with their masks, as augmentations give them; the labels before correction; the place in the data set."""
    random = generator()
    found = []
    for index in range(SAMPLES):
        image, label = torch.rand(3, 32, 32, generator=random), torch.randint(0, CLASSES, (32, 32), generator=random)
        second = image.flip(-1)
        found.append(
            {"image": image, "label": label, "image_2": second, "label_2": label.flip(-1), "label_original": label, "index": index}
        )
    return found


def boxes() -> list[Any]:
    """Of torchvision's detectors: image and target."""
    random = generator()
    target = {"boxes": torch.tensor([[2.0, 3.0, 20.0, 24.0], [8.0, 8.0, 30.0, 30.0]]), "labels": torch.tensor([1, 2])}
    return [(torch.rand(3, 32, 32, generator=random), target) for _ in range(SAMPLES)]


def as_lists(samples: list[Any]) -> tuple[list[Any], ...]:
    """The batch of torchvision's detectors: no tensor is stacked."""
    return tuple(map(list, zip(*samples, strict=True)))


# ---- small modules of everyday ---------------------------------------------------------------------------------------------------------


class Everyday(pl.LightningModule):
    """A classifier as one writes it in ten lines. ``network`` ends with ``body``, which gives (B, 16), and ``head``."""

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, classes)."""
        assert self.network is not None
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ReturnsDict(Everyday):
    """Its step returns a dict, with tensors beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}


class TakesIterator(Everyday):
    """Its step takes Lightning's iterator over the data."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self(batch[0]), batch[1])


class BuildsLater(Everyday):
    """It makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(None)

    def configure_model(self) -> None:
        if self.network is None:
            self.network = perceptron()


class ByName(Everyday):
    """Its optimiser's groups are made from the names of parameters, as in minGPT: those that decay and those that don't."""

    def configure_optimizers(self) -> Any:
        decay, still = set(), set()
        for name, module in self.named_modules():
            for own, _ in module.named_parameters(recurse=False):
                full = f"{name}.{own}"
                if own == "weight" and isinstance(module, nn.Linear):
                    decay.add(full)
                elif own == "bias" or isinstance(module, nn.LayerNorm):
                    still.add(full)
        named = dict(self.named_parameters())
        assert not named.keys() ^ (decay | still), f"parameters without a group: {named.keys() ^ (decay | still)}"
        return torch.optim.AdamW(
            [
                {"params": [named[name] for name in sorted(decay)], "weight_decay": 0.1},
                {"params": [named[name] for name in sorted(still)], "weight_decay": 0.0},
            ],
            lr=1e-2,
        )


def stack(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def perceptron(wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Sequential:
    """(B, 16) -> (B, classes); ``wrap`` is applied to each linear layer."""
    return stack(
        stem=wrap(nn.Linear(16, 16)),
        act=nn.ReLU(),
        middle=wrap(nn.Linear(16, 16)),
        norm=nn.LayerNorm(16),
        body=nn.Sequential(wrap(nn.Linear(16, 16)), nn.ReLU()),
        head=wrap(nn.Linear(16, CLASSES)),
    )


def convolutional(wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Sequential:
    """(B, 3, H, W) -> (B, classes); ``wrap`` is applied to each layer with weights but norms."""
    return stack(
        stem=wrap(nn.Conv2d(3, 8, 3, padding=1)),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        middle=wrap(nn.Conv2d(8, 16, 3, padding=1)),
        norm_2=nn.BatchNorm2d(16),
        body=nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        head=wrap(nn.Linear(16, CLASSES)),
    )


def hooked_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form with a hook is deprecated, and everywhere
        return nn.utils.weight_norm(layer)


class Recurrent(nn.Module):
    """(B, L, 16) -> (B, classes), by two layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.lstm(self.stem(x))[0][:, -1]))


class Attentive(nn.Module):
    """(B, L, 16) -> (B, classes), by attention whose keys and values have other widths than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(16, 8), nn.Linear(16, 12)
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True, add_bias_kv=True)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, self.keys(x), self.values(x))
        return self.head(self.body(attended.mean(dim=1)))


def lazy() -> nn.Sequential:
    return stack(
        stem=nn.LazyLinear(16),
        act=nn.ReLU(),
        middle=nn.LazyLinear(16),
        body=nn.Sequential(nn.LazyLinear(16), nn.ReLU()),
        head=nn.LazyLinear(CLASSES),
    )


def compiled() -> Everyday:
    torch._dynamo.reset()  # torch reuses what it traced of another network of this shape, and that one's hooks
    return Everyday(torch.compile(convolutional(), backend="eager"))  # type: ignore[arg-type]


class GAN(pl.LightningModule):
    """Two networks with an optimiser each, which the step steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.critic = nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """(B, 8) -> (B, 16)."""
        made: Tensor = self.generator(noise)
        return made

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, (first, second) = batch[0], self.optimizers()  # type: ignore[misc]
        made = self(torch.randn(len(real), 8, device=self.device))
        self.toggle_optimizer(first)
        generator_loss = F.softplus(-self.critic(made)).mean()
        first.zero_grad()
        self.manual_backward(generator_loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(made.detach())).mean()
        second.zero_grad()
        self.manual_backward(critic_loss)
        second.step()
        self.untoggle_optimizer(second)
        self.log_dict({"generator_loss": generator_loss, "critic_loss": critic_loss})

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.generator.parameters(), lr=1e-3), torch.optim.Adam(self.critic.parameters(), lr=1e-3)]


# ---- lightly ---------------------------------------------------------------------------------------------------------------------------


def backbone() -> nn.Sequential:
    """(B, 3, H, W) -> (B, 16)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def simclr() -> pl.LightningModule:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = SimCLRProjectionHead(16, 16, 8)
            self.criterion = NTXentLoss()

        def forward(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first, second = batch[0]
            return self.criterion(self(first), self(second))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return SimCLR()


def byol() -> pl.LightningModule:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class BYOL(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = BYOLProjectionHead(16, 16, 8)
            self.prediction_head = BYOLPredictionHead(8, 16, 8)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x: Tensor) -> Tensor:
            return self.prediction_head(self.projection_head(self.backbone(x)))

        @torch.no_grad()
        def target(self, x: Tensor) -> Tensor:
            return self.projection_head_momentum(self.backbone_momentum(x)).detach()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            first, second = batch[0]
            return 0.5 * (self.criterion(self(first), self.target(second)) + self.criterion(self(second), self.target(first)))

        def configure_optimizers(self) -> Any:
            learners = [self.backbone, self.projection_head, self.prediction_head]
            return torch.optim.SGD([weight for module in learners for weight in module.parameters()], lr=0.06)

    return BYOL()


def moco() -> pl.LightningModule:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class MoCo(pl.LightningModule):
        """Its loss keeps a queue, which every call moves on."""

        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(backbone(), MoCoProjectionHead(16, 16, 8))
            self.teacher = copy.deepcopy(self.student)
            deactivate_requires_grad(self.teacher)
            self.criterion = NTXentLoss(memory_bank_size=(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.student, self.teacher, m=0.9)
            first, second = batch[0]
            with torch.no_grad():
                keys = self.teacher(second)
            return self.criterion(self(first), keys)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.student.parameters(), lr=0.06)

    return MoCo()


# ---- torchgeo, segmentation-models-pytorch, torchvision, transformers ------------------------------------------------------------------


def torchgeo_classification() -> pl.LightningModule:
    from torchgeo.trainers import ClassificationTask

    return ClassificationTask(model="test_resnet", weights=None, in_channels=3, num_classes=CLASSES, lr=1e-3)


def torchgeo_regression() -> pl.LightningModule:
    from torchgeo.trainers import RegressionTask

    return RegressionTask(model="test_resnet", weights=None, in_channels=3, num_outputs=1, lr=1e-3)


def segmentation() -> pl.LightningModule:
    import segmentation_models_pytorch as smp

    class Segmentation(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = smp.Unet(
                "tu-test_resnet", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), in_channels=3, classes=CLASSES
            )
            self.dice = smp.losses.DiceLoss("multiclass")

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def _loss(self, batch: Any) -> Tensor:
            logits = self(batch["image"])
            return self.dice(logits, batch["label"]) + F.cross_entropy(logits, batch["label"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self._loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self._loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Segmentation()


class Detection(pl.LightningModule):
    """A detector of torchvision: its training pass takes the targets and gives a dict of losses."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: list[Tensor]) -> Any:
        return self.network(pictures)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses: Mapping[str, Tensor] = self.network(*batch)
        return {"loss": torch.stack(list(losses.values())).sum(), **{name: loss.detach() for name, loss in losses.items()}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def detection() -> pl.LightningModule:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    body.out_channels = 16
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 4, 16), nn.ReLU())
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return Detection(
        FasterRCNN(
            body,
            min_size=32,
            max_size=32,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=2),
            box_head=head,
            box_predictor=FastRCNNPredictor(16, 3),
            rpn_post_nms_top_n_train=16,
            box_batch_size_per_image=16,
        )
    )


class LanguageModel(pl.LightningModule):
    """A model of transformers that computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert() -> pl.LightningModule:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LanguageModel(BertForMaskedLM(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)))


def gpt2() -> pl.LightningModule:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return LanguageModel(GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes)))


def clip() -> pl.LightningModule:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    config = CLIPConfig(
        text_config={"vocab_size": 32, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, **sizes},
        projection_dim=8,
    )

    class CLIP(LanguageModel):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch, return_loss=True).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch, return_loss=True).loss)

    return CLIP(CLIPModel(config))


# ---- the rows --------------------------------------------------------------------------------------------------------------------------


def everyday(build: Callable[[], pl.LightningModule], samples: Callable[[], list[Any]] = vectors, **differs: Any) -> Foreign:
    parts: dict[str, Any] = {"features": "network.body", "predictions": "network.head", "logits": "network", "labels": 1, "index": 2}
    return Foreign(build, samples, **{**parts, "validates": True, **differs})


FOREIGN: dict[str, Foreign] = {
    "lightly SimCLR": Foreign(
        simclr,
        two_views,
        ("lightly",),
        features="projection_head",
        predictions="projection_head",
        labels=1,
        norms=True,
        adam=False,
        shape=(3, 8, 8),
    ),
    "lightly BYOL": Foreign(
        byol,
        two_views,
        ("lightly",),
        features="projection_head",
        predictions="prediction_head",
        labels=1,
        student="backbone",
        teacher="backbone_momentum",
        norms=True,
        adam=False,
        shape=(3, 8, 8),
    ),
    "lightly MoCo": Foreign(
        moco,
        two_views,
        ("lightly",),
        features="student",
        predictions="student",
        labels=1,
        student="student",
        teacher="teacher",
        norms=True,
        adam=False,
        shape=(3, 8, 8),
    ),
    "torchgeo ClassificationTask": Foreign(
        torchgeo_classification,
        scenes,
        ("torchgeo.trainers",),
        features="model.global_pool",
        predictions="model.fc",
        logits="model",
        inputs="image",
        labels="label",
        index="index",
        pictures=True,
        validates=True,
        norms=True,
    ),
    "torchgeo RegressionTask": Foreign(
        torchgeo_regression,
        measured,
        ("torchgeo.trainers",),
        features="model.global_pool",
        predictions="model.fc",
        inputs="image",
        labels="label",
        validates=True,
        norms=True,
    ),
    "segmentation-models Unet": Foreign(
        segmentation,
        masks,
        ("segmentation_models_pytorch",),
        features="network.decoder",
        logits="network",
        inputs="image",
        labels="label",
        index="index",
        views=True,
        pictures=True,
        validates=True,
        norms=True,
    ),
    "torchvision Faster R-CNN": Foreign(
        detection,
        boxes,
        ("torchvision.models.detection",),
        as_lists,
        features="network.roi_heads.box_head",
        trace="network.backbone",
        shape=(3, 32, 32),
        adam=False,
        validates=True,
        norms=True,
    ),
    "transformers BERT, tied": Foreign(
        bert,
        tokens,
        ("transformers",),
        features="model.cls.predictions.transform",
        logits="model",
        inputs="input_ids",
        labels="labels",
        validates=True,
    ),
    "transformers GPT-2, tied": Foreign(
        gpt2,
        tokens,
        ("transformers",),
        features="model.transformer.ln_f",
        logits="model",
        inputs="input_ids",
        labels="labels",
        validates=True,
    ),
    "transformers CLIP": Foreign(
        clip,
        captioned,
        ("transformers",),
        features="model.visual_projection",
        inputs="pixel_values",
        towers=("model.visual_projection", "model.text_projection"),
        sparse=("*.mlp.fc?",),
        validates=True,
    ),
    "LSTM": everyday(lambda: Everyday(Recurrent()), sequences, sparse=("network.lstm",)),
    "attention with kdim and vdim": everyday(lambda: Everyday(Attentive()), sequences, sparse=("network.attention",)),
    "weight_norm by hook": everyday(lambda: Everyday(perceptron(hooked_weight_norm))),
    "weight_norm by parametrisation": everyday(lambda: Everyday(perceptron(nn.utils.parametrizations.weight_norm))),
    "spectral_norm by hook": everyday(lambda: Everyday(convolutional(nn.utils.spectral_norm)), images, norms=True, pictures=True),
    "spectral_norm by parametrisation": everyday(
        lambda: Everyday(convolutional(nn.utils.parametrizations.spectral_norm)), images, norms=True, pictures=True
    ),
    "lazy layers": everyday(lambda: Everyday(lazy())),
    "configure_model": everyday(BuildsLater),
    "groups by parameter names": everyday(lambda: ByName(perceptron())),
    "GAN, two optimisers, manual": Foreign(GAN, vectors, features="critic", steps=2),
    "dataloader_iter": everyday(lambda: TakesIterator(perceptron())),
    "returns a dict": everyday(lambda: ReturnsDict(convolutional()), images, norms=True, pictures=True),
    "compiled network": everyday(compiled, images, norms=True, pictures=True),
}
