"""Text-to-video pipelines of diffusers as denoisers: U-Net, text encoder and autoencoder of one folder or of one name on the hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.diffusion.windows import window_attention
from lit_methods.frozen import Frozen
from lit_methods.hub import fetch


class DiffusersVideo(nn.Module):
    """A ``TextToVideoSDPipeline`` of diffusers, such as ModelScope's text-to-video 1.7B: ``denoise`` for latents, texts as prompts.

    The text encoder and the autoencoder are frozen: neither trained nor saved. Latents are (B, F, 4, H / 8, W / 8).

    Args:
        path: Folder of the pipeline with ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``, or its name on the hub.

    Raises:
        ImportError: diffusers or transformers is not installed; the message names the extra.
        ValueError: A part is missing, or the U-Net predicts something else than the noise.
    """

    frame_prompts = False

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            import diffusers
            import transformers
        except ImportError as error:
            raise ImportError('DiffusersVideo needs two libraries: pip install "lit-methods[diffusers]" transformers') from error
        library: Any = diffusers

        def part(kind: Any, name: str) -> Any:
            return fetch(
                lambda: kind.from_pretrained(path, subfolder=name),
                path,
                given=f"path={path!r}, {name}",
                instead="give the folder of a TextToVideoSDPipeline, or its name on the hub",
                blank=lambda: _blank(kind, path, name),
            )

        self.unet: nn.Module = part(library.UNet3DConditionModel, "unet")
        self.text_encoder = Frozen(part(transformers.CLIPTextModel, "text_encoder"))
        self.autoencoder = Frozen(part(library.AutoencoderKL, "vae"))
        self.tokenizer: Any = part(transformers.CLIPTokenizer, "tokenizer")
        scheduler: Any = part(library.DDIMScheduler, "scheduler")
        kind = scheduler.config.prediction_type
        if kind != "epsilon":
            raise ValueError(f"path={path!r}: the U-Net predicts {kind!r}: give a pipeline that predicts the noise, 'epsilon'")
        self.shares: Tensor = scheduler.alphas_cumprod.float()
        vae: Any = self.autoencoder.module
        self.scale: float = vae.config.scaling_factor

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Latents (B, F, C, H, W), steps (B,) and embeddings (B, L, D) -> noise like ``x``."""
        answer: Tensor = self.unet(x.transpose(1, 2), t, encoder_hidden_states=cond.to(x.dtype)).sample
        return answer.transpose(1, 2)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Noise in ``x_t``."""
        return self(x_t, t, cond)  # type: ignore[no-any-return]

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> embeddings (N, L, D)."""
        length = self.tokenizer.model_max_length
        encoder: Any = self.text_encoder.module
        length = min(length, encoder.config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        embeddings: Tensor = self.text_encoder(tokens.input_ids.to(encoder.device)).last_hidden_state
        return embeddings

    def unconditional(self, cond: Tensor) -> Tensor:
        """Embeddings of the empty text, like ``cond``."""
        return self.encode_prompts([""]).to(cond).expand_as(cond)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) -> frames (B, F, 3, H, W) in [-1, 1], one frame at a time, which bounds the memory."""
        vae: Any = self.autoencoder.module
        with torch.no_grad():
            frames = [vae.decode(frame.to(vae.dtype) / self.scale).sample.clamp(-1, 1) for frame in latents.unbind(1)]
        return torch.stack(frames, dim=1)

    @contextmanager
    def attention_windows(self, size: int, stride: int) -> Iterator[None]:
        """Inside, frames attend to frames in sliding windows: the attention of the U-Net's temporal transformers."""
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

        temporal = [module for module in self.unet.modules() if isinstance(module, TransformerTemporalModel)]
        layers: list[Any] = [layer for module in temporal for layer in module.modules() if isinstance(layer, Attention)]
        before = [layer.processor for layer in layers]
        try:
            for layer in layers:
                layer.set_processor(_InWindows(size, stride))
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                layer.set_processor(processor)


class _InWindows:
    """Attention of diffusers over frames, inside sliding windows."""

    def __init__(self, size: int, stride: int) -> None:
        self.size, self.stride = size, stride

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mixed = window_attention(q, k, v, self.size, self.stride).transpose(1, 2).flatten(2)
        answer: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return answer


def _blank(kind: Any, path: str, name: str) -> Any:
    """The part without weights: what its config says."""
    if hasattr(kind, "load_config"):  # of diffusers
        return kind.from_config(kind.load_config(path, subfolder=name))
    if hasattr(kind, "config_class") and kind.config_class is not None:
        return kind(kind.config_class.from_pretrained(path, subfolder=name))
    return kind.from_pretrained(path, subfolder=name)


__all__ = ["DiffusersVideo"]
