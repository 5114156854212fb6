"""CoPrompt: prompts and adapters on both of CLIP's towers, kept near the frozen ones on perturbed inputs (arXiv:2306.01195)."""
