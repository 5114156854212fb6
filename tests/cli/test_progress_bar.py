import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel

from helpers import tiny_trainer
from lit_methods.callbacks import ThroughputProgressBar


class Logging(BoringModel):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("score", self.layer(batch).mean() * 0 + 7, prog_bar=True)


def fit(bar: ThroughputProgressBar, module: BoringModel, steps: int = 6, **settings: object) -> None:
    trainer = tiny_trainer(max_steps=steps, limit_val_batches=1, callbacks=[bar], **({"enable_progress_bar": True} | settings))
    trainer.fit(module, datamodule=BoringDataModule())


def test_plain_lines_are_few_and_hold_loss_metric_and_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ThroughputProgressBar(plain=True, log_seconds=1000), Logging(), limit_train_batches=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2  # the first step and the end
    assert "step 1/6" in lines[0]
    assert "loss " in lines[0]
    for part in ("step 6/6", "loss ", "score 7", "it/s ", "samples/s "):
        assert part in lines[1]


def test_a_line_per_step_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ThroughputProgressBar(plain=True, log_seconds=0), ManualOptimBoringModel())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[3].split("/")[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]


def test_samples_per_second_count_the_batch_and_leave_out_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = ThroughputProgressBar(plain=True)
    clock = iter(range(1000))
    trainer = tiny_trainer(max_steps=4, limit_val_batches=0, callbacks=[bar], enable_progress_bar=True)
    trainer.fit(BoringModel(), train_dataloaders=torch.utils.data.DataLoader(torch.randn(32, 32), batch_size=8))
    bar._batch_ends.clear()
    bar._batch_ends.extend(float(next(clock)) * 0.5 for _ in range(5))  # two batches a second
    bar._read_at = -float("inf")
    metrics = bar.get_metrics(trainer, BoringModel())
    assert metrics["it/s"] == "2"
    assert metrics["samples/s"] == "16"
    bar.on_validation_start(trainer, BoringModel())
    bar._batch_ends.append(1e6)  # a long validation lies before it
    bar._read_at = -float("inf")
    assert bar.get_metrics(trainer, BoringModel())["samples/s"] == "16"


def test_the_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ThroughputProgressBar(plain=False)
    fit(bar, Logging())
    assert "epoch 0  step" not in capsys.readouterr().out
    assert bar.is_enabled
    assert bar.progress is not None


def test_nothing_is_shown_when_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ThroughputProgressBar(plain=True, log_seconds=0)
    bar.disable()
    fit(bar, BoringModel())
    fit(ThroughputProgressBar(plain=True, refresh_rate=0, log_seconds=0), BoringModel())
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "last"), [({"max_epochs": 2}, 1), ({"max_epochs": 1}, 0), ({"steps": 3}, 1)])
def test_the_last_line_tells_the_last_epoch(settings: dict[str, int], last: int, capsys: pytest.CaptureFixture[str]) -> None:
    fit(ThroughputProgressBar(plain=True), Logging(), **({"steps": -1, "limit_train_batches": 2} | settings))  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines[-1].startswith(f"epoch {last} ")
