"""The picture of The Sparse Frontier: which keys the six methods keep in a trained model, one square each."""

from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SIDE = 1152, 800, 320  # pixels
BACKGROUND, TEXT, NOTE = (13, 20, 33), (214, 222, 235), (140, 155, 180)
DARK, BRIGHT = torch.tensor([34.0, 46.0, 72.0]), torch.tensor([255.0, 196.0, 64.0])
TOKENS, DECODED, HEAD = 512, 64, 0


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparse_frontier.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(20), ImageFont.load_default(14)
    for number, (name, (note, mask)) in enumerate(masks(*queries_and_keys(run)).items()):
        x, y = 40 + number % 3 * (SIDE + 50), 16 + number // 3 * (SIDE + 72)
        pen.text((x, y), name, font=font, fill=TEXT)
        pen.text((x, y + 24), note, font=small, fill=NOTE)
        shares = torch.nn.functional.interpolate(mask.float()[None, None], (SIDE, SIDE), mode="area")[0, 0]
        pixels = (DARK + shares[..., None] * (BRIGHT - DARK)).round().to(torch.uint8)
        canvas.paste(Image.fromarray(pixels.numpy()), (x, y + 46))
    return canvas


def queries_and_keys(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the second layer, over texts of the run that stand one behind the other."""
    from lit_methods import LongContextLM
    from lit_methods.datamodules import TokenTasksDataModule
    from lit_methods.sparse_attention.attention import AttentionSwap
    from lit_methods.sparse_attention.method import AttentionCall, SparseAttention

    class Listener(SparseAttention):
        def compress(self, q: torch.Tensor, k: torch.Tensor, call: AttentionCall) -> None:
            if call.layer == 1:
                seen.extend((q, k))

    seen: list[torch.Tensor] = []
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    module = LongContextLM(**config["model"]["init_args"])
    module.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    data = TokenTasksDataModule(**config["data"]["init_args"])
    data.setup("test")
    texts = -(-TOKENS // data.length)
    tokens = torch.cat([data.test_set[index]["input_ids"] for index in range(texts)])[None, :TOKENS]
    with torch.no_grad(), AttentionSwap(Listener()).attach(module):
        module.eval()(tokens)
    return seen[0], seen[1]


def masks(q: torch.Tensor, k: torch.Tensor) -> dict[str, tuple[str, torch.Tensor]]:
    """Method -> what its rows are, and a mask (rows, keys)."""
    from lit_methods.callbacks.sparse_attention.sparse_frontier import core

    n, text = TOKENS, TOKENS - DECODED
    slashes = core.slash_blocks(*core.vertical_slash(q, k, 24, 70, 64), n)
    share = core.slash_blocks(*core.flexprefill(q, k, 0.5, 64, 64), n)
    blocks = core.chosen_blocks(core.block_sparse(q, k, 16, 8), 16, n)
    q_text, k_text = q[:, :, :text], k[:, :, :text]
    budget = {"capacity": 96, "window": 32, "kernel": 5, "local": 16, "prefix": 4}
    decoded = torch.ones(DECODED, DECODED, dtype=torch.bool).tril()
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for name, kept in (("Vertical-Slash", slashes), ("FlexPrefill", share), ("Block-Sparse", blocks)):
        found[name] = ("reading: each row is a query", kept.mask(n, n)[0, HEAD])
    for name, tokens in (("SnapKV", core.snapkv(q_text, k_text, **budget)), ("Ada-SnapKV", core.ada_snapkv(q_text, k_text, **budget))):
        found[name] = (f"the last {DECODED} tokens, one by one", torch.cat([tokens[0, HEAD].expand(DECODED, -1), decoded], 1))
    rows = []
    for length in range(text + 1, n + 1):
        pages = core.quest_pages(q[:, :, length - 1], *core.page_bounds(k[:, :, :length], 8), 12, share=True)
        rows.append(torch.zeros(n + 1, dtype=torch.bool).index_fill(0, core.page_tokens(pages, 8, length)[0, HEAD] % (n + 1), True)[:n])
    found["Quest"] = (f"the last {DECODED} tokens, one by one", torch.stack(rows))
    return found
