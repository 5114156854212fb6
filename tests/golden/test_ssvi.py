"""SSVI against the released code's results; see tests/golden/data/ssvi/README.md."""

from typing import Any

import torch
import torch.nn.functional as F

from golden import GoldenCase, Kind, golden_test
from lit_methods.bayes.variational import gaussian_kl, posterior_std, variational_output
from lit_methods.callbacks.sparsity.schedules import cosine_drop
from lit_methods.callbacks.sparsity.ssvi import core
from lit_methods.callbacks.sparsity.store import zero_removed_

SCORES = ("mean", "snr", "E_mean_abs", "SNR_mean_abs", "E_exp_mean_abs", "SNR_exp_mean_abs")


def removal_addition(case: GoldenCase) -> dict[str, Any]:
    fraction = cosine_drop(case.hp("step"), case.hp("alpha"), 0, case.hp("t_end"))
    weight = [case.tensor(f"in_{name}") for name in ("mu", "rho", "mask", "dense_grad_mu")]
    options = {"lam": case.hp("lambda"), "grow_std": case.hp("grow_std"), "spread": case.hp("sigma_parameterization")}
    found = core.removal_addition(*weight, fraction, case.hp("criterion"), **options)
    momentum = case.tensor("in_momentum_mu").clone()
    zero_removed_(momentum, found.mask)
    after = {"out_mu": found.mu, "out_rho": found.rho, "out_momentum_mu": momentum}
    return {"out_replace_fraction": fraction, "out_mask": found.mask, **after}


def drop_score(case: GoldenCase) -> dict[str, Any]:
    mu, sigma, lam = case.tensor("in_mu"), case.tensor("in_sigma"), case.hp("lambda")
    return {f"out_score_{name}": core.removal_score(mu, sigma, name, lam) for name in SCORES}


def variational_linear(case: GoldenCase) -> dict[str, Any]:
    x, mu, rho = (case.tensor(f"in_{name}").requires_grad_() for name in ("x", "mu", "rho"))
    mask, eps = case.tensor("in_mask"), case.tensor("in_noise")
    sigma = posterior_std(rho, mask)
    y = variational_output(F.linear, x, x.square(), mu, sigma, noise=lambda _: eps)
    grads = torch.autograd.grad((y * case.tensor("in_cotangent")).sum(), (x, mu, rho), retain_graph=True)
    kl = gaussian_kl(mu, sigma, mask, case.hp("prior_mean"), case.hp("prior_std"))
    of_kl = torch.autograd.grad(kl, (mu, rho))
    found = {"out_y_sample": y, "out_y_mean": F.linear(x, mu), "out_kl": kl}
    found |= dict(zip(("out_grad_x", "out_grad_mu", "out_grad_rho"), grads, strict=True))
    return found | {"out_kl_grad_mu": of_kl[0], "out_kl_grad_rho": of_kl[1]}


test_golden = golden_test(
    "ssvi",
    {
        "removal_addition": Kind(removal_addition, rtol=0, atol=1e-9),
        "drop_score": Kind(drop_score, rtol=1e-7, atol=0, overrides={"out_score_SNR": (1e-5, 0)}),
        "variational_linear": Kind(variational_linear, rtol=0, atol=1e-9, overrides={"out_kl": (1e-6, 0)}),
    },
)
