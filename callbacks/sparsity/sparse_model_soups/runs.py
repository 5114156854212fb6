"""The runs of a soup, in processes of their own: by the launcher of the claims, except that an interrupted run goes on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_methods.claims.display import Display
from lit_methods.claims.plan import Node
from lit_methods.claims.runner import Result, Runner
from lit_methods.cli.resume import FINISHED

if TYPE_CHECKING:
    from lit_methods.callbacks.sparsity.sparse_model_soups.command import Fit


def finished_run(folder: Path) -> Path | None:
    """The newest run below a fit's folder that came to its end."""
    runs = [run for run in sorted(folder.glob("run/*/"), reverse=True) if (run / FINISHED).is_file()]
    return runs[0] if runs else None


class FitRunner(Runner):
    """Keeps each run in ``<root>/<name>/``; a finished one is never run again, an interrupted one resumes from its last checkpoint.

    Args:
        root: The soup's folder.
        threads: Torch threads of one run.
        finished: Told of each finished run: its name and folder.
    """

    def __init__(self, root: Path, threads: int, finished: Callable[[str, Path], None]) -> None:
        super().__init__(root, threads, "sparse_model_soups")
        self.finished = finished

    def folder(self, node: Node) -> Path:
        """The run's own."""
        return self.root / node.name

    def cached(self, node: Node, upstream: Result | None) -> tuple[Result | None, str]:
        """What a run has left that came to its end."""
        run = finished_run(self.folder(node))
        if run is None:
            return None, ""
        self.finished(node.name, run)
        return {"run": str(run.relative_to(self.root))}, ""

    def clear(self, folder: Path) -> None:
        """Nothing goes: ``--resume auto`` finds the checkpoint."""

    def environment(self, node: Node) -> dict[str, str]:
        """As for claims, with the soup as W&B's group."""
        own = {"WANDB_RUN_GROUP": f"{self.root.parent.name}-{self.root.name}", "WANDB_JOB_TYPE": node.name.partition("/")[0]}
        ours = super().environment(node) | {"WANDB_TAGS": os.environ.get("WANDB_TAGS", "soup")}
        return ours | {name: value for name, value in own.items() if name not in os.environ}

    def _finish(self, node: Node, process: "object", upstream: Result | None) -> Result:
        result = super()._finish(node, process, upstream)  # type: ignore[arg-type]
        self.finished(node.name, self.root / result["run"])
        return result


def run_fits(folder: Path, fits: Sequence["Fit"], jobs: int, threads: int, finished: Callable[[str, Path], None]) -> None:
    """Run what hasn't come to its end.

    Args:
        folder: The soup's folder, in which each run's config lies.
        fits: What to run.
        jobs: Runs at a time.
        threads: Torch threads of one run.
        finished: Told of each finished run, also of those that were kept: its name and folder.

    Raises:
        CommandError: A run failed; the message shows the end of its output.
        KeyboardInterrupt: Ctrl-C; the processes of all runs have been ended.
    """
    nodes = [
        Node(
            fit.name, fit.name, ["fit", "--config", str(folder / fit.name / "config.yaml"), "--resume", "auto"], fit.seed, None, [fit.name]
        )
        for fit in fits
    ]
    display = Display(len(nodes), jobs)
    try:
        FitRunner(folder, threads, finished).run(nodes, jobs, display)
    finally:
        display.close()
