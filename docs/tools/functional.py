"""Writes ``lit_methods/functional.pyi``, the list of pure functions that ``lit_methods.functional`` offers, without importing any of them.

Run ``make functional`` after changing the ``__all__`` of a core. Every ``core.py`` gives all functions of its ``__all__`` (without one: all
that have no underscore). Files that a family or the whole project shares, and techniques of one file, give what is chosen below.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from lit_methods.catalog import package_folder  # noqa: E402

STUB = ROOT / "lit_methods" / "functional.pyi"
HEAD = "# Written by `make functional` (docs/tools/functional.py): each core's __all__, and what shared files offer."

SHARED = {
    "averages": "cosine_decay ema_update half_life_decay linear_decay power_decay power_exponent warmup_decay",
    "callbacks.fine_tuning.delta": "base_hash fuse load_delta save_delta switch unfuse",
    "callbacks.metric_learning.tcm": "tcm_loss",
    "callbacks.sparsity.cast.adams": "adam_update_ ast_momentum decay_share decayed_momentum",
    "callbacks.sparsity.channels": "load_pruned prune_channels",
    "callbacks.sparsity.density": "exact_counts layer_density",
    "callbacks.sparsity.drop_grow": "drop_below_threshold drop_smallest grow update_mask",
    "callbacks.sparsity.dynamics": "itop_rate mask_change",
    "callbacks.sparsity.flops": "gradual_training_flops training_flops",
    "callbacks.sparsity.group_sparsity": "group_norms group_penalty group_shrink",
    "callbacks.sparsity.input_statistics": "input_statistics",
    "callbacks.sparsity.latent": "masked_weight",
    "callbacks.sparsity.masks": "is_nm keep_largest nm_mask random_mask",
    "callbacks.sparsity.one_shot": "expected_error initial_score keep_high_scores magnitude_mask sparsegpt wanda_mask",
    "callbacks.sparsity.schedules": "cosine_drop cubic_sparsity exponential_drop",
    "callbacks.sparsity.score_masks": "pruning_phase scaled_scores score_mask scored_weight",
    "callbacks.sparsity.scores": "grasp_scores kept_masks kept_shares snip_scores",
    "callbacks.sparsity.sparse_ift.surgery": "iso_flop_transform",
    "lidar.lifting": "link_points masks_at_points smallest_masks superpoints",
    "consistency_models.curricula": "ct_teacher_decay doubling_levels doubling_stage_length ect_lower ect_stage square_root_levels",
    "consistency_models.evaluation": "frechet_distance precision_recall sliced_wasserstein",
    "consistency_models.levels": "boundary_scalings inverse_gap karras_levels lognormal_probabilities uniform_probabilities",
    "consistency_models.metrics": "cauchy detached_pseudo_huber geman_mcclure perceptual pseudo_huber",
    "consistency_models.pairs": "consistency_function consistency_pair_loss heun_step",
    "consistency_models.rcm.attention_jvp": "attention_with_tangent blockwise_attention",
    "consistency_models.rcm.trigflow": "rectified_flow shift_time trig_time trigflow",
    "consistency_models.sampling": "denoise_sample multistep_sample",
    "inverse_problems.mri": "complex_product estimate_maps fft2c ifft2c normalise_maps sense_combine sense_expand sense_reduce",
    "inverse_problems.operators": "as_operator bicubic_matrix check_adjoint gaussian_kernel least_squares motion_kernel squared_norm",
    "detection.boxes": "cxcywh_to_xyxy overlaps xyxy_to_cxcywh",
    "detection.criterion": "federated_classes focal_loss set_losses",
    "detection.matcher": "dynamic_k_match",
    "detection.nms": "detections_of suppress",
    "detection.noise": "clamp_to_image clean_boxes to_pixels to_signal",
    "detection.pooling": "pyramid_align roi_align",
    "diffusion.ddim": "ddim_schedule ddim_step",
    "diffusion.denoisers": "denoise_of with_guidance",
    "diffusion.video_metrics": "adjacent_similarity content_drift junction_jump similarity_to_start",
    "diffusion.windows": "covering_views draw_block_orders fuse_windows reschedule_noise window_attention window_views window_weights",
    "lidar.contrast": "effective_rank group_mean info_nce retrieval_accuracy",
    "lidar.point_losses": "lovasz_softmax segmentation_losses",
    "lidar.projection": "dense_cloud flip_cameras project_points resize_pairs resize_superpixels",
    "lidar.voxels": "voxelize",
    "matrix_factorization.regression": "best_threshold code_columns fit_regression linear_scores",
    "matrix_factorization.supervised_dictionary_learning.blocks": "bcd_step search_radius update_codes "
    "update_codes_supervised update_dictionary",
    "matrix_factorization.supervised_dictionary_learning.lifted": "best_low_rank decayed_step_size lift_factors lpgd_curvature "
    "lpgd_objective lpgd_step recover_factors svd_factors",
    "matrix_factorization.supervised_dictionary_learning.objective": "factor_objective random_factors",
    "optim": "seven_sixteenths_cosine warmup_cosine warmup_cosine_rate warmup_then_epoch_cosine",
    "prompting.towers": "run_prompted_blocks",
    "restoration.color": "adain_color_fix wavelet_color_fix wavelet_decompose",
    "retrieval.idf": "count_documents idf_of_counts",
    "retrieval.ranking": "margin_mse pair_scores ranking_info_nce ranking_kl",
    "self_supervised.jepa": "jepa_loss jepa_targets repeat_per_context take_patches",
    "self_supervised.masks": "block_size draw_block_masks first_patches",
    "self_supervised.networks": "sincos_positions",
    "self_supervised.probe": "linear_probe linear_segmentation nearest_neighbours rank_correlation",
    "semi.alignment": "align moving_marginal",
    "semi.fixmatch": "certain_loss",
    "sparse_autoencoders.recovery": "max_cosine share_above",
    "tasks.imbalanced_regression.losses": "regression_loss",
    "tasks.imbalanced_regression.metrics": "shot_metrics",
    "tasks.imbalanced_regression.weights": "label_weights",
    "tasks.language.causal_lm": "token_losses",
    "tasks.language.denoising": "dream_generate llada_generate mask_tokens masked_diffusion_loss masking_rates shifted_right",
    "tasks.language.scaling_law": "fit_scaling_law",
    "tasks.metric_learning.losses": "proxy_softmax",
    "tasks.metric_learning.opis": "calibration_range opis retrieval_scores",
    "tasks.recommendation.lightgcn": "lightgcn_loss normalized_adjacency",
    "tasks.recommendation.metrics": "ranking_metrics",
    "tasks.recommendation.multvae": "annealed_beta gaussian_kl multinomial_loss",
    "tasks.recommendation.neumf": "neumf_loss",
    "tasks.segmentation.metrics": "dice_and_hd95",
    "tasks.superres.metrics": "psnr_y ssim_y",
}
# files all of whose names say too little by themselves
PREFIXED = {"callbacks.imbalanced_regression.fds.core": "fds"}
# which of two techniques had a name first: the other one's starts with its folder; "": every one's does
FIRST = {"phase_at": "consistency_models.rcm.core", "shrink": "semi.shrinkmatch.core", "sample": ""}


def path_of(module: str) -> Path:
    """The file of a module, named below ``lit_methods``."""
    package, _, rest = module.partition(".")
    if package in ("callbacks", "datamodules"):
        return package_folder(f"lit_methods.{package}").joinpath(*rest.split(".")).with_suffix(".py")
    return package_folder("lit_methods").joinpath(*module.split(".")).with_suffix(".py")


def core_modules() -> list[str]:
    """Every ``core.py`` of the packages, named below ``lit_methods``."""
    found = []
    for package in ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules"):
        folder = package_folder(package)
        for path in folder.rglob("core.py"):
            found.append(".".join([*package.split(".")[1:], *path.relative_to(folder).with_suffix("").parts]))
    return sorted(found)


def functions_of(path: Path) -> list[str]:
    """The functions that a core offers: those of its ``__all__`` that it defines, or all without an underscore."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return [name for name in defined if name in ast.literal_eval(node.value)]
    return defined


def offered() -> dict[str, tuple[str, str]]:
    """Name in ``lit_methods.functional`` -> (module below ``lit_methods``, name there).

    Raises:
        ValueError: Two modules offer one name, and nothing says which keeps it.
    """
    every = [(module, name) for module in core_modules() for name in functions_of(path_of(module))]
    every += [(module, name) for module, names in SHARED.items() for name in names.split()]
    homes: dict[str, list[str]] = {}
    for module, name in every:
        homes.setdefault(name, []).append(module)
    found: dict[str, tuple[str, str]] = {}
    for module, name in every:
        prefix = PREFIXED.get(module, "")
        if (len(homes[name]) > 1 or name in FIRST) and FIRST.get(name) != module:
            prefix = module.split(".")[-2]
        shown = f"{prefix}_{name}" if prefix else name
        if shown in found:
            raise ValueError(f"{module} and {found[shown][0]} both offer {shown}: rename one, or leave it out of __all__")
        found[shown] = module, name
    return found


def stub() -> str:
    """The text of ``functional.pyi``."""
    homes = offered()
    lines = sorted(f"from lit_methods.{module} import {name} as {shown}" for shown, (module, name) in homes.items())
    return "\n".join([HEAD, *lines, "", "__all__ = [", *(f'    "{name}",' for name in sorted(homes)), "]", ""])


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
