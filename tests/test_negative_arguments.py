"""No module or network takes a negative number where there can be none: a size, a rate, a decay, a count."""

import contextlib
import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from lit_methods import (
    CascadedHead,
    CompactVideoDetector,
    ContentFusionUNet,
    ControlledUNet,
    CrossFrameRetrieval,
    DenseRetriever,
    DigitLCM,
    DINOv2,
    EmbeddedWords,
    GaussianMixtureFlow,
    GenotypeNetwork,
    ObjectAwareViT,
    PatchStatistics,
    PixelMLPDecoder,
    PixelMLPEncoder,
    ProxySoftmax,
    ResidualCompositor,
    RingTeacher,
    ScatteredInpainting,
    SearchNetwork,
    SmallBackbone,
    SmallDetectionBackbone,
    SmallTextEncoder,
    TinyTowers,
    VectorTrunk,
    ViTEncoder,
)
from lit_methods.catalog import public_names
from lit_methods.inverse_problems.flair.core import FlairSettings

# what may be negative: labels, seeds, positions of a distribution or a line, values that fill a place
MAY_BE = {
    "ignore_index", "seed", "p_mean", "time_mean", "null_condition", "c_slope", "c_intercept", "fill", "pixel_mean", "shift", "reg_shift",
    "degrees",
}  # fmt: skip
OTHERS = {  # files, other libraries
    *(
        "CLIPImageFeatures",
        "CLIPTowers",
        "CompressedSensing",
        "DiffusersAutoencoder",
        "DiffusersBackbone",
        "DiffusersLCM",
        "DiffusersNetwork",
        "DiffusersUNet",
        "DiffusersVideo",
        "LPIPSDistance",
        "ScriptedFeatures",
        "SpatialEncoder",
        "VisualEncoder",
        "DINOv2",
        "MaskFileInpainting",
        "SD3Flow",
        "TimmNetwork",
        "TextTeacher",
        "VGGMaps",
    ),
}


class Volume(nn.Identity):
    out_channels = 4


def _tiny_vit() -> dict[str, Any]:
    return {"name": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "width": 8, "depth": 2, "heads": 2}


def parts(name: str) -> dict[str, Any]:
    """Arguments that must be given: of one class, or by their names."""
    special: dict[str, dict[str, Any]] = {
        "CausalLM": {"config": {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}},
        "MaskedDiffusionLM": {
            "config": {"model_type": "bert", "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        },
        "LongContextLM": {"config": {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}},
        "CoTAP": {"encoder": ObjectAwareViT(**_tiny_vit())},
        "ObjectAwareViT": _tiny_vit(),
        "CoPrompt": {"towers": TinyTowers(pretrain_steps=0), "depth": 1},
        "ComposedRetrieval": {
            "image_encoder": VectorTrunk(),
            "text_encoder": EmbeddedWords(6),
            "compositor": ResidualCompositor(),
        },
        "DualLoRAVSRModule": {"backbone": SmallBackbone(), "retrieval": CrossFrameRetrieval(12, 1, 4)},
        "OneStepPretraining": {"backbone": SmallBackbone()},
        **{
            name: {"backbone": SmallDetectionBackbone(8), "head": CascadedHead(2, 8, 1, 2, 8, 2)}
            for name in ("ConsistencyDet", "DiffusionDet")
        },
        "TimmPyramid": {"name": "resnet18", "pretrained": False},
        "DASSSearch": {"network": SearchNetwork(2, 3, 1, ["skip_connect"])},
        "DenseRetriever": {"network": SmallTextEncoder(4, width=4)},
        "BicubicDownsampling": {"size": [8, 8]},
        "BoxInpainting": {"size": [8, 8]},
        "EPGFinetune": {"encoder": PixelMLPEncoder(width=8), "decoder": PixelMLPDecoder(width=8, encoder_width=8), "num_classes": 3},
        "EPGPretrain": {"encoder": PixelMLPEncoder(width=8)},
        "FLAIR": {"prior": GaussianMixtureFlow(), "operator": ScatteredInpainting([4, 4], 6)},
        "FlowInverseSolver": {
            "prior": GaussianMixtureFlow(),
            "operator": ScatteredInpainting([4, 4], 6),
            "settings": FlairSettings(),
        },
        "FlowMatchingModule": {"prior": GaussianMixtureFlow()},
        "GenotypeClassifier": {"network": GenotypeNetwork(channels=2, cells=3)},
        "IJEPA": {"encoder": ViTEncoder(16, 2, width=8, depth=1, heads=2)},
        "MaskedLM": {"config": {"model_type": "bert", "vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}},
        "TransformerText": {
            "config": {"model_type": "bert", "vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        },
        "InterLCM": {"lcm": DigitLCM(8, 4)},
        "SemiSupervisedVideoDetector": {"network": CompactVideoDetector(3)},
        "PseudoLabelVideoDetector": {"network": CompactVideoDetector(3)},
        "MixMatchVideoDetector": {"network": CompactVideoDetector(3)},
        "MLP": {"widths": [4, 3]},
        "PhasicContentDiffusion": {"network": ContentFusionUNet(1, 8, (1, 1))},
        "PointSegmentor": {"backbone_3d": Volume()},
        "RCM": {"teacher": RingTeacher(), "student": nn.Linear(2, 2), "condition": "label"},
        "RandomProjection": {"shape": [1, 2, 2]},
        "RetrieverTeacher": {"retriever": DenseRetriever(SmallTextEncoder(4, width=4))},
        "ResNetTrunk": {"pretrained": False, "name": "resnet18"},
        "ScatteredInpainting": {"size": [8, 8]},
        "SimMatchV2": {"backbone": nn.Identity(), "num_labelled": 200, "bank_size": 8},
        "FeatureDistance": {"network": nn.Identity()},
        "SmallLCM": {"network": nn.Identity()},
        "SmallSpatialEncoder": {"network": ControlledUNet(1, 8, (1,))},
        "SparseAutoencoder": {"settings": {"k": 2}},
        "SparseRetriever": {"network": SmallTextEncoder(4, width=4)},
        "SparseJEPA": {"encoder": ViTEncoder(16, 2, width=8, depth=1, heads=2)},
        "SuperFlow": {"backbone_3d": Volume(), "backbone_2d": PatchStatistics()},
        "MetricLearning": {"network": nn.Identity(), "loss": ProxySoftmax(num_classes=3, embedding_dim=2)},
    }
    return special.get(name, {})


def modules() -> Iterator[Any]:
    for name, package in sorted(public_names().items()):
        kind = getattr(importlib.import_module(package), name)
        own = kind.__module__.startswith("lit_methods.") and not kind.__module__.startswith(
            ("lit_methods.callbacks", "lit_methods.datamodules")
        )
        if own and inspect.isclass(kind) and issubclass(kind, nn.Module) and name not in OTHERS:
            dear = name in ("WanTransformer", "MinkUNet")  # seconds to build
            yield pytest.param(kind, id=name, marks=[pytest.mark.thorough] if dear else [])


def numbers(kind: type) -> tuple[dict[str, Any], list[str]]:
    """Arguments that must be given, and the names of those that take a number, or a list or a pair of numbers."""
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    must, numeric = {}, []
    for name, parameter in inspect.signature(kind).parameters.items():
        types = {hints.get(name), *typing.get_args(hints.get(name))}
        number = bool(types & {int, float}) and bool not in types
        if number:
            numeric.append(name)
        if parameter.default is parameter.empty and parameter.kind < 4 and parameter.kind != parameter.VAR_POSITIONAL:
            must[name] = 2 if number else nn.Linear(4, 4)
    must.pop("kwargs", None)
    return must | parts(kind.__name__), [name for name in numeric if name not in MAY_BE]


@pytest.mark.parametrize("kind", list(modules()))
def test_a_negative_number_is_refused(kind: type) -> None:
    must, numeric = numbers(kind)
    kind(**must)  # what is refused below is the number
    accepted = []
    for name in numeric:
        given = must.get(name, inspect.signature(kind).parameters[name].default)
        wrong: Any = tuple(-7 for _ in given) or (-7,) if isinstance(given, (tuple, list)) else -7
        with contextlib.suppress(Exception):
            kind(**must | {name: wrong})
            accepted.append(name)
    assert accepted == []


def test_a_teacher_of_patches_is_as_strict() -> None:
    with pytest.raises(ValueError, match="image_size"):
        DINOv2("small", weights="random", image_size=(-7, 14))
