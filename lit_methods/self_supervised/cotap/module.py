"""CoTAP as a LightningModule: a student that follows an averaged teacher in similarities, assignments of patches and of images.

Maths, paper and origin: :mod:`~lit_methods.self_supervised.cotap.core`.
"""

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.averages import cosine_decay, ema_update, state_tensors
from lit_methods.catalog import Technique
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import own_seed
from lit_methods.self_supervised.cotap.core import (
    ContinuousAP,
    aligned_cross_entropy,
    continuous_ap_loss,
    crop_cross_entropy,
    foreground,
    image_cross_entropy,
    matches,
    other_images,
    pooled_rows,
    prototype_entropy,
    similarity_list,
    sinkhorn,
    spherical_kmeans,
    strongest_patches,
)
from lit_methods.self_supervised.cotap.networks import CoTAPNetwork, Encoded, FeatureQueue, ObjectBank
from lit_methods.self_supervised.jepa import weight_decay_at
from lit_methods.self_supervised.probe import linear_probe, linear_segmentation, nearest_neighbours, rank_correlation
from lit_methods.steps import log_global, logs_now, training_length

if TYPE_CHECKING:
    from typing_extensions import Self

TECHNIQUE = Technique(
    slug="cotap",
    short="CoTAP",
    title="Semantic Concentration for Self-Supervised Dense Representations Learning",
    arxiv="2509.09429",
    family="self_supervised",
    form="module",
    classes=(
        "lit_methods.CoTAP",
        "lit_methods.ObjectAwareViT",
        "lit_methods.callbacks.ContinuousAPLoss",
        "lit_methods.SimilarityRegression",
    ),
    configs=("cotap.yaml", "continuous_ap.yaml"),
    golden=("cotap_loss", "sinkhorn", "object_filter", "image_ce", "prototype_entropy"),
    claim="With a fifth of the target similarities replaced by random ones, the continuous average-precision loss ranks the most similar "
    "tenth of held-out items better than squared error.",
    summary="Post-trains a vision transformer so that similarities of patches rank as a teacher's do, through a filter of learned objects.",
)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CoTAP(Evaluated):
    """Post-trains a vision transformer for dense features: patches of one kind come together, within an image and between neighbours.

    A student sees coloured crops, its moving average, the teacher, plain ones. The loss is the sum of five, each with weight 1 by default:

    1. ``rank``: the cosines between an image's strongest patches and those of a neighbour image and of other images rank as the teacher's
       do (:func:`~lit_methods.self_supervised.cotap.core.continuous_ap_loss`), one list for the batch.
    2. ``crop``: patches of one crop tell the teacher's assignments at the same places of another one.
    3. ``cls_crop``: class tokens of crops tell the teacher's assignments of other crops of the image.
    4. ``cls_image``: and those of the neighbour image's crops.
    5. ``entropy``: each object prototype of the encoder's filter stands for few of the last 1,024 pooled images.

    Assignments are balanced over the batch and a queue of past scores. ``forward`` gives (B, 2 d) features of the class token and
    ``patch_features`` (B, 2 d, h, w) of the patches, of the student: what is evaluated.

    Runs: batches of :class:`~lit_methods.datamodules.NeighbourCropsDataModule`. All ranks count as one: lists, queues, assignments, bank.
    When the bank is full for the first time its k-means centres become the object prototypes. In validation, features of the images marked
    ``fit`` train a linear segmentation, a linear classifier and nearest neighbours, which the others judge.

    Saves: student, teacher, both queues and the bank.

    Refuses: a training without an end, unless ``total_steps`` is given; an encoder of another kind; batches without crops.

    Args:
        encoder: Such as :class:`ObjectAwareViT`.
        patch_prototypes: Prototypes that patches are assigned to.
        cls_prototypes: Prototypes that class tokens are assigned to.
        head_hidden: Numbers in the hidden layers of the two heads.
        head_width: Numbers that the heads compare with their prototypes.
        patch_queue: Past scores of patches, of all ranks.
        cls_queue: Past scores of class tokens, of all ranks.
        patches_per_step: At most so many patches of a step go to their queue, as many of each crop, foreground first.
        bank: Pooled images that object prototypes are compared with.
        bank_per_step: At most so many of a step go to the bank once it is full.
        pool_sizes: Sides of the grids on which similarities are compared, in patches.
        top_patches: Patches of an image that are compared.
        others: Other images that each image is compared with.
        tau: Distance of similarities from which a pair that ranks rightly costs nothing.
        rank_weight: Factor of ``rank``; 0 leaves it out.
        patch_sinkhorn: Temperature of the patches' assignments.
        cls_sinkhorn: Temperature of the class tokens' assignments.
        temperature: Of the student's scores against assignments of its own image.
        image_temperature: Of the student's scores against assignments of the neighbour image.
        entropy_temperature: Of the cosines between object prototypes and bank.
        gather_ranks: Similarities of all ranks make one list; False: each rank has a list of its own, as in the authors' code.
        momentum: Of the teacher at the first step and at the last, along half a cosine.
        learning_rate: Of the encoder, falling along half a cosine to a tenth.
        head_learning_rate: Of the heads.
        weight_decay: AdamW's weight decay at the start; biases and norms have none.
        final_weight_decay: And at the end, along half a cosine.
        total_steps: Optimiser steps over which the schedules go; None: the length of the training.
        seed: Of the choice of other images, queue's patches and centres.

    Raises:
        ValueError: An argument outside its range, or an encoder that doesn't fit.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("What patches see", "cotap/patches", note="Image, its objects by colour, similarity to the patch in the middle."),
        Curve("Losses", tuple(f"cotap/{name}" for name in ("rank", "crop", "cls_crop", "cls_image", "entropy"))),
        Curve("Linear segmentation", ("cotap/val_miou",), note="Mean IoU of a linear classifier on fixed patch features.", goal="max"),
        Curve("Classification", ("cotap/val_linear", "cotap/val_neighbours"), note="On fixed features of the class token.", goal="max"),
        Curve("Rank correlation of similarities", ("cotap/spearman",), note="Of the student's with the teacher's.", goal="max"),
        Curve("Teacher's similarity", ("cotap/teacher_match", "cotap/teacher_other"), note="Of neighbours, and of other images."),
        Curve("Student's similarity", ("cotap/student_match", "cotap/student_other")),
        Curve("PN / PP of the list", ("cotap/pn_pp",), note="Mean; 0: perfect order with distance tau."),
        Curve("Use of the patches' prototypes", ("cotap/usage",), note="Entropy of the mean assignment, as a share of the highest."),
        Curve("Fill of queues and bank", ("cotap/patch_queue", "cotap/cls_queue", "cotap/bank")),
        Curve("Momentum of the teacher", ("cotap/momentum",)),
    )

    def __init__(
        self,
        encoder: nn.Module,
        patch_prototypes: int = 512,
        cls_prototypes: int = 4096,
        head_hidden: int = 2048,
        head_width: int = 256,
        patch_queue: int = 262_144,
        cls_queue: int = 32_768,
        patches_per_step: int = 2048,
        bank: int = 1024,
        bank_per_step: int = 32,
        pool_sizes: tuple[int, ...] = (7, 14),
        top_patches: int = 5,
        others: int = 5,
        tau: float = 0.5,
        rank_weight: float = 1.0,
        patch_sinkhorn: float = 0.05,
        cls_sinkhorn: float = 0.07,
        temperature: float = 0.1,
        image_temperature: float = 0.2,
        entropy_temperature: float = 0.1,
        gather_ranks: bool = True,
        momentum: tuple[float, float] = (0.9997, 0.9999),
        learning_rate: float = 3e-5,
        head_learning_rate: float = 3e-4,
        weight_decay: float = 0.024,
        final_weight_decay: float = 0.24,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        missing = [name for name in ("width", "patch_size", "prototypes") if not hasattr(encoder, name)]
        if missing:
            raise ValueError(
                f"encoder is a {type(encoder).__name__} without {' and '.join(missing)}: expected a vision transformer with the "
                "object-aware filter, such as ObjectAwareViT"
            )
        checks.at_least(1, patch_prototypes=patch_prototypes, cls_prototypes=cls_prototypes, head_hidden=head_hidden, head_width=head_width)
        checks.at_least(1, patch_queue=patch_queue, cls_queue=cls_queue, patches_per_step=patches_per_step, bank=bank)
        checks.at_least(1, bank_per_step=bank_per_step, top_patches=top_patches, others=others, total_steps=total_steps)
        for side in pool_sizes:
            checks.at_least(1, pool_sizes=side)
        checks.positive(tau=tau, patch_sinkhorn=patch_sinkhorn, cls_sinkhorn=cls_sinkhorn, temperature=temperature)
        checks.positive(image_temperature=image_temperature, entropy_temperature=entropy_temperature)
        checks.positive(learning_rate=learning_rate, head_learning_rate=head_learning_rate)
        checks.at_least(0, rank_weight=rank_weight, weight_decay=weight_decay, final_weight_decay=final_weight_decay, seed=seed)
        checks.share(**{f"momentum[{place}]": value for place, value in enumerate(momentum)})
        if not pool_sizes or len(momentum) != 2:
            raise ValueError(f"pool_sizes={pool_sizes} and momentum={momentum}: give one side at least, and two momenta")
        self.save_hyperparameters(ignore=["encoder"])
        known: Any = encoder  # whose attributes were looked for above
        self.student = CoTAPNetwork(encoder, patch_prototypes, cls_prototypes, head_hidden, head_width)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.patch_queue, self.cls_queue = FeatureQueue(patch_queue, (patch_prototypes,)), FeatureQueue(cls_queue, (cls_prototypes,))
        self.bank = ObjectBank(bank, tuple(known.prototypes.shape[1:]))
        self._length = 1  # of the schedules, in optimiser steps
        self._seen: list[dict[str, Tensor]] = []  # features and labels of this evaluation
        self._shown: tuple[Tensor, Encoded] | None = None

    def train(self, mode: bool = True) -> "Self":
        """The teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    # ---- features ------------------------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, 2 d) features of the student's class token."""
        return self.student.encoder(images).cls

    def patch_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, 2 d, h, w) features of the student's patches."""
        return self.student.encoder(images).maps()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``feature`` (B, 2 d), ``patches`` (B, 2 d, h, w), and ``label`` where the batch has one."""
        found = self.student.encoder(batch["image"])
        return {"feature": found.cls, "patches": found.maps()} | ({"label": batch["label"]} if "label" in batch else {})

    # ---- the five losses -----------------------------------------------------------------------------------------------------------------

    def _noise(self, what: str, batch_idx: int, *shape: int) -> Tensor:
        """Uniform noise that follows from seed, step and batch alone, the same on every rank."""
        generator = torch.Generator().manual_seed(own_seed(f"CoTAP {what} step {self.global_step} batch {batch_idx}", self.hparams["seed"]))
        return torch.rand(shape, generator=generator).to(self.device, non_blocking=True)

    @staticmethod
    def _gather(rows: Tensor) -> Tensor:
        return distributed.gather_rows(rows, with_grad=False)

    def _assigned(self, queue: FeatureQueue, scores: Tensor, temperature: float) -> Tensor:
        """Assignments of (N, K) scores, balanced over the batches and the queue of all ranks; each takes its part of the queue along."""
        past = queue.values().tensor_split(distributed.world_size())[distributed.rank()]
        gather = self._gather if distributed.world_size() > 1 else None
        return sinkhorn(torch.cat([past, scores.to(past.dtype)]), temperature, gather=gather)[len(past) :]

    def _rank(self, teacher: Tensor, student: Tensor, masks: Tensor, batch_idx: int) -> tuple[Tensor, list[tuple[Any, ...]]]:
        """The loss of the ranking, mean over the grids, and of each grid the list with its parts. (B, 2, G, K, h, w) scores of both."""
        hp, gathers = self.hparams, self.hparams["gather_ranks"]
        total = wide(student.new_zeros(()))
        lists: list[tuple[Any, ...]] = []
        for pool in hp["pool_sizes"]:
            rows = []
            for scores, with_grad in ((teacher, False), (student, True)):
                for place in (0, 1):  # the image, its positive image
                    chosen = pooled_rows(scores[:, place], strongest_patches(masks[:, place], pool, hp["top_patches"]), pool)
                    rows.append(distributed.gather_rows(chosen, with_grad=with_grad) if gathers else chosen)
            images, kept = rows[0].shape[:2]
            order = other_images(hp["others"], images, self._noise(f"others {pool}", batch_idx, hp["others"], images))
            targets, similarity = similarity_list(rows[0], rows[1], order), similarity_list(rows[2], rows[3], order)
            match = matches(images, hp["others"], kept, self.device)
            found = continuous_ap_loss(targets, similarity, match, hp["tau"])
            total = total + found.loss / len(hp["pool_sizes"])
            lists.append((targets, similarity, match, found))
        return total, lists

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        hp = self.hparams
        if "patch_global" not in batch or "cls_global" not in batch:
            raise ValueError(
                f"the batch has {', '.join(batch)}: CoTAP trains on crops of two streams, as NeighbourCropsDataModule gives them"
            )
        if self.bank.full and not self.bank.clustered:
            self._cluster()
        size, _, crops = batch["patch_global"].shape[:3]
        images = size * 2 * crops  # of one stream, global crops of images and their positives
        form = (size, 2, crops)

        def joined(name: str) -> Tensor:
            return torch.cat([batch[f"{stream}_{name}"].flatten(0, 2) for stream in ("patch", "cls")])

        with torch.no_grad():
            seen = self.teacher.encoder(joined("global"), look=True)
            patch_targets = wide(self.teacher.patch_scores(seen, images))
            cls_targets = wide(self.teacher.cls_head(seen.cls[images:]))
            masks = foreground(seen.attention[:images]).unflatten(0, form)
        found = self.student.encoder(joined("student"))
        scores = self.student.patch_scores(found, images).unflatten(0, form)
        local = self.student.encoder(joined("local"))
        locals_of = len(local.cls) // 2
        views = locals_of // (2 * size)
        local_scores = self.student.patch_scores(local, locals_of).unflatten(0, (2 * size, views))
        cls_scores = self.student.cls_head(torch.cat([found.cls[images:], local.cls[locals_of:]]))
        crop_scores, local_cls = cls_scores[:images].unflatten(0, form), cls_scores[images:].unflatten(0, (2 * size, views))
        with torch.no_grad():
            height, width = self.bank.rows.shape[-2:]
            pooled = nn.functional.adaptive_avg_pool2d(wide(found.before[images:]), (height, width))
            self._keep_pooled(pooled, batch_idx)

        rank, lists = self._rank(patch_targets.unflatten(0, form), scores, masks, batch_idx)
        entropy = prototype_entropy(self.student.encoder.prototypes, self.bank.values(), hp["entropy_temperature"])
        flat = patch_targets.permute(0, 2, 3, 1)  # (images, h, w, K)
        if len(self.patch_queue):
            assigned = self._assigned(self.patch_queue, flat.flatten(0, 2), hp["patch_sinkhorn"])
            maps = assigned.unflatten(0, (2 * size, crops, *seen.grid)).permute(0, 1, 4, 2, 3)
            boxes = batch["patch_boxes"].flatten(0, 1) / self.student.encoder.patch_size
            places = masks.flatten(0, 1), boxes, hp["temperature"]
            crop = aligned_cross_entropy(maps, scores.flatten(0, 1), local_scores, *places, mean_count=self._mean_count)
            cls_assigned = self._assigned(self.cls_queue, cls_targets, hp["cls_sinkhorn"]).unflatten(0, form)
            every = torch.cat([crop_scores.flatten(0, 1), local_cls], dim=1)
            cls_crop = crop_cross_entropy(cls_assigned.flatten(0, 1), every, hp["temperature"])
            sides = (cls_assigned[:, 0], cls_assigned[:, 1], crop_scores[:, 0], crop_scores[:, 1])
            cls_image = image_cross_entropy(*sides, hp["image_temperature"])
            usage = assigned.mean(0)
            self.log("cotap/usage", -(usage * usage.clamp(min=1e-12).log()).sum() / np.log(max(len(usage), 2)), batch_size=size)
        else:  # nothing to balance over yet; the heads take part for the sake of DDP, which expects gradients of all
            crop, cls_crop, cls_image = (0 * wide(part).sum() for part in (local_scores, local_cls, crop_scores))
        self._keep_scores(flat, cls_targets, masks.flatten(0, 2), batch_idx)

        losses = {"rank": rank, "crop": crop, "cls_crop": cls_crop, "cls_image": cls_image, "entropy": entropy}
        self.log_dict({f"cotap/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        if logs_now(self):
            self._log_similarities(lists, size)
        return hp["rank_weight"] * rank + crop + cls_crop + cls_image + entropy

    @staticmethod
    def _mean_count(counts: Tensor) -> Tensor:
        """Places that count, 1 at least over all ranks, as their mean over the ranks."""
        return distributed.sum_over_ranks(counts).clamp(min=1) / distributed.world_size()

    # ---- queues, bank, object prototypes -------------------------------------------------------------------------------------------------

    def _keep_pooled(self, pooled: Tensor, batch_idx: int) -> None:
        """New rows of the bank, of all ranks: all of them until it is full, then some."""
        rows = self._gather(pooled)
        order = self._noise("bank", batch_idx, len(rows)).argsort()
        self.bank.push(rows[order[: self.hparams["bank_per_step"]] if self.bank.full else order])

    def _keep_scores(self, patches: Tensor, cls: Tensor, masks: Tensor, batch_idx: int) -> None:
        """New rows of both queues: of each crop equally many patches, foreground before background, and all class tokens."""
        crops, world = len(patches), distributed.world_size()
        keys = self._noise("queue", batch_idx, world * crops, *masks.shape[1:])[distributed.rank() * crops :][:crops]
        each = max(1, self.hparams["patches_per_step"] // (world * crops))
        chosen = (masks + keys).flatten(1).topk(min(each, keys[0].numel()), dim=1).indices
        rows = patches.flatten(1, 2).gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1])).flatten(0, 1)
        self.patch_queue.push(self._gather(rows)[: self.hparams["patches_per_step"]])
        self.cls_queue.push(self._gather(cls))

    @torch.no_grad()
    def _cluster(self) -> None:
        """The bank's k-means centres become the object prototypes of student and teacher."""
        prototypes = self.student.encoder.prototypes
        generator = torch.Generator().manual_seed(own_seed("CoTAP centres", self.hparams["seed"]))
        centres = spherical_kmeans(self.bank.values(), len(prototypes), generator).to(prototypes.dtype)
        distributed.broadcast_tensors([centres])
        for network in (self.student, self.teacher):
            network.encoder.prototypes.copy_(centres)
        self.bank.mark_clustered()

    # ---- logs and evaluation -------------------------------------------------------------------------------------------------------------

    def _log_similarities(self, lists: list[tuple[Any, ...]], size: int) -> None:
        targets, similarity, match = (torch.cat([part[k] for part in lists]) for k in range(3))
        parts: list[ContinuousAP] = [part[3] for part in lists]
        values: dict[str, Any] = {}
        for name, chosen in (("match", match), ("other", ~match)):
            for who, list_ in (("teacher", targets), ("student", similarity.detach())):
                values[f"{who}_{name}"] = (list_ * chosen).sum() / chosen.sum()
        values["spearman"] = rank_correlation(targets, similarity.detach())
        values["pn_pp"] = torch.cat([part.pn.detach() / part.pp for part in parts]).mean()
        values["momentum"] = self.momentum()
        fills = {"patch_queue": self.patch_queue, "cls_queue": self.cls_queue, "bank": self.bank}
        values |= {name: len(queue) / len(queue.rows) for name, queue in fills.items()}
        self.log_dict({f"cotap/{name}": value for name, value in values.items()}, batch_size=size)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        found = self.student.encoder(batch["image"])
        if not self._seen:
            self._shown = batch["image"][:4].detach(), found._make(part[:4] if isinstance(part, Tensor) else part for part in found)
        self._seen.append({"cls": found.cls.float(), "patches": found.maps().float()} | {k: batch[k] for k in ("mask", "label", "fit")})

    def _log_evaluation(self, part: Part) -> None:
        seen, self._seen = self._seen, []
        if not seen or self.trainer.sanity_checking:
            return
        data = {name: self._gather(torch.cat([one[name] for one in seen])) for name in seen[0]}
        if self._shown is not None:
            self._media = {"cotap/patches": self._picture(*self._shown)}
        figures: dict[str, Tensor] = {}
        fit = data["fit"]
        masked, labelled = (data["mask"] >= 0).flatten(1).any(1), data["label"] >= 0
        if (masked & fit).any() and (masked & ~fit).any():
            known, asked = masked & fit, masked & ~fit
            figures["miou"] = linear_segmentation(data["patches"][known], data["mask"][known], data["patches"][asked], data["mask"][asked])
        if (labelled & fit).any() and (labelled & ~fit).any():
            known, asked = labelled & fit, labelled & ~fit
            shared = data["cls"][known], data["label"][known], data["cls"][asked], int(data["label"].max()) + 1
            for name, judge in (("linear", linear_probe), ("neighbours", nearest_neighbours)):
                figures[name] = (judge(*shared).argmax(1) == data["label"][asked]).float().mean()  # type: ignore[operator]
        log_global(self, {f"cotap/{part}_{name}": value for name, value in figures.items()}, prog_bar=True)

    def _picture(self, images: Tensor, found: Encoded) -> ImageMedia:
        """Rows: images. Columns: the image, the most attended object of each patch as a colour, cosines with the patch in the middle."""
        maps = nn.functional.normalize(found.maps().float(), dim=1)
        middle = maps[:, :, found.grid[0] // 2, found.grid[1] // 2]
        cosines = torch.einsum("bdhw,bd->bhw", maps, middle).clamp(0, 1)[..., None].expand(-1, -1, -1, 3)
        objects = found.objects.mean(1).argmax(-1).unflatten(1, found.grid)
        colours = torch.rand(found.objects.shape[-1], 3, generator=torch.Generator().manual_seed(0)).to(objects.device)[objects]
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        tiles = [((images.float() - low) / (high - low).clamp(min=1e-6)), colours.permute(0, 3, 1, 2), cosines.permute(0, 3, 1, 2)]
        tiles = [nn.functional.interpolate(tile, size=images.shape[-2:], mode="nearest") for tile in tiles]
        picture = torch.cat([torch.cat(list(tile), dim=1) for tile in tiles], dim=2).permute(1, 2, 0)
        pixels = (255 * picture).byte().cpu().numpy()
        scale = max(1, 96 // images.shape[-1])
        return ImageMedia(
            np.ascontiguousarray(pixels.repeat(scale, 0).repeat(scale, 1)),
            f"{len(images)} images, which object each of their patches attends to, and how similar patches are to the one in the middle",
        )

    def dashboard_media(self) -> dict[str, Media]:
        """The picture of the last evaluation."""
        return self._media

    # ---- optimiser -----------------------------------------------------------------------------------------------------------------------

    def momentum(self) -> float:
        """The teacher's momentum at the optimiser step that comes next."""
        start, end = self.hparams["momentum"]
        return start + (end - start) * cosine_decay(self.global_step, self._length, 0.0)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with two learning rates, each for weights with decay and without."""
        hp = self.hparams
        self._length = training_length(self, hp["total_steps"], what="the schedule of CoTAP")
        groups: list[dict[str, Any]] = []
        for head in (False, True):
            named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad and n.startswith("encoder.") != head]
            bare = [parameter for name, parameter in named if name.endswith("bias") or parameter.ndim < 2]
            decayed = [parameter for name, parameter in named if not (name.endswith("bias") or parameter.ndim < 2)]
            rate = hp["head_learning_rate"] if head else hp["learning_rate"]
            groups.append({"params": decayed, "lr": rate, "decays": True, "weight_decay": hp["weight_decay"]})
            groups.append({"params": bare, "lr": rate, "decays": False, "weight_decay": 0.0})
        return scheduled(torch.optim.AdamW(groups), lambda step: warmup_cosine(step, self._length, final=0.1))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """The step's weight decay first; the teacher follows at once, so that a checkpoint saved when the batch ends has it."""
        hp, momentum = self.hparams, self.momentum()
        for group in optimizer.param_groups:
            if group.get("decays"):
                group["weight_decay"] = weight_decay_at(self.global_step + 1, self._length, hp["weight_decay"], hp["final_weight_decay"])
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        ema_update(state_tensors(self.teacher), state_tensors(self.student), momentum)


__all__ = ["CoTAP"]
