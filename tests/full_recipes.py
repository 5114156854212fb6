"""How each file of ``configs/full/`` is started on a CPU: what stands in for its weights, and what else is changed, with the reason.

``docs/full_recipes.md`` shows this table with what was measured; ``tests/test_full_recipes.py`` runs it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

LAPTOP = ("accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "precision=32-true", "log_every_n_steps=1")
FEW_STEPS = ("--model.init_args.steps=4", "--model.init_args.answer_length=32")
SMALL_BATCH = "the network takes seconds an image on two cores"


@dataclass(frozen=True)
class Recipe:
    """One file.

    Attributes:
        replaced: Text of the file -> what stands there instead; ``{work}`` is a folder of the test's own.
        words: Further arguments of ``lit fit``.
        why: Reason of each argument that isn't one of root, devices, precision and steps, for the page.
        prepare: Writes the weights that stand in for released ones.
        first: Arguments of a run whose checkpoint this one starts from; it is put in place of ``{first}``.
        needs: Libraries without which it is left out.
        evaluated: It is for ``lit test`` alone: a test is run, nothing is trained.
        meta: It is too large for this machine: the whole network goes up to the first step on the meta device, and what is run is the
            file with a smaller network (``replaced``).
    """

    replaced: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    why: str = ""
    prepare: Callable[[Path], None] | None = None
    first: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    meta: bool = False
    evaluated: bool = False


# ---- stand-ins for released weights ----------------------------------------------------------------------------------------------------


def clip(work: Path) -> None:
    """CLIP ViT-B/16 with random weights, as transformers saves it; its tokenizer knows the letters alone."""
    import transformers

    folder = work / "clip"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    vision: dict[str, Any] = {"patch_size": 16}
    text = {"eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)


def clip_and_vgg(work: Path) -> None:
    """CLIP ViT-B/32 as transformers saves it and torchvision's VGG-16, with random weights."""
    import transformers
    from torchvision.models import vgg16

    sizes = {"patch_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = transformers.CLIPVisionModelWithProjection
    kind(transformers.CLIPVisionConfig(**sizes)).save_pretrained(work / "clip")
    layers = vgg16(weights=None).features.state_dict()
    torch.save({f"features.{name}": value for name, value in layers.items()}, work / "vgg16.pth")


def minkunet(work: Path) -> None:
    """A MinkUNet-34 with random weights, under the names that a pretraining exports."""
    from lit_methods import MinkUNet

    network = MinkUNet(depth=34, voxel_type="cylinder", voxel_size=(0.1, 1.0, 0.1))
    torch.save({f"backbone_3d.{name}": value for name, value in network.state_dict().items()}, work / "superflow_vits.pt")


def autoencoder(work: Path) -> None:
    """Stable Diffusion's autoencoder with random weights, as diffusers saves it, and a small TorchScript network for Inception."""
    import diffusers

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 256,
    }
    diffusers.AutoencoderKL(**blocks).save_pretrained(work / "vae")
    torch.jit.script(_Features()).save(str(work / "inception.pt"))


class _Features(torch.nn.Module):
    """Takes what that Inception network takes: images as bytes, and a word that it wants features."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def sd3(work: Path) -> None:
    """Stable Diffusion 3 with small parts and random weights, as diffusers saves it, without T5; and an ``AutoencoderTiny``."""
    import diffusers
    import transformers

    folder = work / "sd3"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    config = transformers.CLIPTextConfig(vocab_size=len(words), eos_token_id=len(words) - 1, bos_token_id=len(words) - 2, **text)
    encoders = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    transformer = diffusers.SD3Transformer2DModel(
        in_channels=4, out_channels=4, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=16, sample_size=8, **sizes
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=1.5, shift_factor=0.1, **blocks
    )
    diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1], tokenizer, None, None
    ).save_pretrained(folder)
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    diffusers.AutoencoderTiny(latent_channels=4, **widths).save_pretrained(work / "taesd3")


def unet(work: Path) -> None:
    """A U-Net of Stable Diffusion's kind with few channels and random weights, for the prompts of the tiny release."""
    import diffusers

    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 8}
    diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **blocks, **sizes).save_pretrained(work / "unet")


def stable_diffusion(work: Path) -> None:
    """A text-to-image pipeline with few channels and random weights, as diffusers saves it, its tokenizer knowing the letters alone."""
    import diffusers
    import transformers

    folder = work / "stable_diffusion"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    text = transformers.CLIPTextConfig(**sizes, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 32}
    diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, norm_num_groups=4, **blocks, **widths).save_pretrained(folder / "unet")
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(**coder, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder / "vae")
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")


def dloral(work: Path) -> None:
    """The pipeline, and random weights of a SPyNet."""
    from lit_methods import SPyNet

    stable_diffusion(work)
    torch.save(SPyNet().state_dict(), work / "spynet.pth")


def text_to_video(work: Path) -> None:
    """A text-to-video pipeline with few channels and random weights, as diffusers saves it; its tokenizer knows the letters alone."""
    import diffusers
    import transformers

    folder = work / "text_to_video"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    text = transformers.CLIPTextConfig(**sizes, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    blocks = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 32}
    diffusers.UNet3DConditionModel(in_channels=4, out_channels=4, norm_num_groups=4, **blocks, **widths).save_pretrained(folder / "unet")
    coder = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
    diffusers.AutoencoderKL(**coder, norm_num_groups=4, latent_channels=4).save_pretrained(folder / "vae")
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")


LLAMA2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


def llama(work: Path, **sizes: int) -> None:
    """A llama with random weights, as transformers saves it; LLaMA2-7B's configuration but for the sizes."""
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**(LLAMA2_7B | small | sizes))
    transformers.LlamaForCausalLM(config).save_pretrained(work / "llama")


def llada_folder(folder: Path, network: Any) -> None:
    """The folder of a LLaDA with the weights of one of transformers' LLaMA."""
    from safetensors.torch import save_file

    names = {
        "model.embed_tokens.": "model.transformer.wte.",
        "model.norm.": "model.transformer.ln_f.",
        "lm_head.": "model.transformer.ff_out.",
        "model.layers.": "model.transformer.blocks.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }
    weights = {}
    for name, value in network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = network.config
    said = {
        "model_type": "llada",
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "d_model": theirs.hidden_size,
        "mlp_hidden_size": theirs.intermediate_size,
        "n_layers": theirs.num_hidden_layers,
        "n_heads": theirs.num_attention_heads,
        "n_kv_heads": theirs.num_key_value_heads,
        "embedding_size": theirs.vocab_size,
        "vocab_size": theirs.vocab_size - 8,
        "mask_token_id": theirs.vocab_size - 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": theirs.rms_norm_eps,
        "max_sequence_length": theirs.max_position_embeddings,
        "weight_tying": False,
    }
    (folder / "config.json").write_text(json.dumps(said))


def llada(work: Path) -> None:
    """A LLaDA with random weights, and for few tokens."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (work / "llada").mkdir()
    llada_folder(work / "llada", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=4096)))


def dream(work: Path) -> None:
    """A Dream with random weights, and for few tokens."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=1, max_position_embeddings=16384)
    transformers.Qwen2ForCausalLM(config).save_pretrained(work / "dream")
    said = json.loads((work / "dream" / "config.json").read_text())
    said |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 52}
    (work / "dream" / "config.json").write_text(json.dumps(said))


def gpt2(work: Path) -> None:
    """GPT-2 small with random weights and few words, as transformers saves it."""
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=200)).save_pretrained(work / "gpt2")


SMALL_WAN = {"width: 1536": "width: 48", "hidden: 8960": "hidden: 96", "heads: 12": "heads: 2", "depth: 30": "depth: 2"}


def wan(work: Path) -> None:
    """A Wan of two small blocks with random weights."""
    from lit_methods import WanTransformer

    network = WanTransformer(channels=16, width=48, hidden=96, heads=2, depth=2, text_width=4096)
    torch.save(network.state_dict(), work / "wan.pth")


def masked_language_models(work: Path) -> None:
    """A BERT of one layer with a tokenizer of some words."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "these", "fox", "sees", "the", "near", "river", "."]
    (work / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(words), **sizes))
    model.save_pretrained(work / "bert")
    transformers.BertTokenizerFast(str(work / "vocab.txt"), model_max_length=256).save_pretrained(work / "bert")


# ---- the table -------------------------------------------------------------------------------------------------------------------------

RANDOM = {"pretrained: true": "pretrained: false"}  # of timm
DOWNSTREAM = Recipe({"pretrained/superflow_vits.pt": "{work}/superflow_vits.pt"}, prepare=minkunet)
CLIP = Recipe({"/data/clip-vit-base-patch16": "{work}/clip"}, prepare=clip, needs=("transformers",))
MASKED = Recipe(
    {"/data/masksparsity/global.ckpt": "{first}"},
    first=(
        "--trainer.callbacks.init_args.stage=global_sparsity",
        "--trainer.callbacks.init_args.weights=null",
        "--trainer.callbacks.init_args.mask=null",
    ),
    needs=("torch_pruning",),
)


def latent_consistency(work: Path) -> None:
    """Parts of a latent consistency model and of Stable Diffusion with few channels, CLIP's vision tower and VGG, all of random weights."""
    import diffusers
    import torchvision
    import transformers

    blocks: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    blocks |= {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    for folder, told in (("lcm", 256), ("sd15", None)):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=768, time_cond_proj_dim=told, **blocks
        )
        unet.save_pretrained(work / folder / "unet")
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, **stages).save_pretrained(
        work / "lcm" / "vae"
    )
    diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(work / "lcm" / "scheduler")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(image_size=224, patch_size=16, **sizes)
    transformers.CLIPVisionModel(config).save_pretrained(work / "clip_vision")
    features = torchvision.models.vgg16().features
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, work / "vgg16.pth")


def batch(size: int) -> Recipe:
    """A smaller batch."""
    return Recipe(words=(f"--data.init_args.batch_size={size}",), why=f"batch of {size}: {SMALL_BATCH}")


LATENTS = Recipe(
    {"/data/sd-vae-ft-ema": "{work}/vae", "/data/inception-2015-12-05.pt": "{work}/inception.pt"},
    words=("--data.init_args.batch_size=2", "--data.init_args.val_batch_size=8", "--data.init_args.num_samples=8"),
    why=f"batch of 2, 8 samples: {SMALL_BATCH}",
    prepare=autoencoder,
    needs=("diffusers",),
)

FEW_BLOCKS = Recipe(
    words=(
        "--data.init_args.batch_size=2",
        "--data.init_args.image_size=128",
        *(f"--model.init_args.{part}.init_args.{size}" for part in ("encoder", "decoder") for size in ("image_size=128", "depth=2")),
    ),
    why="batch of 2, images of 128 pixels, 2 blocks in the encoder and 2 in the decoder: the network takes gigabytes",
)

CROPPED = Recipe(words=("--data.init_args.crop=[20,20]",), why="cropped to 20 pixels: those of the tiny release have 24", needs=("h5py",))
RECIPES: dict[str, Recipe] = {
    "abstopk_gpt2": Recipe(words=("--data.init_args.batch_size=64",), why="batch of 64: a step of 4,096 takes seconds on two cores"),
    "adawac_acdc": Recipe(RANDOM, needs=("h5py",)),
    "adawac_synapse": Recipe(RANDOM, needs=("h5py",)),
    "adele_voc": Recipe(
        RANDOM,
        words=("--data.init_args.batch_size=2", "--data.init_args.crop=96"),
        why="batch of 2, crops of 96 pixels: ten of 448 at three scales took more than the 23 GB of this machine",
    ),
    "cast_llama2_7b": Recipe(
        {"/models/llama-2-7b": "{work}/llama"},
        words=("--trainer.accumulate_grad_batches=2", "--data.init_args.block_size=256"),
        why="2 sequences of 256 tokens a step: 32 of 4,096 take minutes on two cores, for the 32,000 words of the vocabulary",
        prepare=llama,
        needs=("transformers",),
        meta=True,
    ),
    "cono_text_to_video": Recipe(
        {"/models/text-to-video-ms-1.7b": "{work}/text_to_video"},
        words=(
            "--model.init_args.sampler.steps=2",
            "--model.init_args.sampler.guided_until=1",
            "--model.init_args.clip_shape=[4,8,8]",
        ),
        why="2 steps, latents of 8 x 8: 50 steps of 4 passes take minutes on two cores",
        prepare=text_to_video,
        needs=("diffusers", "transformers"),
        evaluated=True,
    ),
    "conr_agedb": batch(8),
    "conr_imdb_wiki": batch(8),
    "conr_nyud2": Recipe(RANDOM),
    "conr_sts_b": Recipe(),
    "cirim_cc359": Recipe(needs=("h5py",)),
    "cirim_fastmri_brain": CROPPED,
    "cirim_fastmri_knee": CROPPED,
    "cirim_stanford_knee": Recipe(needs=("h5py",)),
    **{
        f"cir_uncertainty_{name}": Recipe(
            {
                "/models/roberta-base": "{work}/bert",
                "pretrained: true": "pretrained: false",
                "channels: 2048": "channels: 512",
                "name: resnet50": "name: resnet18",
                "image_size: 224": "image_size: 64",
            },
            words=("--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=16"),
            why=f"ResNet-18, so another name and channels, image_size 64, batch of 4: {SMALL_BATCH}",
            prepare=masked_language_models,
            needs=("transformers",),
        )
        for name in ("fashioniq", "shoes", "fashion200k")
    },
    "coprompt_eurosat": CLIP,
    "coprompt_imagenet": CLIP,
    **{
        f"consistencydet_{name}": Recipe(
            {"pretrained: true": "pretrained: false"},
            words=(
                "--data.init_args.sides=[64]",
                "--data.init_args.eval_side=64",
                "--data.init_args.crop=null",
                "--model.init_args.proposals=8",
                "--model.init_args.eval_steps=[1,2]",
                "--model.init_args.head.init_args.dynamic=4",
                "--model.init_args.head.init_args.feedforward=32",
            ),
            why=f"images of 64 pixels, 8 proposals, narrower heads: {SMALL_BATCH}",
            needs=("faster_coco_eval",),
        )
        for name in ("coco", "lvis")
    },
    "cotap_coco_imagenet": Recipe(
        {"pretrained: true": "pretrained: false", "head_hidden: 2048": "head_hidden: 64"},
        words=("--data.init_args.batch_size=2", "--data.init_args.eval_batch_size=4"),
        why=f"batch of 2, narrower heads: {SMALL_BATCH}",
    ),
    "ddc_fewshot_ffhq": Recipe(
        {"openai/clip-vit-base-patch32": "{work}/clip", "/models/vgg16-397923af.pth": "{work}/vgg16.pth"},
        words=(
            "--data.init_args.image_size=32",
            "--data.init_args.val_batch_size=2",
            "--model.init_args.sampler.steps=2",
            "--model.init_args.source_steps=0",
            "--model.init_args.fusion_steps=1",
        ),
        why="images of 32 pixels, 2 steps of the sampler, no source stage and 1 step of fusion: so that the third stage is reached",
        prepare=clip_and_vgg,
        needs=("transformers",),
    ),
    **{
        f"video_action_detection_{name}": Recipe(
            {"weights: /models/rgb_charades.pt": "weights: null", "width: 1.0": "width: 0.1", "kernel: 9": "kernel: 3"}
            | ({"[224, 224]": "[32, 32]"} | ({"[256, 256]": "[32, 32]"} if name == "jhmdb" else {})),
            words=("--data.init_args.batch_size=2",),
            why=f"crops of 32 pixels, a tenth of the channels, smaller capsule kernel, batch of 2: {SMALL_BATCH}",
            needs=("av",) if name == "ucf101" else (),
        )
        for name in ("ucf101", "jhmdb")
    },
    "dass_cifar_final": Recipe(words=("--data.init_args.batch_size=2",), why=f"batch of 2: {SMALL_BATCH}"),
    "dass_cifar_search": Recipe(
        words=("--data.init_args.batch_size=2", "--model.init_args.pretrain_steps=0"),
        why=f"batch of 2: {SMALL_BATCH}; begins with the second phase, in which each batch is one step",
    ),
    "dloral_sd21": Recipe(
        {"/models/stable-diffusion-2-1-base": "{work}/stable_diffusion", "/models/spynet.pth": "{work}/spynet.pth"},
        words=(
            '--model.init_args.perceptual={"class_path":"FeatureDistance","init_args":{"network":{"class_path":"RandomFeatures"}}}',
            "--model.init_args.schedule.init_args.quality_iter=0",
            "--data.init_args.size=64",
            "--data.init_args.eval_size=64",
            "--data.init_args.eval_frames=2",
        ),
        why="squares of 64 pixels, 2 frames in validation: 512 take minutes on two cores; a random network in the place of VGG-16; the "
        "second step is one of the detail stage",
        prepare=dloral,
        needs=("diffusers", "transformers"),
    ),
    "dsl_recommendation_lightgcn": Recipe(),
    "dsl_recommendation_multvae": Recipe(),
    "dsl_recommendation_neumf": Recipe(),
    "dsnot_llama": Recipe({"/models/llama-7b": "{work}/llama"}, prepare=llama, needs=("transformers",)),
    "epg_consistency_imagenet256": FEW_BLOCKS,
    "epg_denoise_imagenet256": FEW_BLOCKS,
    "epg_pretrain_imagenet256": batch(4),
    "gba_qwen": Recipe(words=("--data.init_args.batch_size=16",), why="batch of 16: 66,000 neurons take seconds on two cores"),
    "ict_cifar10": Recipe(words=("--data.init_args.batch_size=4", "--data.init_args.val_batch_size=4"), why=f"batches of 4: {SMALL_BATCH}"),
    "ict_imagenet64": batch(2),
    "issp_edsr": batch(1),
    "issp_swin2sr": Recipe(words=("--data.init_args.batch_size=1",), why=f"batch of 1: {SMALL_BATCH}", needs=("transformers",)),
    "flair_sd3": Recipe(
        {"stabilityai/stable-diffusion-3-medium-diffusers": "{work}/sd3", "madebyollin/taesd3": "{work}/taesd3"},
        words=(
            "--model.init_args.prior.init_args.t5=false",
            "--model.init_args.prior.init_args.precision=float32",
            "--data.init_args.image_size=96",
            "--model.init_args.operator.init_args.size=[96,96]",
            "--model.init_args.settings.steps=2",
            "--model.init_args.calibration_times=4",
            "--model.init_args.val_images=1",
        ),
        why="images of 96 pixels, 2 times, 4 points of the error curve, no third text encoder: 768 pixels take minutes on two cores",
        prepare=sd3,
        needs=("diffusers", "transformers"),
    ),
    "interlcm_faces": Recipe(
        {
            "SimianLuo/LCM_Dreamshaper_v7": "{work}/lcm",
            "stable-diffusion-v1-5/stable-diffusion-v1-5": "{work}/sd15",
            "openai/clip-vit-base-patch16": "{work}/clip_vision",
            "weights: null, backbone: vgg": "weights: {work}/vgg16.pth, backbone: vgg",
        },
        words=("--data.init_args.image_size=64",),
        why="images of 64 pixels: 512 take seconds each on two cores",
        prepare=latent_consistency,
        needs=("diffusers", "transformers", "lpips"),
    ),
    "maid_experts_kodak": Recipe(
        words=("--data.init_args.size=16", "--data.init_args.number=2"), why="2 images of 16 pixels: a solve of 20 large ones takes minutes"
    ),
    "maid_mnist": Recipe(),
    "masksparsity_cifar": MASKED,
    "masksparsity_imagenet": MASKED,
    "progressive_gradient_flow_vit": batch(4),
    "random_pruning_cifar": Recipe(),
    "random_pruning_imagenet": batch(8),
    "random_search_cifar": Recipe(),
    "rcm_wan1b": Recipe({"/data/wan/wan2.1_t2v_1.3b.pth": "{work}/wan.pth", **SMALL_WAN}, prepare=wan, meta=True),
    "s2ft_llama3_8b": Recipe(
        {"tokenizer: /models/llama-3-8b": "tokenizer: null", "/models/llama-3-8b": "{work}/llama"}, prepare=llama, needs=("transformers",)
    ),
    "sara_sd15": Recipe(
        {"/models/sd15/unet": "{work}/unet", "threshold: 2.0e-3": "threshold: 0.02"},
        why="another threshold: random weights are larger",
        prepare=unet,
        needs=("diffusers",),
    ),
    "sparsed_llada": Recipe(
        {"/models/llada-1.5": "{work}/llada"},
        words=(*FEW_STEPS, "--model.init_args.block_length=16"),
        why="answers of 32 tokens in 4 steps: 128 runs on 4,096 tokens take minutes on two cores",
        prepare=llada,
        needs=("transformers",),
    ),
    "sparsed_dream": Recipe(
        {"/models/dream-7b-instruct": "{work}/dream"},
        words=(*FEW_STEPS, "--data.init_args.block_size=2048"),
        why="answers of 32 tokens in 4 steps, texts of 2,048: attention over 16,384 tokens takes minutes on two cores",
        prepare=dream,
        needs=("transformers",),
    ),
    "sae_evals_ioi": Recipe(
        {"name_or_path: /models/gpt2": "name_or_path: {work}/gpt2"},
        words=(
            "--data.init_args.num_train=64",
            "--data.init_args.num_val=48",
            "--data.init_args.batch_size=16",
            "--data.init_args.names=3",
        ),
        why="112 prompts of 3 names, batch of 16: GPT-2 runs over all of them, and once more for each edit",
        prepare=gpt2,
        needs=("transformers",),
    ),
    "shrinkmatch_cifar": Recipe(),
    "shrinkmatch_stl10": Recipe(words=("--data.init_args.batch_size=8",), why=f"batch of 8 + 56: {SMALL_BATCH}"),
    "shrinkmatch_svhn": Recipe(),
    "simmatchv2_imagenet": Recipe(
        words=("--model.init_args.num_labelled=150", "--data.init_args.batch_size=2"),
        why=f"num_labelled 150: that many the tiny list has, and the module refuses another number; batch of 2 + 10: {SMALL_BATCH}",
    ),
    "slct_celebahq": LATENTS,
    "slct_celebahq_dit": replace(
        LATENTS,
        words=(
            "--data.init_args.batch_size=2",
            "--data.init_args.val_batch_size=4",
            "--data.init_args.num_samples=4",
            "--model.init_args.network.init_args.config.num_layers=2",
        ),
        why="batch of 2, 4 samples, 2 blocks: the network takes minutes a step on two cores",
    ),
    "sparse_frontier_qwen": Recipe(
        {
            "name_or_path: /models/qwen2.5-7b-instruct": "name_or_path: {work}/llama",
            "tokenizer: /models/qwen2.5-7b-instruct": "tokenizer: null",
        },
        words=("--data.init_args.length=2048", "--data.init_args.samples=2", "--model.init_args.max_new_tokens=8"),
        why="2 prompts of 2,048 bytes, replies of 8: 16,384 tokens take minutes on two cores",
        prepare=lambda work: llama(work, vocab_size=256),
        needs=("transformers",),
        evaluated=True,
    ),
    "sparse_ift_cifar": Recipe(),
    "sparse_retriever_msmarco": Recipe(
        {"/models/co-condenser-marco": "{work}/bert"}, prepare=masked_language_models, needs=("transformers",)
    ),
    "sparse_retriever_pretrain": Recipe(
        {
            "/models/distilbert-base-uncased": "{work}/bert",
            "/models/gte-large-en-v1.5": "{work}/bert",
            "/models/opensearch-neural-sparse-encoding-v1": "{work}/bert",
        },
        prepare=masked_language_models,
        needs=("transformers",),
    ),
    "sparse_ift_imagenet": batch(8),
    "sparse_model_soups_cifar": batch(16),
    "sparse_model_soups_imagenet": batch(8),
    "sparseland_resnet50": batch(8),
    "sparsejepa_cifar100": batch(8),
    "sam3d_weak_scannet": batch(2),
    "superflow_finetune": DOWNSTREAM,
    "superflow_kitti_1": DOWNSTREAM,
    "superflow_probe": DOWNSTREAM,
    "superflow_semi": DOWNSTREAM,
    "superflow_vits": Recipe({"weights: null": "weights: random"}),
    "ssvi_cifar": batch(8),
    "supervised_dictionary_learning_mnist": Recipe(),
    "supervised_dictionary_learning_postings": Recipe(),
    "tcm_cub": Recipe(RANDOM, words=("--data.init_args.classes_per_batch=4",), why=f"4 classes a batch: {SMALL_BATCH}"),
    "top_afa_gpt2": Recipe(words=("--data.init_args.batch_size=32",), why="batch of 32: a tiny release has few activations"),
}
UNTRIED: dict[str, str] = {}  # files that can't be started here, with the reason
