# Written by `make functional` (docs/tools/functional.py): each core's __all__, and what shared files offer.
from lit_methods.architecture_search.dass.core import architecture_gradient as architecture_gradient
from lit_methods.architecture_search.dass.core import derive_cell as derive_cell
from lit_methods.architecture_search.dass.core import mixed_operation as mixed_operation
from lit_methods.averages import cosine_decay as cosine_decay
from lit_methods.averages import ema_update as ema_update
from lit_methods.averages import half_life_decay as half_life_decay
from lit_methods.averages import linear_decay as linear_decay
from lit_methods.averages import power_decay as power_decay
from lit_methods.averages import power_exponent as power_exponent
from lit_methods.averages import warmup_decay as warmup_decay
from lit_methods.callbacks.fine_tuning.delta import base_hash as base_hash
from lit_methods.callbacks.fine_tuning.delta import fuse as fuse
from lit_methods.callbacks.fine_tuning.delta import load_delta as load_delta
from lit_methods.callbacks.fine_tuning.delta import save_delta as save_delta
from lit_methods.callbacks.fine_tuning.delta import switch as switch
from lit_methods.callbacks.fine_tuning.delta import unfuse as unfuse
from lit_methods.callbacks.fine_tuning.s2ft.core import batched_delta as batched_delta
from lit_methods.callbacks.fine_tuning.s2ft.core import fused_weight as fused_weight
from lit_methods.callbacks.fine_tuning.s2ft.core import s2_linear as s2_linear
from lit_methods.callbacks.fine_tuning.s2ft.core import select_units as select_units
from lit_methods.callbacks.fine_tuning.s2ft.core import unit_layout as unit_layout
from lit_methods.callbacks.fine_tuning.sara.core import is_reselection as is_reselection
from lit_methods.callbacks.fine_tuning.sara.core import nuclear_norm as nuclear_norm
from lit_methods.callbacks.fine_tuning.sara.core import sara_learning_rate as sara_learning_rate
from lit_methods.callbacks.fine_tuning.sara.core import small_weights as small_weights
from lit_methods.callbacks.fine_tuning.sara.core import still_small as still_small
from lit_methods.callbacks.fine_tuning.sara.core import threshold_of as threshold_of
from lit_methods.callbacks.imbalanced_regression.conr.core import conr_dense_loss as conr_dense_loss
from lit_methods.callbacks.imbalanced_regression.conr.core import conr_loss as conr_loss
from lit_methods.callbacks.imbalanced_regression.fds.core import begin_epoch as fds_begin_epoch
from lit_methods.callbacks.imbalanced_regression.fds.core import bucket_kernel as fds_bucket_kernel
from lit_methods.callbacks.imbalanced_regression.fds.core import calibrate as fds_calibrate
from lit_methods.callbacks.imbalanced_regression.fds.core import initial_state as fds_initial_state
from lit_methods.callbacks.imbalanced_regression.fds.core import moments as fds_moments
from lit_methods.callbacks.imbalanced_regression.fds.core import pooled as fds_pooled
from lit_methods.callbacks.imbalanced_regression.fds.core import update as fds_update
from lit_methods.callbacks.lidar.sam3d_weak.core import consistency_loss_of_views as consistency_loss_of_views
from lit_methods.callbacks.lidar.sam3d_weak.core import deformed_views as deformed_views
from lit_methods.callbacks.lidar.sam3d_weak.core import frozen_batch_norm as frozen_batch_norm
from lit_methods.callbacks.lidar.sam3d_weak.core import locally_deformed as locally_deformed
from lit_methods.callbacks.lidar.sam3d_weak.core import reliability_loss as reliability_loss
from lit_methods.callbacks.lidar.sam3d_weak.core import reliable_points as reliable_points
from lit_methods.callbacks.lidar.sam3d_weak.core import spread_masks as spread_masks
from lit_methods.callbacks.lidar.sam3d_weak.core import spread_pseudo_labels as spread_pseudo_labels
from lit_methods.callbacks.lidar.sam3d_weak.core import vote_winners as vote_winners
from lit_methods.callbacks.metric_learning.tcm import tcm_loss as tcm_loss
from lit_methods.callbacks.noisy_labels.adawac.core import adawac_loss as adawac_loss
from lit_methods.callbacks.noisy_labels.adawac.core import normalised_weights as normalised_weights
from lit_methods.callbacks.noisy_labels.adawac.core import update_sample_weights as update_sample_weights
from lit_methods.callbacks.noisy_labels.adele.core import corrected_labels as corrected_labels
from lit_methods.callbacks.noisy_labels.adele.core import fit_iou_curve as fit_iou_curve
from lit_methods.callbacks.noisy_labels.adele.core import merged_labels as merged_labels
from lit_methods.callbacks.noisy_labels.adele.core import multiscale_consistency as multiscale_consistency
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import ada_snapkv as ada_snapkv
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import attention_flops as attention_flops
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import block_sparse as block_sparse
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import block_sparsity as block_sparsity
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import blocks_for_sparsity as blocks_for_sparsity
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import cell_sparsity as cell_sparsity
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import chosen_blocks as chosen_blocks
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import decode_cache as decode_cache
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import decode_weights as decode_weights
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import fit_score_law as fit_score_law
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import flexprefill as flexprefill
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import held_out_fit as held_out_fit
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import largest_safe_sparsity as largest_safe_sparsity
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import page_bounds as page_bounds
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import page_tokens as page_tokens
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import pareto_front as pareto_front
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import prefill_flops as prefill_flops
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import quest_overhead as quest_overhead
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import quest_pages as quest_pages
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import relative_error as relative_error
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import slash_blocks as slash_blocks
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import slash_sums as slash_sums
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import snapkv as snapkv
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import token_index as token_index
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import vertical_slash as vertical_slash
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import vertical_slash_overhead as vertical_slash_overhead
from lit_methods.callbacks.sparse_attention.sparse_frontier.core import window_attention as sparse_frontier_window_attention
from lit_methods.callbacks.sparse_autoencoders.gba.core import bias_update as bias_update
from lit_methods.callbacks.sparse_autoencoders.gba.core import firing_statistics as firing_statistics
from lit_methods.callbacks.sparse_autoencoders.gba.core import neuron_groups as neuron_groups
from lit_methods.callbacks.sparse_autoencoders.gba.core import target_frequencies as target_frequencies
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import activity_counts as activity_counts
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import attribute_sums as attribute_sums
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import attribution_distance as attribution_distance
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import best_values as best_values
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import code_weights as code_weights
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import edit_arithmetic as edit_arithmetic
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import edit_subspace as edit_subspace
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import f1_scores as f1_scores
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import feature_order as feature_order
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import feature_weights as feature_weights
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import greedy_edit as greedy_edit
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import guided_edit as guided_edit
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import l2_distance as l2_distance
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import matched_pairs as matched_pairs
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import mean_codes as mean_codes
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import mse_codes as mse_codes
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import necessity as necessity
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import reconstruct_by_codes as reconstruct_by_codes
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import removed_weight as removed_weight
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import sufficiency as sufficiency
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import union_f1 as union_f1
from lit_methods.callbacks.sparse_autoencoders.sae_evals.core import value_order as value_order
from lit_methods.callbacks.sparsity.cast.adams import adam_update_ as adam_update_
from lit_methods.callbacks.sparsity.cast.adams import ast_momentum as ast_momentum
from lit_methods.callbacks.sparsity.cast.adams import decay_share as decay_share
from lit_methods.callbacks.sparsity.cast.adams import decayed_momentum as decayed_momentum
from lit_methods.callbacks.sparsity.cast.core import convex_loss as convex_loss
from lit_methods.callbacks.sparsity.cast.core import distillation_loss as distillation_loss
from lit_methods.callbacks.sparsity.cast.core import expand_blocks as expand_blocks
from lit_methods.callbacks.sparsity.cast.core import finalized_weight as finalized_weight
from lit_methods.callbacks.sparsity.cast.core import is_refresh_step as is_refresh_step
from lit_methods.callbacks.sparsity.cast.core import kl_to_teacher as kl_to_teacher
from lit_methods.callbacks.sparsity.cast.core import magnitude_statistics as magnitude_statistics
from lit_methods.callbacks.sparsity.cast.core import pruned_block_means as pruned_block_means
from lit_methods.callbacks.sparsity.cast.core import scaled_weight as scaled_weight
from lit_methods.callbacks.sparsity.channels import load_pruned as load_pruned
from lit_methods.callbacks.sparsity.channels import prune_channels as prune_channels
from lit_methods.callbacks.sparsity.density import exact_counts as exact_counts
from lit_methods.callbacks.sparsity.density import layer_density as layer_density
from lit_methods.callbacks.sparsity.drop_grow import drop_below_threshold as drop_below_threshold
from lit_methods.callbacks.sparsity.drop_grow import drop_smallest as drop_smallest
from lit_methods.callbacks.sparsity.drop_grow import grow as grow
from lit_methods.callbacks.sparsity.drop_grow import update_mask as update_mask
from lit_methods.callbacks.sparsity.dsnot.core import contribution as contribution
from lit_methods.callbacks.sparsity.dsnot.core import dsnot_nm as dsnot_nm
from lit_methods.callbacks.sparsity.dsnot.core import dsnot_unstructured as dsnot_unstructured
from lit_methods.callbacks.sparsity.dynamics import itop_rate as itop_rate
from lit_methods.callbacks.sparsity.dynamics import mask_change as mask_change
from lit_methods.callbacks.sparsity.flops import gradual_training_flops as gradual_training_flops
from lit_methods.callbacks.sparsity.flops import training_flops as training_flops
from lit_methods.callbacks.sparsity.group_sparsity import group_norms as group_norms
from lit_methods.callbacks.sparsity.group_sparsity import group_penalty as group_penalty
from lit_methods.callbacks.sparsity.group_sparsity import group_shrink as group_shrink
from lit_methods.callbacks.sparsity.input_statistics import input_statistics as input_statistics
from lit_methods.callbacks.sparsity.issp.core import draw_sample as draw_sample
from lit_methods.callbacks.sparsity.issp.core import fitting_pattern as fitting_pattern
from lit_methods.callbacks.sparsity.issp.core import grow_penalty as grow_penalty
from lit_methods.callbacks.sparsity.issp.core import parse_pick as parse_pick
from lit_methods.callbacks.sparsity.issp.core import pick_below_sample as pick_below_sample
from lit_methods.callbacks.sparsity.issp.core import pick_pruned as pick_pruned
from lit_methods.callbacks.sparsity.issp.core import pruned_count as pruned_count
from lit_methods.callbacks.sparsity.issp.core import shrink_ratio as shrink_ratio
from lit_methods.callbacks.sparsity.issp.core import shrink_step as shrink_step
from lit_methods.callbacks.sparsity.latent import masked_weight as masked_weight
from lit_methods.callbacks.sparsity.masks import is_nm as is_nm
from lit_methods.callbacks.sparsity.masks import keep_largest as keep_largest
from lit_methods.callbacks.sparsity.masks import nm_mask as nm_mask
from lit_methods.callbacks.sparsity.masks import random_mask as random_mask
from lit_methods.callbacks.sparsity.masksparsity.core import keep_masks as keep_masks
from lit_methods.callbacks.sparsity.masksparsity.core import load_masks as load_masks
from lit_methods.callbacks.sparsity.masksparsity.core import ot_threshold as ot_threshold
from lit_methods.callbacks.sparsity.masksparsity.core import penalty_gradient as penalty_gradient
from lit_methods.callbacks.sparsity.masksparsity.core import save_masks as save_masks
from lit_methods.callbacks.sparsity.masksparsity.core import sparse_gradient as sparse_gradient
from lit_methods.callbacks.sparsity.masksparsity.core import threshold_mask as threshold_mask
from lit_methods.callbacks.sparsity.one_shot import expected_error as expected_error
from lit_methods.callbacks.sparsity.one_shot import initial_score as initial_score
from lit_methods.callbacks.sparsity.one_shot import keep_high_scores as keep_high_scores
from lit_methods.callbacks.sparsity.one_shot import magnitude_mask as magnitude_mask
from lit_methods.callbacks.sparsity.one_shot import sparsegpt as sparsegpt
from lit_methods.callbacks.sparsity.one_shot import wanda_mask as wanda_mask
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import decay_pruned as decay_pruned
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import flow_factor as flow_factor
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import parse_pattern as parse_pattern
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import sdgf_schedule as sdgf_schedule
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import sparse_mask as sparse_mask
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import to_semi_structured as to_semi_structured
from lit_methods.callbacks.sparsity.random_search.core import best_so_far as best_so_far
from lit_methods.callbacks.sparsity.random_search.core import candidate_scores as candidate_scores
from lit_methods.callbacks.sparsity.random_search.core import effective_parameters as effective_parameters
from lit_methods.callbacks.sparsity.random_search.core import fewer as fewer
from lit_methods.callbacks.sparsity.random_search.core import kept_nodes as kept_nodes
from lit_methods.callbacks.sparsity.random_search.core import random_nodes as random_nodes
from lit_methods.callbacks.sparsity.schedules import cosine_drop as cosine_drop
from lit_methods.callbacks.sparsity.schedules import cubic_sparsity as cubic_sparsity
from lit_methods.callbacks.sparsity.schedules import exponential_drop as exponential_drop
from lit_methods.callbacks.sparsity.score_masks import pruning_phase as pruning_phase
from lit_methods.callbacks.sparsity.score_masks import scaled_scores as scaled_scores
from lit_methods.callbacks.sparsity.score_masks import score_mask as score_mask
from lit_methods.callbacks.sparsity.score_masks import scored_weight as scored_weight
from lit_methods.callbacks.sparsity.scores import grasp_scores as grasp_scores
from lit_methods.callbacks.sparsity.scores import kept_masks as kept_masks
from lit_methods.callbacks.sparsity.scores import kept_shares as kept_shares
from lit_methods.callbacks.sparsity.scores import snip_scores as snip_scores
from lit_methods.callbacks.sparsity.sparse_ift.core import base_scaling as base_scaling
from lit_methods.callbacks.sparsity.sparse_ift.core import doped_rank as doped_rank
from lit_methods.callbacks.sparsity.sparse_ift.core import factorized_width as factorized_width
from lit_methods.callbacks.sparsity.sparse_ift.core import folded_frobenius as folded_frobenius
from lit_methods.callbacks.sparsity.sparse_ift.core import parallel_branches as parallel_branches
from lit_methods.callbacks.sparsity.sparse_ift.core import spectral_gap as spectral_gap
from lit_methods.callbacks.sparsity.sparse_ift.core import wide_width as wide_width
from lit_methods.callbacks.sparsity.sparse_ift.core import width_factor as width_factor
from lit_methods.callbacks.sparsity.sparse_ift.surgery import iso_flop_transform as iso_flop_transform
from lit_methods.callbacks.sparsity.sparse_model_soups.core import diversity as diversity
from lit_methods.callbacks.sparsity.sparse_model_soups.core import ensemble_probabilities as ensemble_probabilities
from lit_methods.callbacks.sparsity.sparse_model_soups.core import greedy_selection as greedy_selection
from lit_methods.callbacks.sparsity.sparse_model_soups.core import masked_state as masked_state
from lit_methods.callbacks.sparsity.sparse_model_soups.core import nominal_sparsity as nominal_sparsity
from lit_methods.callbacks.sparsity.sparse_model_soups.core import phase_fraction as phase_fraction
from lit_methods.callbacks.sparsity.sparse_model_soups.core import pruned_masks as pruned_masks
from lit_methods.callbacks.sparsity.sparse_model_soups.core import recalibrating as recalibrating
from lit_methods.callbacks.sparsity.sparse_model_soups.core import relative_norm_drop as relative_norm_drop
from lit_methods.callbacks.sparsity.sparse_model_soups.core import retrain_rates as retrain_rates
from lit_methods.callbacks.sparsity.sparse_model_soups.core import uniform_soup as uniform_soup
from lit_methods.callbacks.sparsity.ssvi.core import active_count as active_count
from lit_methods.callbacks.sparsity.ssvi.core import removal_addition as removal_addition
from lit_methods.callbacks.sparsity.ssvi.core import removal_score as removal_score
from lit_methods.consistency_models.curricula import ct_teacher_decay as ct_teacher_decay
from lit_methods.consistency_models.curricula import doubling_levels as doubling_levels
from lit_methods.consistency_models.curricula import doubling_stage_length as doubling_stage_length
from lit_methods.consistency_models.curricula import ect_lower as ect_lower
from lit_methods.consistency_models.curricula import ect_stage as ect_stage
from lit_methods.consistency_models.curricula import square_root_levels as square_root_levels
from lit_methods.consistency_models.epg.core import consistency_temperature as consistency_temperature
from lit_methods.consistency_models.epg.core import consistency_tuning_loss as consistency_tuning_loss
from lit_methods.consistency_models.epg.core import cosine_info_nce as cosine_info_nce
from lit_methods.consistency_models.epg.core import denoising_loss as denoising_loss
from lit_methods.consistency_models.epg.core import denoising_weight as denoising_weight
from lit_methods.consistency_models.epg.core import interval_guidance as interval_guidance
from lit_methods.consistency_models.epg.core import nearest_level as epg_nearest_level
from lit_methods.consistency_models.epg.core import neighbour_labels as neighbour_labels
from lit_methods.consistency_models.epg.core import pretrain_levels as pretrain_levels
from lit_methods.consistency_models.epg.core import pretrain_loss as pretrain_loss
from lit_methods.consistency_models.epg.core import resolution_shift as resolution_shift
from lit_methods.consistency_models.evaluation import frechet_distance as frechet_distance
from lit_methods.consistency_models.evaluation import precision_recall as precision_recall
from lit_methods.consistency_models.evaluation import sliced_wasserstein as sliced_wasserstein
from lit_methods.consistency_models.levels import boundary_scalings as boundary_scalings
from lit_methods.consistency_models.levels import inverse_gap as inverse_gap
from lit_methods.consistency_models.levels import karras_levels as karras_levels
from lit_methods.consistency_models.levels import lognormal_probabilities as lognormal_probabilities
from lit_methods.consistency_models.levels import uniform_probabilities as uniform_probabilities
from lit_methods.consistency_models.metrics import cauchy as cauchy
from lit_methods.consistency_models.metrics import detached_pseudo_huber as detached_pseudo_huber
from lit_methods.consistency_models.metrics import geman_mcclure as geman_mcclure
from lit_methods.consistency_models.metrics import perceptual as perceptual
from lit_methods.consistency_models.metrics import pseudo_huber as pseudo_huber
from lit_methods.consistency_models.pairs import consistency_function as consistency_function
from lit_methods.consistency_models.pairs import consistency_pair_loss as consistency_pair_loss
from lit_methods.consistency_models.pairs import heun_step as heun_step
from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent as attention_with_tangent
from lit_methods.consistency_models.rcm.attention_jvp import blockwise_attention as blockwise_attention
from lit_methods.consistency_models.rcm.core import critic_loss as critic_loss
from lit_methods.consistency_models.rcm.core import dcm_loss as dcm_loss
from lit_methods.consistency_models.rcm.core import dmd_loss as dmd_loss
from lit_methods.consistency_models.rcm.core import phase_at as phase_at
from lit_methods.consistency_models.rcm.core import sample as rcm_sample
from lit_methods.consistency_models.rcm.core import scm_loss as scm_loss
from lit_methods.consistency_models.rcm.core import simulate as simulate
from lit_methods.consistency_models.rcm.core import velocity_tangent as velocity_tangent
from lit_methods.consistency_models.rcm.trigflow import rectified_flow as rectified_flow
from lit_methods.consistency_models.rcm.trigflow import shift_time as shift_time
from lit_methods.consistency_models.rcm.trigflow import trig_time as trig_time
from lit_methods.consistency_models.rcm.trigflow import trigflow as trigflow
from lit_methods.consistency_models.sampling import denoise_sample as denoise_sample
from lit_methods.consistency_models.sampling import multistep_sample as multistep_sample
from lit_methods.consistency_models.slct.core import adaptive_c as adaptive_c
from lit_methods.consistency_models.slct.core import couple as couple
from lit_methods.consistency_models.slct.core import early_diffusion_loss as early_diffusion_loss
from lit_methods.consistency_models.slct.core import is_early as is_early
from lit_methods.consistency_models.slct.core import remove_norm_scales as remove_norm_scales
from lit_methods.consistency_models.slct.core import slct_loss as slct_loss
from lit_methods.detection.boxes import cxcywh_to_xyxy as cxcywh_to_xyxy
from lit_methods.detection.boxes import overlaps as overlaps
from lit_methods.detection.boxes import xyxy_to_cxcywh as xyxy_to_cxcywh
from lit_methods.detection.consistencydet.core import detection_levels as detection_levels
from lit_methods.detection.consistencydet.core import detection_scalings as detection_scalings
from lit_methods.detection.consistencydet.core import nearest_level as consistencydet_nearest_level
from lit_methods.detection.consistencydet.core import noisy_pair as noisy_pair
from lit_methods.detection.consistencydet.core import renewal_step as renewal_step
from lit_methods.detection.consistencydet.core import two_level_loss as two_level_loss
from lit_methods.detection.criterion import federated_classes as federated_classes
from lit_methods.detection.criterion import focal_loss as focal_loss
from lit_methods.detection.criterion import set_losses as set_losses
from lit_methods.detection.matcher import dynamic_k_match as dynamic_k_match
from lit_methods.detection.nms import detections_of as detections_of
from lit_methods.detection.nms import suppress as suppress
from lit_methods.detection.noise import clamp_to_image as clamp_to_image
from lit_methods.detection.noise import clean_boxes as clean_boxes
from lit_methods.detection.noise import to_pixels as to_pixels
from lit_methods.detection.noise import to_signal as to_signal
from lit_methods.detection.pooling import pyramid_align as pyramid_align
from lit_methods.detection.pooling import roi_align as roi_align
from lit_methods.diffusion.cono.core import closed_share as closed_share
from lit_methods.diffusion.cono.core import content as content
from lit_methods.diffusion.cono.core import content_distance as content_distance
from lit_methods.diffusion.cono.core import content_gradient as content_gradient
from lit_methods.diffusion.cono.core import delta_of_share as delta_of_share
from lit_methods.diffusion.cono.core import extend_video as extend_video
from lit_methods.diffusion.cono.core import extending_shuffle as extending_shuffle
from lit_methods.diffusion.cono.core import internal_shuffle as internal_shuffle
from lit_methods.diffusion.cono.core import regularise as regularise
from lit_methods.diffusion.cono.core import sample_clip as sample_clip
from lit_methods.diffusion.ddc_fewshot.core import cosine_shares as cosine_shares
from lit_methods.diffusion.ddc_fewshot.core import ddc_distance as ddc_distance
from lit_methods.diffusion.ddc_fewshot.core import ddim_from as ddim_from
from lit_methods.diffusion.ddc_fewshot.core import domain_direction as domain_direction
from lit_methods.diffusion.ddc_fewshot.core import gram_distance as gram_distance
from lit_methods.diffusion.ddc_fewshot.core import gram_matrix as gram_matrix
from lit_methods.diffusion.ddc_fewshot.core import guide_structure as guide_structure
from lit_methods.diffusion.ddc_fewshot.core import intra_cluster_distance as intra_cluster_distance
from lit_methods.diffusion.ddc_fewshot.core import mix_content as mix_content
from lit_methods.diffusion.ddc_fewshot.core import pairwise_divergence as pairwise_divergence
from lit_methods.diffusion.ddc_fewshot.core import paper_weights as paper_weights
from lit_methods.diffusion.ddc_fewshot.core import phase_share as phase_share
from lit_methods.diffusion.ddc_fewshot.core import phasic_weights as phasic_weights
from lit_methods.diffusion.ddim import ddim_schedule as ddim_schedule
from lit_methods.diffusion.ddim import ddim_step as ddim_step
from lit_methods.diffusion.denoisers import denoise_of as denoise_of
from lit_methods.diffusion.denoisers import with_guidance as with_guidance
from lit_methods.diffusion.video_metrics import adjacent_similarity as adjacent_similarity
from lit_methods.diffusion.video_metrics import content_drift as content_drift
from lit_methods.diffusion.video_metrics import junction_jump as junction_jump
from lit_methods.diffusion.video_metrics import similarity_to_start as similarity_to_start
from lit_methods.diffusion.windows import covering_views as covering_views
from lit_methods.diffusion.windows import draw_block_orders as draw_block_orders
from lit_methods.diffusion.windows import fuse_windows as fuse_windows
from lit_methods.diffusion.windows import reschedule_noise as reschedule_noise
from lit_methods.diffusion.windows import window_attention as diffusion_window_attention
from lit_methods.diffusion.windows import window_views as window_views
from lit_methods.diffusion.windows import window_weights as window_weights
from lit_methods.inverse_problems.cirim.core import accumulated_loss as accumulated_loss
from lit_methods.inverse_problems.cirim.core import consistency_residual as consistency_residual
from lit_methods.inverse_problems.cirim.core import explicit_consistency as explicit_consistency
from lit_methods.inverse_problems.cirim.core import indrnn_cell as indrnn_cell
from lit_methods.inverse_problems.cirim.core import log_likelihood_gradient as log_likelihood_gradient
from lit_methods.inverse_problems.cirim.core import normalised_magnitude as normalised_magnitude
from lit_methods.inverse_problems.flair.core import adjusted_noise as adjusted_noise
from lit_methods.inverse_problems.flair.core import alpha_at as alpha_at
from lit_methods.inverse_problems.flair.core import calibrated_weights as calibrated_weights
from lit_methods.inverse_problems.flair.core import fit_data as fit_data
from lit_methods.inverse_problems.flair.core import flair_solve as flair_solve
from lit_methods.inverse_problems.flair.core import flow_matching_error as flow_matching_error
from lit_methods.inverse_problems.flair.core import guided_velocity as guided_velocity
from lit_methods.inverse_problems.flair.core import largest_pull as largest_pull
from lit_methods.inverse_problems.flair.core import nearest_time as nearest_time
from lit_methods.inverse_problems.flair.core import predicted_clean as predicted_clean
from lit_methods.inverse_problems.flair.core import predicted_noise as predicted_noise
from lit_methods.inverse_problems.flair.core import regulariser_direction as regulariser_direction
from lit_methods.inverse_problems.flair.core import regulariser_step as regulariser_step
from lit_methods.inverse_problems.flair.core import time_grid as time_grid
from lit_methods.inverse_problems.flair.core import weight_at as weight_at
from lit_methods.inverse_problems.maid.core import backtrack as backtrack
from lit_methods.inverse_problems.maid.core import error_bound as error_bound
from lit_methods.inverse_problems.maid.core import hypergradient as hypergradient
from lit_methods.inverse_problems.maid.core import probe_constants as probe_constants
from lit_methods.inverse_problems.mri import complex_product as complex_product
from lit_methods.inverse_problems.mri import estimate_maps as estimate_maps
from lit_methods.inverse_problems.mri import fft2c as fft2c
from lit_methods.inverse_problems.mri import ifft2c as ifft2c
from lit_methods.inverse_problems.mri import normalise_maps as normalise_maps
from lit_methods.inverse_problems.mri import sense_combine as sense_combine
from lit_methods.inverse_problems.mri import sense_expand as sense_expand
from lit_methods.inverse_problems.mri import sense_reduce as sense_reduce
from lit_methods.inverse_problems.operators import as_operator as as_operator
from lit_methods.inverse_problems.operators import bicubic_matrix as bicubic_matrix
from lit_methods.inverse_problems.operators import check_adjoint as check_adjoint
from lit_methods.inverse_problems.operators import gaussian_kernel as gaussian_kernel
from lit_methods.inverse_problems.operators import least_squares as least_squares
from lit_methods.inverse_problems.operators import motion_kernel as motion_kernel
from lit_methods.inverse_problems.operators import squared_norm as squared_norm
from lit_methods.lidar.contrast import effective_rank as effective_rank
from lit_methods.lidar.contrast import group_mean as group_mean
from lit_methods.lidar.contrast import info_nce as info_nce
from lit_methods.lidar.contrast import retrieval_accuracy as retrieval_accuracy
from lit_methods.lidar.lifting import link_points as link_points
from lit_methods.lidar.lifting import masks_at_points as masks_at_points
from lit_methods.lidar.lifting import smallest_masks as smallest_masks
from lit_methods.lidar.lifting import superpoints as superpoints
from lit_methods.lidar.point_losses import lovasz_softmax as lovasz_softmax
from lit_methods.lidar.point_losses import segmentation_losses as segmentation_losses
from lit_methods.lidar.projection import dense_cloud as dense_cloud
from lit_methods.lidar.projection import flip_cameras as flip_cameras
from lit_methods.lidar.projection import project_points as project_points
from lit_methods.lidar.projection import resize_pairs as resize_pairs
from lit_methods.lidar.projection import resize_superpixels as resize_superpixels
from lit_methods.lidar.superflow.core import dense_to_sparse_loss as dense_to_sparse_loss
from lit_methods.lidar.superflow.core import look_up_pairs as look_up_pairs
from lit_methods.lidar.superflow.core import pool_pixels as pool_pixels
from lit_methods.lidar.superflow.core import pool_points as pool_points
from lit_methods.lidar.superflow.core import superflow_losses as superflow_losses
from lit_methods.lidar.superflow.core import superpixel_groups as superpixel_groups
from lit_methods.lidar.superflow.core import temporal_vote as temporal_vote
from lit_methods.lidar.superflow.core import to_batch_rows as to_batch_rows
from lit_methods.lidar.voxels import voxelize as voxelize
from lit_methods.matrix_factorization.regression import best_threshold as best_threshold
from lit_methods.matrix_factorization.regression import code_columns as code_columns
from lit_methods.matrix_factorization.regression import fit_regression as fit_regression
from lit_methods.matrix_factorization.regression import linear_scores as linear_scores
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import bcd_step as bcd_step
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import search_radius as search_radius
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import update_codes as update_codes
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import update_codes_supervised as update_codes_supervised
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import update_dictionary as update_dictionary
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import alternating_codes as alternating_codes
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import exhaustive_codes as exhaustive_codes
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import predict_probability as predict_probability
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import best_low_rank as best_low_rank
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import decayed_step_size as decayed_step_size
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import lift_factors as lift_factors
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import lpgd_curvature as lpgd_curvature
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import lpgd_objective as lpgd_objective
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import lpgd_step as lpgd_step
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import recover_factors as recover_factors
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import svd_factors as svd_factors
from lit_methods.matrix_factorization.supervised_dictionary_learning.objective import factor_objective as factor_objective
from lit_methods.matrix_factorization.supervised_dictionary_learning.objective import random_factors as random_factors
from lit_methods.optim import seven_sixteenths_cosine as seven_sixteenths_cosine
from lit_methods.optim import warmup_cosine as warmup_cosine
from lit_methods.optim import warmup_cosine_rate as warmup_cosine_rate
from lit_methods.optim import warmup_then_epoch_cosine as warmup_then_epoch_cosine
from lit_methods.prompting.coprompt.core import adapter_features as adapter_features
from lit_methods.prompting.coprompt.core import coprompt_loss as coprompt_loss
from lit_methods.prompting.coprompt.core import cosine_logits as cosine_logits
from lit_methods.prompting.coprompt.core import embedding_consistency as embedding_consistency
from lit_methods.prompting.coprompt.core import harmonic_mean as harmonic_mean
from lit_methods.prompting.coprompt.core import sentence_index as sentence_index
from lit_methods.prompting.coprompt.core import sentence_table as sentence_table
from lit_methods.prompting.towers import run_prompted_blocks as run_prompted_blocks
from lit_methods.restoration.color import adain_color_fix as adain_color_fix
from lit_methods.restoration.color import wavelet_color_fix as wavelet_color_fix
from lit_methods.restoration.color import wavelet_decompose as wavelet_decompose
from lit_methods.restoration.dloral.core import cross_frame_attention as cross_frame_attention
from lit_methods.restoration.dloral.core import csd_loss as csd_loss
from lit_methods.restoration.dloral.core import empty_rows as empty_rows
from lit_methods.restoration.dloral.core import frame_difference_mask as frame_difference_mask
from lit_methods.restoration.dloral.core import has_csd as has_csd
from lit_methods.restoration.dloral.core import in_tiles as in_tiles
from lit_methods.restoration.dloral.core import restored_latent as restored_latent
from lit_methods.restoration.dloral.core import tile_starts as tile_starts
from lit_methods.restoration.dloral.core import tile_weights as tile_weights
from lit_methods.restoration.dloral.core import weighted_loss as weighted_loss
from lit_methods.restoration.interlcm.core import consistency_answer as consistency_answer
from lit_methods.restoration.interlcm.core import consistency_chain as consistency_chain
from lit_methods.restoration.interlcm.core import critic_hinge as critic_hinge
from lit_methods.restoration.interlcm.core import guidance_embedding as guidance_embedding
from lit_methods.restoration.interlcm.core import lcm_schedule as lcm_schedule
from lit_methods.restoration.interlcm.core import lcm_timesteps as lcm_timesteps
from lit_methods.restoration.interlcm.core import renoise as renoise
from lit_methods.restoration.interlcm.core import restoration_loss as restoration_loss
from lit_methods.restoration.interlcm.core import restore_from_low_quality as restore_from_low_quality
from lit_methods.retrieval.cir_uncertainty.core import augment_targets as augment_targets
from lit_methods.retrieval.cir_uncertainty.core import best_of_gallery as best_of_gallery
from lit_methods.retrieval.cir_uncertainty.core import coarse_weight as coarse_weight
from lit_methods.retrieval.cir_uncertainty.core import composed_info_nce as composed_info_nce
from lit_methods.retrieval.cir_uncertainty.core import gaussian_targets as gaussian_targets
from lit_methods.retrieval.cir_uncertainty.core import on_sphere as on_sphere
from lit_methods.retrieval.cir_uncertainty.core import precision_at as precision_at
from lit_methods.retrieval.cir_uncertainty.core import recall_at as recall_at
from lit_methods.retrieval.cir_uncertainty.core import uncertainty_loss as uncertainty_loss
from lit_methods.retrieval.idf import count_documents as count_documents
from lit_methods.retrieval.idf import idf_of_counts as idf_of_counts
from lit_methods.retrieval.ranking import margin_mse as margin_mse
from lit_methods.retrieval.ranking import pair_scores as pair_scores
from lit_methods.retrieval.ranking import ranking_info_nce as ranking_info_nce
from lit_methods.retrieval.ranking import ranking_kl as ranking_kl
from lit_methods.retrieval.sparse_retriever.core import document_weights as document_weights
from lit_methods.retrieval.sparse_retriever.core import ensemble_scores as ensemble_scores
from lit_methods.retrieval.sparse_retriever.core import flops_penalty as flops_penalty
from lit_methods.retrieval.sparse_retriever.core import quadratic_ramp as quadratic_ramp
from lit_methods.retrieval.sparse_retriever.core import query_weights as query_weights
from lit_methods.self_supervised.cotap.core import aligned_cross_entropy as aligned_cross_entropy
from lit_methods.self_supervised.cotap.core import cls_attention as cls_attention
from lit_methods.self_supervised.cotap.core import continuous_ap_loss as continuous_ap_loss
from lit_methods.self_supervised.cotap.core import crop_cross_entropy as crop_cross_entropy
from lit_methods.self_supervised.cotap.core import enqueue as enqueue
from lit_methods.self_supervised.cotap.core import foreground as foreground
from lit_methods.self_supervised.cotap.core import image_cross_entropy as image_cross_entropy
from lit_methods.self_supervised.cotap.core import object_filter as object_filter
from lit_methods.self_supervised.cotap.core import other_images as other_images
from lit_methods.self_supervised.cotap.core import pooled_rows as pooled_rows
from lit_methods.self_supervised.cotap.core import prototype_entropy as prototype_entropy
from lit_methods.self_supervised.cotap.core import similarity_list as similarity_list
from lit_methods.self_supervised.cotap.core import sinkhorn as sinkhorn
from lit_methods.self_supervised.cotap.core import spherical_kmeans as spherical_kmeans
from lit_methods.self_supervised.cotap.core import strongest_patches as strongest_patches
from lit_methods.self_supervised.jepa import jepa_loss as jepa_loss
from lit_methods.self_supervised.jepa import jepa_targets as jepa_targets
from lit_methods.self_supervised.jepa import repeat_per_context as repeat_per_context
from lit_methods.self_supervised.jepa import take_patches as take_patches
from lit_methods.self_supervised.masks import block_size as block_size
from lit_methods.self_supervised.masks import draw_block_masks as draw_block_masks
from lit_methods.self_supervised.masks import first_patches as first_patches
from lit_methods.self_supervised.networks import sincos_positions as sincos_positions
from lit_methods.self_supervised.probe import linear_probe as linear_probe
from lit_methods.self_supervised.probe import linear_segmentation as linear_segmentation
from lit_methods.self_supervised.probe import nearest_neighbours as nearest_neighbours
from lit_methods.self_supervised.probe import rank_correlation as rank_correlation
from lit_methods.self_supervised.sparsejepa.core import group_maps as group_maps
from lit_methods.self_supervised.sparsejepa.core import kl_to_standard_normal as kl_to_standard_normal
from lit_methods.self_supervised.sparsejepa.core import multi_information as multi_information
from lit_methods.self_supervised.sparsejepa.core import sparse_terms as sparse_terms
from lit_methods.semi.alignment import align as align
from lit_methods.semi.alignment import moving_marginal as moving_marginal
from lit_methods.semi.fixmatch import certain_loss as certain_loss
from lit_methods.semi.shrinkmatch.core import shrink as shrink
from lit_methods.semi.shrinkmatch.core import shrunk_loss as shrunk_loss
from lit_methods.semi.shrinkmatch.core import uncertain_loss as uncertain_loss
from lit_methods.semi.simmatchv2.core import edge_edge_loss as edge_edge_loss
from lit_methods.semi.simmatchv2.core import finite_or_zero as finite_or_zero
from lit_methods.semi.simmatchv2.core import node_edge_loss as node_edge_loss
from lit_methods.semi.simmatchv2.core import node_node_loss as node_node_loss
from lit_methods.semi.simmatchv2.core import propagate as propagate
from lit_methods.sparse_attention.sparsed.core import attention_block_mask as attention_block_mask
from lit_methods.sparse_attention.sparsed.core import blocks_to_keep as blocks_to_keep
from lit_methods.sparse_attention.sparsed.core import first_generation_block as first_generation_block
from lit_methods.sparse_attention.sparsed.core import pattern_similarity as pattern_similarity
from lit_methods.sparse_attention.sparsed.core import select_blocks as select_blocks
from lit_methods.sparse_attention.sparsed.core import selection_step as selection_step
from lit_methods.sparse_attention.sparsed.core import sparsed_pattern as sparsed_pattern
from lit_methods.sparse_attention.sparsed.core import step_modes as step_modes
from lit_methods.sparse_attention.sparsed.core import window_pattern as window_pattern
from lit_methods.sparse_autoencoders.abstopk.core import ablate_direction as ablate_direction
from lit_methods.sparse_autoencoders.abstopk.core import add_direction as add_direction
from lit_methods.sparse_autoencoders.abstopk.core import clamp_feature as clamp_feature
from lit_methods.sparse_autoencoders.abstopk.core import concept_score as concept_score
from lit_methods.sparse_autoencoders.abstopk.core import difference_in_means as difference_in_means
from lit_methods.sparse_autoencoders.abstopk.core import opposite_pairs as opposite_pairs
from lit_methods.sparse_autoencoders.abstopk.core import proximal_map as proximal_map
from lit_methods.sparse_autoencoders.abstopk.core import proximal_objective as proximal_objective
from lit_methods.sparse_autoencoders.abstopk.core import sign_counts as sign_counts
from lit_methods.sparse_autoencoders.abstopk.core import steer_by_clamping as steer_by_clamping
from lit_methods.sparse_autoencoders.abstopk.core import two_signed_share as two_signed_share
from lit_methods.sparse_autoencoders.recovery import max_cosine as max_cosine
from lit_methods.sparse_autoencoders.recovery import share_above as share_above
from lit_methods.sparse_autoencoders.top_afa.core import afa_loss as afa_loss
from lit_methods.sparse_autoencoders.top_afa.core import band_slopes as band_slopes
from lit_methods.sparse_autoencoders.top_afa.core import decoder_coherence as decoder_coherence
from lit_methods.sparse_autoencoders.top_afa.core import topafa as topafa
from lit_methods.sparse_autoencoders.top_afa.core import zf_metrics as zf_metrics
from lit_methods.tasks.imbalanced_regression.losses import regression_loss as regression_loss
from lit_methods.tasks.imbalanced_regression.metrics import shot_metrics as shot_metrics
from lit_methods.tasks.imbalanced_regression.weights import label_weights as label_weights
from lit_methods.tasks.language.causal_lm import token_losses as token_losses
from lit_methods.tasks.language.denoising import dream_generate as dream_generate
from lit_methods.tasks.language.denoising import llada_generate as llada_generate
from lit_methods.tasks.language.denoising import mask_tokens as mask_tokens
from lit_methods.tasks.language.denoising import masked_diffusion_loss as masked_diffusion_loss
from lit_methods.tasks.language.denoising import masking_rates as masking_rates
from lit_methods.tasks.language.denoising import shifted_right as shifted_right
from lit_methods.tasks.language.scaling_law import fit_scaling_law as fit_scaling_law
from lit_methods.tasks.metric_learning.losses import proxy_softmax as proxy_softmax
from lit_methods.tasks.metric_learning.opis import calibration_range as calibration_range
from lit_methods.tasks.metric_learning.opis import opis as opis
from lit_methods.tasks.metric_learning.opis import retrieval_scores as retrieval_scores
from lit_methods.tasks.recommendation.lightgcn import lightgcn_loss as lightgcn_loss
from lit_methods.tasks.recommendation.lightgcn import normalized_adjacency as normalized_adjacency
from lit_methods.tasks.recommendation.metrics import ranking_metrics as ranking_metrics
from lit_methods.tasks.recommendation.multvae import annealed_beta as annealed_beta
from lit_methods.tasks.recommendation.multvae import gaussian_kl as gaussian_kl
from lit_methods.tasks.recommendation.multvae import multinomial_loss as multinomial_loss
from lit_methods.tasks.recommendation.neumf import neumf_loss as neumf_loss
from lit_methods.tasks.segmentation.core import batch_dice as batch_dice
from lit_methods.tasks.segmentation.core import class_counts as class_counts
from lit_methods.tasks.segmentation.core import class_iou as class_iou
from lit_methods.tasks.segmentation.core import has_foreground as has_foreground
from lit_methods.tasks.segmentation.core import iou_of_counts as iou_of_counts
from lit_methods.tasks.segmentation.core import sample_cross_entropy as sample_cross_entropy
from lit_methods.tasks.segmentation.metrics import dice_and_hd95 as dice_and_hd95
from lit_methods.tasks.superres.metrics import psnr_y as psnr_y
from lit_methods.tasks.superres.metrics import ssim_y as ssim_y
from lit_methods.video.video_action_detection.core import confident_pixels as confident_pixels
from lit_methods.video.video_action_detection.core import exp_rampup as exp_rampup
from lit_methods.video.video_action_detection.core import feature_consistency as feature_consistency
from lit_methods.video.video_action_detection.core import gradient_mask as gradient_mask
from lit_methods.video.video_action_detection.core import mask_consistency as mask_consistency
from lit_methods.video.video_action_detection.core import mask_loss as mask_loss
from lit_methods.video.video_action_detection.core import sharpened as sharpened
from lit_methods.video.video_action_detection.core import soft_dice_loss as soft_dice_loss
from lit_methods.video.video_action_detection.core import spread_loss as spread_loss
from lit_methods.video.video_action_detection.core import variance_mask as variance_mask
from lit_methods.video.video_action_detection.core import variance_masks as variance_masks

__all__ = [
    "ablate_direction",
    "accumulated_loss",
    "active_count",
    "activity_counts",
    "ada_snapkv",
    "adain_color_fix",
    "adam_update_",
    "adapter_features",
    "adaptive_c",
    "adawac_loss",
    "add_direction",
    "adjacent_similarity",
    "adjusted_noise",
    "afa_loss",
    "align",
    "aligned_cross_entropy",
    "alpha_at",
    "alternating_codes",
    "annealed_beta",
    "architecture_gradient",
    "as_operator",
    "ast_momentum",
    "attention_block_mask",
    "attention_flops",
    "attention_with_tangent",
    "attribute_sums",
    "attribution_distance",
    "augment_targets",
    "backtrack",
    "band_slopes",
    "base_hash",
    "base_scaling",
    "batch_dice",
    "batched_delta",
    "bcd_step",
    "best_low_rank",
    "best_of_gallery",
    "best_so_far",
    "best_threshold",
    "best_values",
    "bias_update",
    "bicubic_matrix",
    "block_size",
    "block_sparse",
    "block_sparsity",
    "blocks_for_sparsity",
    "blocks_to_keep",
    "blockwise_attention",
    "boundary_scalings",
    "calibrated_weights",
    "calibration_range",
    "candidate_scores",
    "cauchy",
    "cell_sparsity",
    "certain_loss",
    "check_adjoint",
    "chosen_blocks",
    "clamp_feature",
    "clamp_to_image",
    "class_counts",
    "class_iou",
    "clean_boxes",
    "closed_share",
    "cls_attention",
    "coarse_weight",
    "code_columns",
    "code_weights",
    "complex_product",
    "composed_info_nce",
    "concept_score",
    "confident_pixels",
    "conr_dense_loss",
    "conr_loss",
    "consistency_answer",
    "consistency_chain",
    "consistency_function",
    "consistency_loss_of_views",
    "consistency_pair_loss",
    "consistency_residual",
    "consistency_temperature",
    "consistency_tuning_loss",
    "consistencydet_nearest_level",
    "content",
    "content_distance",
    "content_drift",
    "content_gradient",
    "continuous_ap_loss",
    "contribution",
    "convex_loss",
    "coprompt_loss",
    "corrected_labels",
    "cosine_decay",
    "cosine_drop",
    "cosine_info_nce",
    "cosine_logits",
    "cosine_shares",
    "count_documents",
    "couple",
    "covering_views",
    "critic_hinge",
    "critic_loss",
    "crop_cross_entropy",
    "cross_frame_attention",
    "csd_loss",
    "ct_teacher_decay",
    "cubic_sparsity",
    "cxcywh_to_xyxy",
    "dcm_loss",
    "ddc_distance",
    "ddim_from",
    "ddim_schedule",
    "ddim_step",
    "decay_pruned",
    "decay_share",
    "decayed_momentum",
    "decayed_step_size",
    "decode_cache",
    "decode_weights",
    "decoder_coherence",
    "deformed_views",
    "delta_of_share",
    "denoise_of",
    "denoise_sample",
    "denoising_loss",
    "denoising_weight",
    "dense_cloud",
    "dense_to_sparse_loss",
    "derive_cell",
    "detached_pseudo_huber",
    "detection_levels",
    "detection_scalings",
    "detections_of",
    "dice_and_hd95",
    "difference_in_means",
    "diffusion_window_attention",
    "distillation_loss",
    "diversity",
    "dmd_loss",
    "document_weights",
    "domain_direction",
    "doped_rank",
    "doubling_levels",
    "doubling_stage_length",
    "draw_block_masks",
    "draw_block_orders",
    "draw_sample",
    "dream_generate",
    "drop_below_threshold",
    "drop_smallest",
    "dsnot_nm",
    "dsnot_unstructured",
    "dynamic_k_match",
    "early_diffusion_loss",
    "ect_lower",
    "ect_stage",
    "edge_edge_loss",
    "edit_arithmetic",
    "edit_subspace",
    "effective_parameters",
    "effective_rank",
    "ema_update",
    "embedding_consistency",
    "empty_rows",
    "enqueue",
    "ensemble_probabilities",
    "ensemble_scores",
    "epg_nearest_level",
    "error_bound",
    "estimate_maps",
    "exact_counts",
    "exhaustive_codes",
    "exp_rampup",
    "expand_blocks",
    "expected_error",
    "explicit_consistency",
    "exponential_drop",
    "extend_video",
    "extending_shuffle",
    "f1_scores",
    "factor_objective",
    "factorized_width",
    "fds_begin_epoch",
    "fds_bucket_kernel",
    "fds_calibrate",
    "fds_initial_state",
    "fds_moments",
    "fds_pooled",
    "fds_update",
    "feature_consistency",
    "feature_order",
    "feature_weights",
    "federated_classes",
    "fewer",
    "fft2c",
    "finalized_weight",
    "finite_or_zero",
    "firing_statistics",
    "first_generation_block",
    "first_patches",
    "fit_data",
    "fit_iou_curve",
    "fit_regression",
    "fit_scaling_law",
    "fit_score_law",
    "fitting_pattern",
    "flair_solve",
    "flexprefill",
    "flip_cameras",
    "flops_penalty",
    "flow_factor",
    "flow_matching_error",
    "focal_loss",
    "folded_frobenius",
    "foreground",
    "frame_difference_mask",
    "frechet_distance",
    "frozen_batch_norm",
    "fuse",
    "fuse_windows",
    "fused_weight",
    "gaussian_kernel",
    "gaussian_kl",
    "gaussian_targets",
    "geman_mcclure",
    "gradient_mask",
    "gradual_training_flops",
    "gram_distance",
    "gram_matrix",
    "grasp_scores",
    "greedy_edit",
    "greedy_selection",
    "group_maps",
    "group_mean",
    "group_norms",
    "group_penalty",
    "group_shrink",
    "grow",
    "grow_penalty",
    "guidance_embedding",
    "guide_structure",
    "guided_edit",
    "guided_velocity",
    "half_life_decay",
    "harmonic_mean",
    "has_csd",
    "has_foreground",
    "held_out_fit",
    "heun_step",
    "hypergradient",
    "idf_of_counts",
    "ifft2c",
    "image_cross_entropy",
    "in_tiles",
    "indrnn_cell",
    "info_nce",
    "initial_score",
    "input_statistics",
    "internal_shuffle",
    "interval_guidance",
    "intra_cluster_distance",
    "inverse_gap",
    "iou_of_counts",
    "is_early",
    "is_nm",
    "is_refresh_step",
    "is_reselection",
    "iso_flop_transform",
    "itop_rate",
    "jepa_loss",
    "jepa_targets",
    "junction_jump",
    "karras_levels",
    "keep_high_scores",
    "keep_largest",
    "keep_masks",
    "kept_masks",
    "kept_nodes",
    "kept_shares",
    "kl_to_standard_normal",
    "kl_to_teacher",
    "l2_distance",
    "label_weights",
    "largest_pull",
    "largest_safe_sparsity",
    "layer_density",
    "lcm_schedule",
    "lcm_timesteps",
    "least_squares",
    "lift_factors",
    "lightgcn_loss",
    "linear_decay",
    "linear_probe",
    "linear_scores",
    "linear_segmentation",
    "link_points",
    "llada_generate",
    "load_delta",
    "load_masks",
    "load_pruned",
    "locally_deformed",
    "log_likelihood_gradient",
    "lognormal_probabilities",
    "look_up_pairs",
    "lovasz_softmax",
    "lpgd_curvature",
    "lpgd_objective",
    "lpgd_step",
    "magnitude_mask",
    "magnitude_statistics",
    "margin_mse",
    "mask_change",
    "mask_consistency",
    "mask_loss",
    "mask_tokens",
    "masked_diffusion_loss",
    "masked_state",
    "masked_weight",
    "masking_rates",
    "masks_at_points",
    "matched_pairs",
    "max_cosine",
    "mean_codes",
    "merged_labels",
    "mix_content",
    "mixed_operation",
    "motion_kernel",
    "moving_marginal",
    "mse_codes",
    "multi_information",
    "multinomial_loss",
    "multiscale_consistency",
    "multistep_sample",
    "nearest_neighbours",
    "nearest_time",
    "necessity",
    "neighbour_labels",
    "neumf_loss",
    "neuron_groups",
    "nm_mask",
    "node_edge_loss",
    "node_node_loss",
    "noisy_pair",
    "nominal_sparsity",
    "normalise_maps",
    "normalised_magnitude",
    "normalised_weights",
    "normalized_adjacency",
    "nuclear_norm",
    "object_filter",
    "on_sphere",
    "opis",
    "opposite_pairs",
    "ot_threshold",
    "other_images",
    "overlaps",
    "page_bounds",
    "page_tokens",
    "pair_scores",
    "pairwise_divergence",
    "paper_weights",
    "parallel_branches",
    "pareto_front",
    "parse_pattern",
    "parse_pick",
    "pattern_similarity",
    "penalty_gradient",
    "perceptual",
    "phase_at",
    "phase_fraction",
    "phase_share",
    "phasic_weights",
    "pick_below_sample",
    "pick_pruned",
    "pool_pixels",
    "pool_points",
    "pooled_rows",
    "power_decay",
    "power_exponent",
    "precision_at",
    "precision_recall",
    "predict_probability",
    "predicted_clean",
    "predicted_noise",
    "prefill_flops",
    "pretrain_levels",
    "pretrain_loss",
    "probe_constants",
    "project_points",
    "propagate",
    "prototype_entropy",
    "proximal_map",
    "proximal_objective",
    "proxy_softmax",
    "prune_channels",
    "pruned_block_means",
    "pruned_count",
    "pruned_masks",
    "pruning_phase",
    "pseudo_huber",
    "psnr_y",
    "pyramid_align",
    "quadratic_ramp",
    "query_weights",
    "quest_overhead",
    "quest_pages",
    "random_factors",
    "random_mask",
    "random_nodes",
    "rank_correlation",
    "ranking_info_nce",
    "ranking_kl",
    "ranking_metrics",
    "rcm_sample",
    "recalibrating",
    "recall_at",
    "reconstruct_by_codes",
    "recover_factors",
    "rectified_flow",
    "regression_loss",
    "regularise",
    "regulariser_direction",
    "regulariser_step",
    "relative_error",
    "relative_norm_drop",
    "reliability_loss",
    "reliable_points",
    "removal_addition",
    "removal_score",
    "remove_norm_scales",
    "removed_weight",
    "renewal_step",
    "renoise",
    "repeat_per_context",
    "reschedule_noise",
    "resize_pairs",
    "resize_superpixels",
    "resolution_shift",
    "restoration_loss",
    "restore_from_low_quality",
    "restored_latent",
    "retrain_rates",
    "retrieval_accuracy",
    "retrieval_scores",
    "roi_align",
    "run_prompted_blocks",
    "s2_linear",
    "sample_clip",
    "sample_cross_entropy",
    "sara_learning_rate",
    "save_delta",
    "save_masks",
    "scaled_scores",
    "scaled_weight",
    "scm_loss",
    "score_mask",
    "scored_weight",
    "sdgf_schedule",
    "search_radius",
    "segmentation_losses",
    "select_blocks",
    "select_units",
    "selection_step",
    "sense_combine",
    "sense_expand",
    "sense_reduce",
    "sentence_index",
    "sentence_table",
    "set_losses",
    "seven_sixteenths_cosine",
    "share_above",
    "sharpened",
    "shift_time",
    "shifted_right",
    "shot_metrics",
    "shrink",
    "shrink_ratio",
    "shrink_step",
    "shrunk_loss",
    "sign_counts",
    "similarity_list",
    "similarity_to_start",
    "simulate",
    "sincos_positions",
    "sinkhorn",
    "slash_blocks",
    "slash_sums",
    "slct_loss",
    "sliced_wasserstein",
    "small_weights",
    "smallest_masks",
    "snapkv",
    "snip_scores",
    "soft_dice_loss",
    "sparse_frontier_window_attention",
    "sparse_gradient",
    "sparse_mask",
    "sparse_terms",
    "sparsed_pattern",
    "sparsegpt",
    "spectral_gap",
    "spherical_kmeans",
    "spread_loss",
    "spread_masks",
    "spread_pseudo_labels",
    "square_root_levels",
    "squared_norm",
    "ssim_y",
    "steer_by_clamping",
    "step_modes",
    "still_small",
    "strongest_patches",
    "sufficiency",
    "superflow_losses",
    "superpixel_groups",
    "superpoints",
    "suppress",
    "svd_factors",
    "switch",
    "take_patches",
    "target_frequencies",
    "tcm_loss",
    "temporal_vote",
    "threshold_mask",
    "threshold_of",
    "tile_starts",
    "tile_weights",
    "time_grid",
    "to_batch_rows",
    "to_pixels",
    "to_semi_structured",
    "to_signal",
    "token_index",
    "token_losses",
    "topafa",
    "training_flops",
    "trig_time",
    "trigflow",
    "two_level_loss",
    "two_signed_share",
    "uncertain_loss",
    "uncertainty_loss",
    "unfuse",
    "uniform_probabilities",
    "uniform_soup",
    "union_f1",
    "unit_layout",
    "update_codes",
    "update_codes_supervised",
    "update_dictionary",
    "update_mask",
    "update_sample_weights",
    "value_order",
    "variance_mask",
    "variance_masks",
    "velocity_tangent",
    "vertical_slash",
    "vertical_slash_overhead",
    "vote_winners",
    "voxelize",
    "wanda_mask",
    "warmup_cosine",
    "warmup_cosine_rate",
    "warmup_decay",
    "warmup_then_epoch_cosine",
    "wavelet_color_fix",
    "wavelet_decompose",
    "weight_at",
    "weighted_loss",
    "wide_width",
    "width_factor",
    "window_pattern",
    "window_views",
    "window_weights",
    "with_guidance",
    "xyxy_to_cxcywh",
    "zf_metrics",
]
