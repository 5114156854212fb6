"""The pure cores of all techniques in one place, for a bare PyTorch loop: tensors in, tensors out. Nothing is implemented here."""

from lit_methods.callbacks.ema import cosine_decay, ema_update, half_life_decay, warmup_decay
from lit_methods.callbacks.sparsity.adams import adam_update_, ast_momentum, decay_share, decayed_momentum
from lit_methods.callbacks.sparsity.cast import finalized_weight, scaled_weight
from lit_methods.callbacks.sparsity.channels import load_pruned, prune_channels
from lit_methods.callbacks.sparsity.density import exact_counts, layer_density
from lit_methods.callbacks.sparsity.drop_grow import drop_below_threshold, drop_smallest, grow, update_mask
from lit_methods.callbacks.sparsity.dynamics import itop_rate, mask_change
from lit_methods.callbacks.sparsity.flops import gradual_training_flops, training_flops
from lit_methods.callbacks.sparsity.masks import is_nm, keep_largest, nm_mask, random_mask
from lit_methods.callbacks.sparsity.progressive_gradient_flow import decay_pruned, flow_factor, masked_weight
from lit_methods.callbacks.sparsity.schedules import cosine_drop, cubic_sparsity, exponential_drop
from lit_methods.callbacks.sparsity.scores import grasp_scores, kept_masks, kept_shares, snip_scores
from lit_methods.callbacks.sparsity.self_distillation import distillation_loss, kl_to_teacher
from lit_methods.callbacks.sparsity.sparse_ift import (
    doped_rank,
    factorized_width,
    folded_frobenius,
    iso_flop_transform,
    parallel_branches,
    spectral_gap,
    wide_width,
)
from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, square_root_levels
from lit_methods.consistency_models.levels import boundary_scalings, inverse_gap, karras_levels, lognormal_probabilities
from lit_methods.consistency_models.metrics import cauchy, geman_mcclure, pseudo_huber
from lit_methods.consistency_models.pairs import consistency_function, consistency_pair_loss
from lit_methods.consistency_models.sampling import multistep_sample
from lit_methods.lidar.superflow.core import (
    dense_cloud,
    dense_to_sparse_loss,
    effective_rank,
    flip_cameras,
    group_mean,
    info_nce,
    look_up_pairs,
    lovasz_softmax,
    pool_pixels,
    pool_points,
    project_points,
    resize_pairs,
    resize_superpixels,
    segmentation_losses,
    superflow_losses,
    superpixel_groups,
    temporal_vote,
    to_batch_rows,
    voxelize,
)

__all__ = [
    "adam_update_",
    "ast_momentum",
    "boundary_scalings",
    "cauchy",
    "consistency_function",
    "consistency_pair_loss",
    "cosine_decay",
    "cosine_drop",
    "ct_teacher_decay",
    "cubic_sparsity",
    "decay_pruned",
    "decay_share",
    "decayed_momentum",
    "dense_cloud",
    "dense_to_sparse_loss",
    "distillation_loss",
    "doped_rank",
    "doubling_levels",
    "drop_below_threshold",
    "drop_smallest",
    "effective_rank",
    "ema_update",
    "exact_counts",
    "exponential_drop",
    "factorized_width",
    "finalized_weight",
    "flip_cameras",
    "flow_factor",
    "folded_frobenius",
    "geman_mcclure",
    "gradual_training_flops",
    "grasp_scores",
    "group_mean",
    "grow",
    "half_life_decay",
    "info_nce",
    "inverse_gap",
    "is_nm",
    "iso_flop_transform",
    "itop_rate",
    "karras_levels",
    "keep_largest",
    "kept_masks",
    "kept_shares",
    "kl_to_teacher",
    "layer_density",
    "load_pruned",
    "lognormal_probabilities",
    "look_up_pairs",
    "lovasz_softmax",
    "mask_change",
    "masked_weight",
    "multistep_sample",
    "nm_mask",
    "parallel_branches",
    "pool_pixels",
    "pool_points",
    "project_points",
    "prune_channels",
    "pseudo_huber",
    "random_mask",
    "resize_pairs",
    "resize_superpixels",
    "scaled_weight",
    "segmentation_losses",
    "snip_scores",
    "spectral_gap",
    "square_root_levels",
    "superflow_losses",
    "superpixel_groups",
    "temporal_vote",
    "to_batch_rows",
    "training_flops",
    "update_mask",
    "voxelize",
    "warmup_decay",
    "wide_width",
]
