"""Flow models as priors: velocity E[x1 - x0 | x_t] of latents, encoder and decoder; exact ones, small ones, Stable Diffusion 3.

x_t = (1 - t) x0 + t x1 with x1 ~ N(0, 1): t = 1 is noise.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import read_json
from lit_methods.datamodules.restoration.mixture import mixture_means
from lit_methods.frozen import Frozen
from lit_methods.hub import NotThereError, fetch
from lit_methods.inverse_problems.flair.core import guided_velocity


class FlowPrior(nn.Module):
    """A flow model of latents. Subclasses write :meth:`velocity`, and :meth:`encode` and :meth:`decode` where latents aren't images.

    Attributes:
        bounded: Whether images lie in [-1, 1].
        told: What answers follow from besides weights and latents, such as prompts: images that were restored with another are others.
    """

    bounded: bool = True
    told: str = ""

    def about(self, names: Sequence[str]) -> None:
        """The names of the images that the following calls are about, one a row of them; "": it has none."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, ...) and times (B,) in [0, 1], 1 is noise -> (B, ...)."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images; differentiable."""
        return latents

    @property
    def trainable(self) -> bool:
        """Whether there are weights to train."""
        return any(parameter.requires_grad for parameter in self.parameters())


class GaussianMixtureFlow(FlowPrior):
    """The exact velocity of equally likely isotropic Gaussians, for trials: nothing is trained.

    With var_t = (1 - t)^2 s^2 + t^2 and r = x - (1 - t) m_k, component k has the weight softmax(-|r|^2 / 2 var_t), E[x0] = m_k + (1 - t)
    s^2 / var_t r and E[x1] = t / var_t r. ``MixtureDataModule`` draws from it.

    Args:
        components: Gaussians.
        side: S; a sample is (1, S, S).
        std: s, > 0.
        spread: Standard deviation of the means' coordinates.
        seed: Seed of the means.
    """

    bounded = False
    means: Tensor

    def __init__(self, components: int = 6, side: int = 4, std: float = 0.15, spread: float = 1.5, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, components=components, side=side)
        checks.positive(std=std, spread=spread)
        self.std = std
        self.register_buffer("means", mixture_means(components, side, spread, seed).flatten(1), persistent=False)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1, S, S) and (B,) -> (B, 1, S, S), computed in float64."""
        with torch.autocast(x.device.type, enabled=False):
            time, means = t.double()[:, None, None], self.means.double()
            variance = ((1 - time) * self.std) ** 2 + time**2
            away = x.double().flatten(1)[:, None] - (1 - time) * means
            share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
            x0, x1 = means + (1 - time) * self.std**2 / variance * away, time / variance * away
            return (share * (x1 - x0)).sum(1).view(x.shape).to(x.dtype)


class LatentFlow(FlowPrior):
    """A network as the velocity, of images or of an autoencoder's latents.

    Args:
        network: (B, c, h, w) and times (B,) -> (B, c, h, w), such as ``SmallUNet``.
        autoencoder: With ``encode`` and ``decode``; frozen and not saved. None: latents are the images.
        scale: Factor of latents, so that their standard deviation is about 1.
        shift: Taken off the autoencoder's latents before.

    Raises:
        TypeError: ``autoencoder`` can't decode.
    """

    def __init__(self, network: nn.Module, autoencoder: nn.Module | None = None, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        checks.positive(scale=scale)
        if autoencoder is not None and not callable(getattr(autoencoder, "decode", None)):
            raise TypeError(f"autoencoder is a {type(autoencoder).__name__} without decode(latents): give TinyAutoencoder or the like")
        self.network, self.scale, self.shift = network, scale, shift
        self.frozen = None if autoencoder is None else Frozen(autoencoder)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, c, h, w) and (B,) -> (B, c, h, w), in the network's own type."""
        dtype = next(self.network.parameters()).dtype
        answer: Tensor = self.network(x.to(dtype), t.to(dtype))
        return answer

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents."""
        if self.frozen is None:
            return images
        return (self.frozen.module.encode(images) - self.shift) * self.scale  # type: ignore[operator, no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images."""
        if self.frozen is None:
            return latents
        return self.frozen.module.decode(latents / self.scale + self.shift)  # type: ignore[operator, no-any-return]


# ---- autoencoders ----------------------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """Three convolutions added to their input; with ``pool`` a wider pointwise pair before them."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        self.pool = None
        if pooled:
            wide = 4 * width
            inner, outer = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(inner, nn.GroupNorm(4, wide), nn.ReLU(), outer)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(width_in: int, width_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, **options)


class _SoftClamp(nn.Module):
    """3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyAutoencoder(nn.Module):
    """madebyollin's tiny autoencoder of FLUX.2's latents, 8 times smaller with 32 channels (github.com/madebyollin/taesd, MIT).

    Cost: 2.7 million parameters.

    Args:
        root: Folder with the state dicts of encoder and decoder; None: random weights, for trials.
        encoder: File of the encoder in it.
        decoder: File of the decoder.
        width: Channels inside.
        latents: Channels of the latents.

    Raises:
        FileNotFoundError: A file isn't there.
        ValueError: A file holds other weights.
    """

    def __init__(
        self,
        root: Path | None = None,
        encoder: str = "taef2_encoder.pth",
        decoder: str = "taef2_decoder.pth",
        width: int = 64,
        latents: int = 32,
    ) -> None:
        super().__init__()
        checks.at_least(4, width=width)
        checks.at_least(1, latents=latents)

        def blocks(pooled: bool) -> list[nn.Module]:
            return [_Block(width, pooled) for _ in range(3)]

        down = [part for stage in range(3) for part in (_conv(width, width, stride=2, bias=False), *blocks(stage == 2))]
        self.encoder = nn.Sequential(_conv(3, width), _Block(width, False), *down, _conv(width, latents))
        up = [part for stage in range(3) for part in (*blocks(stage == 0), nn.Upsample(scale_factor=2), _conv(width, width, bias=False))]
        self.decoder = nn.Sequential(_SoftClamp(), _conv(latents, width), nn.ReLU(), *up, _Block(width, False), _conv(width, 3))
        if root is not None:
            self._load(Path(root).expanduser(), {"encoder": encoder, "decoder": decoder})

    def _load(self, root: Path, files: dict[str, str]) -> None:
        from lit_methods.runs.checkpoints import read_state_dict

        for part, name in files.items():
            if not (root / name).is_file():
                raise FileNotFoundError(f"root={str(root)!r} has no {name}: give the folder of the tiny autoencoder's files, or {part}=")
            try:
                getattr(self, part).load_state_dict(read_state_dict(root / name))
            except RuntimeError as error:
                raise ValueError(f"{root / name} doesn't fit ({str(error).splitlines()[-1].strip()}): give the {part} of taef2") from error

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, 32, H / 8, W / 8)."""
        if images.shape[-2] % 8 or images.shape[-1] % 8:
            raise ValueError(f"images are {images.shape[-2]} x {images.shape[-1]}: crop them to multiples of 8")
        answer: Tensor = self.encoder(images / 2 + 0.5)
        return answer

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 32, h, w) -> (B, 3, 8 h, 8 w) in about [-1, 1]."""
        answer: Tensor = self.decoder(latents) * 2 - 1
        return answer


# ---- Stable Diffusion 3 ----------------------------------------------------------------------------------------------------------------


def _no_text(pipeline: Any) -> None:
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(pipeline, name, None)


def read_prompts(path: Path) -> dict[str, str]:
    """Name of an image -> its prompt, from a JSON file.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It holds something else.
    """
    found = read_json(path, "prompts", "give a JSON file {name of an image: its prompt}, or null")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise BrokenRecordError(path, "prompts", 'isn\'t an object of names and prompts: write {"name of an image": "its prompt", ...}')
    return found


class SD3Flow(FlowPrior):
    """Stable Diffusion 3 or 3.5 by diffusers, frozen, with one prompt for all images or one for each, and classifier-free guidance.

    Prompts are encoded once when it is made, and the text encoders are dropped. Nothing of it is saved in checkpoints.

    Args:
        name_or_path: Folder or name on the hub, such as ``stabilityai/stable-diffusion-3-medium-diffusers``.
        prompt: What the images show.
        prompts: JSON file {name of an image: its prompt}, names as files of images have them, without ending; others have ``prompt``.
            None: all have it.
        negative_prompt: Of the unconditional branch.
        guidance: Scale g of v_u + g (v_c - v_u); 1: the conditional branch alone, at half the cost.
        tiny_autoencoder: Folder or name of an ``AutoencoderTiny`` of the same latents, such as ``madebyollin/taesd3``, in the place of the
            large one: less memory and time. None: the large one.
        t5: Use the third text encoder, which is the largest; False: without, as diffusers allows.
        precision: Type of the weights.

    Raises:
        ImportError: diffusers isn't installed; the message names the extra.
        NotThereError: There is no such model; the message says what to do.
        MissingFileError: There is no file ``prompts``.
        BrokenRecordError: It holds something else.
    """

    def __init__(
        self,
        name_or_path: str,
        prompt: str = "",
        prompts: Path | None = None,
        negative_prompt: str = "",
        guidance: float = 2.0,
        tiny_autoencoder: str | None = None,
        t5: bool = True,
        precision: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ) -> None:
        super().__init__()
        checks.literals(SD3Flow, locals())
        checks.at_least(0, guidance=guidance)
        try:
            import diffusers
        except ImportError as error:
            raise ImportError('SD3Flow needs diffusers: pip install "lit-methods[diffusers]"') from error
        dtype = getattr(torch, precision)
        self.guidance = guidance
        each = {} if prompts is None else read_prompts(Path(prompts).expanduser())
        texts = list(dict.fromkeys([prompt, *each.values()]))  # what is said of several images is encoded once
        self._places = {name: 1 + texts.index(text) for name, text in each.items()}  # behind the unconditional branch
        self._rows: list[int] = []  # places of the images that calls are about; none: the common prompt
        self.told = json.dumps([prompt, negative_prompt, guidance, each], sort_keys=True) if each else ""
        given, instead = f"name_or_path={name_or_path!r}", "give the folder of a copy in diffusers' layout"
        if name_or_path.startswith((".", "/", "~")):
            name_or_path = str(Path(name_or_path).expanduser())
            if not Path(name_or_path).is_dir():
                raise NotThereError(f"{given} is no folder: {instead}")
        without: dict[str, Any] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}

        def blank() -> Any:
            def part(kind: Any, folder: str) -> Any:
                return kind.from_config(kind.load_config(name_or_path, subfolder=folder)).to(dtype)

            transformer = part(diffusers.SD3Transformer2DModel, "transformer")
            return transformer, part(diffusers.AutoencoderKL, "vae"), None

        def load() -> Any:
            pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(name_or_path, torch_dtype=dtype, **without)
            with torch.no_grad():
                words: dict[str, Any] = {"negative_prompt": negative_prompt, "do_classifier_free_guidance": True}
                found = [pipeline.encode_prompt(text, None, None, device=torch.device("cpu"), **words) for text in texts]
            _no_text(pipeline)
            # unconditional first, as the branches are put together
            embeddings = [torch.cat([found[0][place + 1], *(one[place] for one in found)]) for place in (0, 2)]
            return pipeline.transformer, pipeline.vae, embeddings

        transformer, autoencoder, embeddings = fetch(load, name_or_path, given=given, instead=instead, blank=blank)
        if embeddings is None:
            config = transformer.config
            rows = 1 + len(texts)
            embeddings = [torch.zeros(rows, 77, config.joint_attention_dim), torch.zeros(rows, config.pooled_projection_dim)]
        if tiny_autoencoder is not None:
            tiny = diffusers.AutoencoderTiny
            autoencoder = fetch(
                lambda: tiny.from_pretrained(tiny_autoencoder, torch_dtype=dtype),
                tiny_autoencoder,
                given=f"tiny_autoencoder={tiny_autoencoder!r}",
                instead="give the folder of a copy, or null",
                blank=lambda: tiny.from_config(tiny.load_config(tiny_autoencoder)).to(dtype),
            )
        self.tiny = tiny_autoencoder is not None
        self.transformer, self.autoencoder = Frozen(transformer.to(dtype)), Frozen(autoencoder.to(dtype))
        self.register_buffer("text", embeddings[0].to(dtype), persistent=False)
        self.register_buffer("pooled", embeddings[1].to(dtype), persistent=False)
        self.scale, self.shift = (
            getattr(autoencoder.config, f"{name}_factor") or default for name, default in (("scaling", 1.0), ("shift", 0.0))
        )

    def about(self, names: Sequence[str]) -> None:
        """The names of the images that the following calls are about, whose prompts are taken."""
        self._rows = [self._places.get(name, 1) for name in names]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 16, h, w) and (B,) -> (B, 16, h, w) float32, both branches in one pass; the transformer is told 1000 t."""
        text, pooled = self.get_buffer("text"), self.get_buffer("pooled")
        conditional = self._rows or [1] * len(x)
        if len(conditional) != len(x):
            raise ValueError(f"SD3Flow was told of {len(conditional)} images and got {len(x)} latents: call about(names) for these")
        chosen = conditional if self.guidance == 1 else [0] * len(x) + conditional
        branches = len(chosen) // len(x)
        latents = torch.cat([x.to(text.dtype)] * branches)
        answer = self.transformer.module(
            hidden_states=latents,
            timestep=(1000 * t).repeat(branches),
            encoder_hidden_states=text[chosen],
            pooled_projections=pooled[chosen],
            return_dict=False,
        )[0].float()
        if self.guidance == 1:
            return answer
        without, with_prompt = answer.chunk(2)
        return guided_velocity(without, with_prompt, self.guidance)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 16, H / 8, W / 8), the mode of the posterior."""
        found = self.autoencoder.module.encode(images.to(self.get_buffer("text").dtype), return_dict=False)[0]  # type: ignore[operator]
        latents: Tensor = found if self.tiny else found.mode()
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8 h, 8 w)."""
        scaled = (latents / self.scale + self.shift).to(self.get_buffer("text").dtype)
        images: Tensor = self.autoencoder.module.decode(scaled, return_dict=False)[0]  # type: ignore[operator]
        return images.float()


__all__ = ["FlowPrior", "GaussianMixtureFlow", "LatentFlow", "SD3Flow", "TinyAutoencoder"]
