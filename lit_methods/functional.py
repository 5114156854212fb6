"""The pure cores of all techniques in one place, for a bare PyTorch loop: tensors in, tensors out. Nothing is implemented here."""

from lit_methods.averages import cosine_decay, ema_update, half_life_decay, warmup_decay
from lit_methods.callbacks.imbalanced_regression.conr import conr_dense_loss, conr_loss
from lit_methods.callbacks.imbalanced_regression.fds import begin_epoch as fds_begin_epoch
from lit_methods.callbacks.imbalanced_regression.fds import calibrate as fds_calibrate
from lit_methods.callbacks.imbalanced_regression.fds import moments as fds_moments
from lit_methods.callbacks.imbalanced_regression.fds import update as fds_update
from lit_methods.callbacks.metric_learning.tcm import tcm_loss
from lit_methods.callbacks.noisy_labels.adawac.core import adawac_loss, normalised_weights, update_sample_weights
from lit_methods.callbacks.noisy_labels.adele.core import corrected_labels, fit_iou_curve, merged_labels, multiscale_consistency
from lit_methods.callbacks.sparsity.cast.adams import adam_update_, ast_momentum, decay_share, decayed_momentum
from lit_methods.callbacks.sparsity.cast.core import distillation_loss, finalized_weight, kl_to_teacher, scaled_weight
from lit_methods.callbacks.sparsity.channels import load_pruned, prune_channels
from lit_methods.callbacks.sparsity.density import exact_counts, layer_density
from lit_methods.callbacks.sparsity.drop_grow import drop_below_threshold, drop_smallest, grow, update_mask
from lit_methods.callbacks.sparsity.dynamics import itop_rate, mask_change
from lit_methods.callbacks.sparsity.flops import gradual_training_flops, training_flops
from lit_methods.callbacks.sparsity.latent import masked_weight
from lit_methods.callbacks.sparsity.masks import is_nm, keep_largest, nm_mask, random_mask
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import decay_pruned, flow_factor
from lit_methods.callbacks.sparsity.schedules import cosine_drop, cubic_sparsity, exponential_drop
from lit_methods.callbacks.sparsity.scores import grasp_scores, kept_masks, kept_shares, snip_scores
from lit_methods.callbacks.sparsity.sparse_ift.core import (
    doped_rank,
    factorized_width,
    folded_frobenius,
    parallel_branches,
    spectral_gap,
    wide_width,
)
from lit_methods.callbacks.sparsity.sparse_ift.surgery import iso_flop_transform
from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, ect_lower, ect_stage, square_root_levels
from lit_methods.consistency_models.epg.core import (
    consistency_tuning_loss,
    cosine_info_nce,
    denoising_loss,
    interval_guidance,
    pretrain_levels,
    pretrain_loss,
)
from lit_methods.consistency_models.levels import boundary_scalings, inverse_gap, karras_levels, lognormal_probabilities
from lit_methods.consistency_models.metrics import cauchy, detached_pseudo_huber, geman_mcclure, perceptual, pseudo_huber
from lit_methods.consistency_models.pairs import consistency_function, consistency_pair_loss, heun_step
from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent, blockwise_attention
from lit_methods.consistency_models.rcm.core import critic_loss, dcm_loss, dmd_loss, phase_at, scm_loss, simulate, velocity_tangent
from lit_methods.consistency_models.sampling import denoise_sample, multistep_sample
from lit_methods.consistency_models.slct import adaptive_c, couple, early_diffusion_loss, is_early, slct_loss
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
from lit_methods.prompting.losses import (
    adapter_features,
    coprompt_loss,
    cosine_logits,
    embedding_consistency,
    harmonic_mean,
    warmup_cosine_rate,
)
from lit_methods.prompting.towers import run_prompted_blocks
from lit_methods.semi.alignment import align, moving_marginal
from lit_methods.semi.graph import edge_edge_loss, node_edge_loss, node_node_loss, propagate
from lit_methods.semi.shrink import certain_loss, shrink, shrunk_loss, uncertain_loss
from lit_methods.tasks.imbalanced_regression.losses import regression_loss
from lit_methods.tasks.imbalanced_regression.metrics import shot_metrics
from lit_methods.tasks.imbalanced_regression.weights import label_weights
from lit_methods.tasks.metric_learning.losses import proxy_softmax
from lit_methods.tasks.metric_learning.opis import calibration_range, opis, retrieval_scores
from lit_methods.tasks.segmentation.core import batch_dice, class_iou, sample_cross_entropy
from lit_methods.tasks.segmentation.metrics import dice_and_hd95

__all__ = [
    "adam_update_",
    "adapter_features",
    "adaptive_c",
    "adawac_loss",
    "align",
    "ast_momentum",
    "attention_with_tangent",
    "batch_dice",
    "blockwise_attention",
    "boundary_scalings",
    "calibration_range",
    "cauchy",
    "certain_loss",
    "class_iou",
    "conr_dense_loss",
    "conr_loss",
    "consistency_function",
    "consistency_pair_loss",
    "consistency_tuning_loss",
    "coprompt_loss",
    "corrected_labels",
    "cosine_decay",
    "cosine_drop",
    "cosine_info_nce",
    "cosine_logits",
    "couple",
    "critic_loss",
    "ct_teacher_decay",
    "cubic_sparsity",
    "dcm_loss",
    "decay_pruned",
    "decay_share",
    "decayed_momentum",
    "denoise_sample",
    "denoising_loss",
    "dense_cloud",
    "dense_to_sparse_loss",
    "detached_pseudo_huber",
    "dice_and_hd95",
    "distillation_loss",
    "dmd_loss",
    "doped_rank",
    "doubling_levels",
    "drop_below_threshold",
    "drop_smallest",
    "early_diffusion_loss",
    "ect_lower",
    "ect_stage",
    "edge_edge_loss",
    "effective_rank",
    "ema_update",
    "embedding_consistency",
    "exact_counts",
    "exponential_drop",
    "factorized_width",
    "fds_begin_epoch",
    "fds_calibrate",
    "fds_moments",
    "fds_update",
    "finalized_weight",
    "fit_iou_curve",
    "flip_cameras",
    "flow_factor",
    "folded_frobenius",
    "geman_mcclure",
    "gradual_training_flops",
    "grasp_scores",
    "group_mean",
    "grow",
    "half_life_decay",
    "harmonic_mean",
    "heun_step",
    "info_nce",
    "interval_guidance",
    "inverse_gap",
    "is_early",
    "is_nm",
    "iso_flop_transform",
    "itop_rate",
    "karras_levels",
    "keep_largest",
    "kept_masks",
    "kept_shares",
    "kl_to_teacher",
    "label_weights",
    "layer_density",
    "load_pruned",
    "lognormal_probabilities",
    "look_up_pairs",
    "lovasz_softmax",
    "mask_change",
    "masked_weight",
    "merged_labels",
    "moving_marginal",
    "multiscale_consistency",
    "multistep_sample",
    "nm_mask",
    "node_edge_loss",
    "node_node_loss",
    "normalised_weights",
    "opis",
    "parallel_branches",
    "perceptual",
    "phase_at",
    "pool_pixels",
    "pool_points",
    "pretrain_levels",
    "pretrain_loss",
    "project_points",
    "propagate",
    "proxy_softmax",
    "prune_channels",
    "pseudo_huber",
    "random_mask",
    "regression_loss",
    "resize_pairs",
    "resize_superpixels",
    "retrieval_scores",
    "run_prompted_blocks",
    "sample_cross_entropy",
    "scaled_weight",
    "scm_loss",
    "segmentation_losses",
    "shot_metrics",
    "shrink",
    "shrunk_loss",
    "simulate",
    "slct_loss",
    "snip_scores",
    "spectral_gap",
    "square_root_levels",
    "superflow_losses",
    "superpixel_groups",
    "tcm_loss",
    "temporal_vote",
    "to_batch_rows",
    "training_flops",
    "uncertain_loss",
    "update_mask",
    "update_sample_weights",
    "velocity_tangent",
    "voxelize",
    "warmup_cosine_rate",
    "warmup_decay",
    "wide_width",
]
