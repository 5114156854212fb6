"""Parts of a composed retriever: trunks that give maps, text encoders that give vectors, compositors of both.

The content and style compositor is CoSMo's (CVPR 2021), read in postBG/CosMo.pytorch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least
from lit_methods.hub import fetch, leave_out, place_of

# ---- images ----------------------------------------------------------------------------------------------------------------------------


class ImageTrunk(nn.Module):
    """What a composed retriever needs of an image network.

    Attributes:
        channels: C of the maps.
    """

    channels: int

    def forward(self, image: Tensor) -> Tensor:
        """(B, c, H, W) images -> (B, C, h, w) map."""
        raise NotImplementedError


class VectorTrunk(ImageTrunk):
    """A perceptron of the pixels, for small images; its map is 1 x 1.

    Args:
        pixels: Numbers of an image, c * H * W.
        hidden: Width of the hidden layer.
        channels: Width of the output.
    """

    def __init__(self, pixels: int = 64, hidden: int = 128, channels: int = 64) -> None:
        super().__init__()
        at_least(1, pixels=pixels, hidden=hidden, channels=channels)
        self.channels = channels
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, image: Tensor) -> Tensor:
        """(B, c, H, W) images -> (B, C, 1, 1)."""
        return self.layers(image)[:, :, None, None]  # type: ignore[no-any-return]


class SmallMapTrunk(ImageTrunk):
    """Three convolutions, of which two halve the image, and a batch norm, for small images.

    Args:
        in_channels: c of the images.
        channels: C of the maps.
    """

    def __init__(self, in_channels: int = 1, channels: int = 32) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, channels=channels)
        self.channels = channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, c, H, W) images -> (B, C, H / 4, W / 4)."""
        return self.layers(image)  # type: ignore[no-any-return]


class ResNetTrunk(ImageTrunk):
    """A residual network of torchvision or timm through its last stage.

    Args:
        name: Model, such as ``resnet50``.
        pretrained: Start from the library's ImageNet weights, which are downloaded once.
        stride: False: the last stage halves the map; True: it doesn't, so that 224 pixels become 14 x 14.
        library: ``torchvision`` or ``timm``.

    Raises:
        ValueError: There is no such model, or it has no stages ``layer1`` to ``layer4``.
    """

    def __init__(self, name: str = "resnet50", pretrained: bool = True, stride: bool = False, library: str = "torchvision") -> None:
        super().__init__()
        given = f"name={name!r}"
        pretrained = pretrained and not leave_out(given, name)
        if library == "torchvision":
            import torchvision

            known = torchvision.models.list_models()
            if name not in known:
                raise ValueError(f"{given} is no model of torchvision: give one such as resnet18, resnet50")
            model: Any = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        elif library == "timm":
            import timm

            if not timm.is_model(name):
                raise ValueError(f"{given} is no model of timm: give one such as resnet18, resnet50")
            model = timm.create_model(name, pretrained=pretrained)
        else:
            raise ValueError(f"library is {library!r}: give torchvision or timm")
        if not all(hasattr(model, f"layer{k}") for k in (1, 2, 3, 4)):
            raise ValueError(f"{given} has no stages layer1 to layer4: give a residual network")
        if stride:
            for part in model.layer4.modules():
                if isinstance(part, nn.Conv2d) and part.stride != (1, 1):
                    part.stride = (1, 1)
                elif isinstance(part, nn.AvgPool2d):
                    raise ValueError(f"{given} halves its map by pooling: set stride to false, or give a plain residual network")
        activation = model.relu if hasattr(model, "relu") else model.act1
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]
        self.layers = nn.Sequential(model.conv1, model.bn1, activation, model.maxpool, *stages)
        self.channels = int(model.fc.in_features)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, C, H / 32, W / 32), or H / 16 with ``stride``."""
        return self.layers(image)  # type: ignore[no-any-return]


# ---- texts -----------------------------------------------------------------------------------------------------------------------------


class TextVectors(nn.Module):
    """What a composed retriever needs of a text network.

    Attributes:
        width: T of the vectors.
        vocab_size: V, tokens that it knows.
    """

    width: int
    vocab_size: int

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, T)."""
        raise NotImplementedError


class EmbeddedWords(TextVectors):
    """The mean of the embeddings of a text's tokens.

    Args:
        vocab_size: V.
        width: T.
    """

    def __init__(self, vocab_size: int, width: int = 16) -> None:
        super().__init__()
        at_least(1, vocab_size=vocab_size, width=width)
        self.vocab_size, self.width = vocab_size, width
        self.words = nn.Embedding(vocab_size, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, T)."""
        share = attention_mask / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return (self.words(input_ids) * share[..., None]).sum(dim=1)  # type: ignore[no-any-return]


class LSTMText(TextVectors):
    """The last hidden state of an LSTM over a text's tokens.

    Args:
        vocab_size: V.
        embedding: Width of the word embeddings.
        width: T.
    """

    def __init__(self, vocab_size: int, embedding: int = 512, width: int = 512) -> None:
        super().__init__()
        at_least(1, vocab_size=vocab_size, embedding=embedding, width=width)
        self.vocab_size, self.width = vocab_size, width
        self.words = nn.Embedding(vocab_size, embedding)
        self.recurrent = nn.LSTM(embedding, width, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens, padding behind them -> (B, T)."""
        states, _ = self.recurrent(self.words(input_ids))
        last = (attention_mask.sum(dim=1) - 1).clamp(min=0)
        return states[torch.arange(len(last), device=last.device), last]  # type: ignore[no-any-return]


class TransformerText(TextVectors):
    """The first token of a transformer of Hugging Face, such as RoBERTa, then batch norm and a linear layer.

    Args:
        name_or_path: Folder or hub name of the model, or ``package:<name>`` for the one in an installed package.
        config: Instead: ``model_type`` and the arguments of its configuration; weights are random.
        width: T.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Both or neither are given, or ``config`` names no model.
    """

    def __init__(self, name_or_path: str | None = None, config: dict[str, Any] | None = None, width: int = 512) -> None:
        super().__init__()
        at_least(1, width=width)
        try:
            import transformers
        except ImportError as error:
            raise ImportError('TransformerText needs transformers: pip install "lit-methods[transformers]"') from error
        if (name_or_path is None) == (config is None):
            raise ValueError(
                f"name_or_path is {name_or_path!r} and config is {config!r}: give one of them, a model's folder, or a configuration such "
                "as {model_type: roberta, hidden_size: 64, ...}"
            )
        kind: Any = transformers.AutoModel
        if name_or_path is not None:
            given = f"name_or_path={name_or_path!r}"
            place, _ = place_of(name_or_path, given)
            self.model = fetch(
                lambda: kind.from_pretrained(place, dtype=torch.float32),
                place,
                given=given,
                instead="give the folder of a text model of transformers (config.json and weights)",
                blank=lambda: kind.from_config(transformers.AutoConfig.from_pretrained(place), dtype=torch.float32),
            )
        else:
            assert config is not None
            settings = dict(config)
            name = settings.pop("model_type", None)
            if name not in transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES:
                raise ValueError(f"config.model_type is {name!r}: give a text model, such as roberta, bert or distilbert")
            self.model = kind.from_config(transformers.AutoConfig.for_model(name, **settings), dtype=torch.float32)
        self.model.train()  # transformers gives it in eval mode
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # the first token is taken as it is: parameters without a gradient would stop DDP
        hidden = int(self.model.config.hidden_size)
        self.vocab_size, self.width = int(self.model.config.vocab_size), width
        self.norm, self.out = nn.BatchNorm1d(hidden), nn.Linear(hidden, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, T)."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.out(self.norm(states[:, 0]))  # type: ignore[no-any-return]


# ---- both ------------------------------------------------------------------------------------------------------------------------------


class Compositor(nn.Module):
    """What puts an image's map and a text's vector together; a subclass takes ``channels`` and ``text_width``."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w) map and (B, T) vectors -> (B, C, h, w)."""
        raise NotImplementedError


class ResidualCompositor(Compositor):
    """Adds a perceptron of the pooled map and the text to every place of the map.

    Args:
        channels: C of the maps.
        text_width: T of the vectors.
        hidden: Width of the hidden layer.
    """

    def __init__(self, channels: int = 64, text_width: int = 16, hidden: int = 128) -> None:
        super().__init__()
        at_least(1, channels=channels, text_width=text_width, hidden=hidden)
        self.channels, self.text_width = channels, text_width
        self.layers = nn.Sequential(nn.Linear(channels + text_width, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w) map and (B, T) vectors -> (B, C, h, w)."""
        added = self.layers(torch.cat([image.mean(dim=(2, 3)), text], dim=1))
        return image + added[:, :, None, None]


class EqualLinear(nn.Module):
    """A linear layer whose weights are drawn from N(0, 1) and multiplied by sqrt(2 / inputs) whenever they are used.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        bias: First values of the bias, (outputs,).
    """

    def __init__(self, inputs: int, outputs: int, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(bias.clone())
        self.scale = (2 / inputs) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return F.linear(x, self.weight * self.scale, self.bias)


class TextAttention(nn.Module):
    """Self-attention over the places of a map, to whose every row the places that fit the text are added: rows sum to 2.

    Args:
        channels: C of the map, a multiple of ``heads``.
        text_width: T.
        heads: Attention heads.
    """

    def __init__(self, channels: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.text = nn.Linear(text_width, channels)
        self.merge = nn.Conv2d(channels + text_width, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) map and (B, T) vectors -> (B, C, h, w), and the attention (B, heads, h w, h w): rows look at columns."""
        batch, channels, height, width = image.shape

        def by_head(x: Tensor) -> Tensor:
            return x.reshape(batch, self.heads, channels // self.heads, -1)  # (B, heads, c, places)

        merged = self.merge(torch.cat([image, text[:, :, None, None].expand(-1, -1, height, width)], dim=1))
        scale = (channels // self.heads) ** -0.5
        own = (by_head(self.query(image)).transpose(2, 3) @ by_head(self.key(image)) * scale).softmax(dim=-1)
        asked = (by_head(self.text(text)).transpose(2, 3) @ by_head(image) * scale).softmax(dim=-1)  # (B, heads, 1, places)
        attention = own + asked
        seen = (by_head(self.value(merged)) @ attention.transpose(2, 3)).reshape(image.shape)
        return self.out(seen), attention


class ContentStyleCompositor(Compositor):
    """CoSMo's compositor: the text moves the normalised content by attention, and then sets mean and deviation of each channel.

    n = instance norm of x; o = n + w0 * attention(n, t); o = o + w1 * attention(o, t); the result is gamma * o + beta. gamma and beta are
    linear in t, plus the channels' own deviation and mean, which a sigmoid of t lets through and which get no gradient.

    Args:
        channels: C of the maps, a multiple of ``heads``.
        text_width: T of the vectors.
        heads: Attention heads.

    Raises:
        ValueError: ``heads`` doesn't divide the channels.
    """

    def __init__(self, channels: int = 2048, text_width: int = 512, heads: int = 8) -> None:
        super().__init__()
        at_least(1, channels=channels, text_width=text_width, heads=heads)
        if channels % heads:
            raise ValueError(f"channels is {channels} and heads {heads}: give a number of heads that divides the channels")
        self.channels, self.text_width = channels, text_width
        self.first, self.second = (TextAttention(channels, text_width, heads) for _ in range(2))
        self.weights = nn.Parameter(torch.ones(2))
        zeros = torch.zeros(channels)
        self.style = EqualLinear(text_width, 2 * channels, torch.cat([zeros + 1, zeros]))
        self.gate = EqualLinear(text_width, 2 * channels, torch.cat([zeros, zeros]))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w) map and (B, T) vectors -> (B, C, h, w)."""
        return self.with_attention(image, text)[0]

    def with_attention(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the first attention (B, heads, h w, h w)."""
        # F.instance_norm refuses a single place in training; the norm over a channel's places is this one
        content = F.layer_norm(image, image.shape[2:])
        moved, attention = self.first(content, text)
        content = content + self.weights[0] * moved
        content = content + self.weights[1] * self.second(content, text)[0]
        places = image.detach().flatten(2)
        std, mean = places.std(dim=2, correction=0), places.mean(dim=2)
        gate_std, gate_mean = self.gate(text).sigmoid().chunk(2, dim=1)
        gamma, beta = self.style(text).chunk(2, dim=1)
        gamma, beta = gate_std * std + gamma, gate_mean * mean + beta
        return gamma[:, :, None, None] * content + beta[:, :, None, None], attention


__all__ = [
    "Compositor", "ContentStyleCompositor", "EmbeddedWords", "EqualLinear", "ImageTrunk", "LSTMText", "ResNetTrunk", "ResidualCompositor",
    "SmallMapTrunk", "TextAttention", "TextVectors", "TransformerText", "VectorTrunk",
]  # fmt: skip
