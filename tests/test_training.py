"""What training loops do around a wrapped model: each loop runs with and without the wrapper, step by step."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lazy_einsum import FallbackWarning, OptimizedModule

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Factorized(nn.Module):
    """Two layers in factors, batch norm and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 2) / 2)
        self.b = nn.Parameter(torch.randn(2, 3, 8) / 2)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ni,ir,rjk,nj->nk", x, self.a, self.b, x[:, :3])
        return self.out(self.drop(self.norm(y).tanh())).squeeze(-1)


def pair(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Factorized, Factorized, OptimizedModule]:
    """Two equal models, and the wrapper of the second."""
    torch.manual_seed(0)
    theirs = Factorized().to(device, dtype)
    child = copy.deepcopy(theirs)
    return theirs, child, OptimizedModule(child, on_untraceable="raise")


def batches(dtype: torch.dtype = torch.float64, n: int = 12, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [8, 8, 5, 8, 9, 8, 8, 10, 5, 8, 11, 8][:n]
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(device, dtype),
            torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype),
        )
        for size in sizes
    ]


def same(theirs: nn.Module, child: nn.Module, tolerance: float = 1e-9) -> None:
    state, other = theirs.state_dict(), child.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance, msg=name)


def compare(
    loop: Callable[[nn.Module], list[float]],
    dtype: torch.dtype = torch.float64,
    at: float = 1e-9,
    device: str = "cpu",
) -> None:
    """Run ``loop``, which trains a model and gives its losses, on both."""
    theirs, child, ours = pair(dtype, device)
    torch.manual_seed(2)
    expected = loop(theirs)
    torch.manual_seed(2)
    found = loop(ours)
    assert found == pytest.approx(expected, rel=at) and all(map(math.isfinite, expected))
    same(theirs, child, at)
    assert ours.cache_info().hits > 0 and ours.cache_info().fallbacks == 0


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "RAdam, foreach": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, device: str) -> None:
    def loop(model: nn.Module) -> list[float]:
        optimizer = OPTIMIZERS[name](model.parameters())
        losses = []
        for x, y in batches(device=device):
            optimizer.zero_grad(set_to_none=len(losses) % 2 == 0)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    compare(loop, device=device)


def test_accumulation_clipping_and_schedules() -> None:
    def loop(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
        losses = []
        for number, (x, y) in enumerate(batches()):
            loss = F.mse_loss(model(x), y) / 2
            loss.backward()
            losses.append(loss.item())
            if number % 2:
                losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                nn.utils.clip_grad_value_(model.parameters(), 0.2)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return losses

    compare(loop)


def test_lbfgs() -> None:
    """Its closure calls the model several times a step, with weights changed by ``set_`` and ``add_``."""

    def loop(model: nn.Module) -> list[float]:
        model.eval()  # dropout would make the line search random
        (x, y), *_ = batches()
        optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(3)]

    compare(loop, at=1e-6)


def test_autocast_and_grad_scaler(device: str) -> None:
    def loop(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler(device, init_scale=16.0)
        losses = []
        for x, y in batches(torch.float32, device=device):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    compare(loop, torch.float32, 1e-4, device)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averaged_models(average: Any) -> None:
    """``AveragedModel`` copies the wrapper; the copy has weights and code of its own."""
    theirs, child, _ = pair()
    ours = OptimizedModule(child)
    averages = [AveragedModel(model, multi_avg_fn=average) for model in (theirs, ours)]
    torch.manual_seed(2)
    for model, averaged in zip((theirs, ours), averages, strict=True):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for x, y in batches():
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            averaged.update_parameters(model)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            # It makes batch norm count, and ask for the count's value, for which that runs as it is.
            warnings.simplefilter("ignore", FallbackWarning)
            update_bn(batches(), averaged)
        averaged.eval()
    same(theirs, child)
    for x, _ in batches():
        torch.testing.assert_close(averages[1](x), averages[0](x))
        torch.testing.assert_close(averages[1].module(x), averages[0].module(x))


class _Points(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 29

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(6, generator=generator, dtype=torch.float64), torch.tensor(index / 29).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Any]) -> list[float]:
    """The plain loop; its losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_data_loader_with_workers() -> None:
    def loop(model: nn.Module) -> list[float]:
        loader = DataLoader(_Points(), batch_size=8, num_workers=1, multiprocessing_context="spawn")
        return train(model, torch.optim.Adam(model.parameters(), 0.01), loader)

    theirs, child, ours = pair()
    for model in (theirs, ours):
        model.eval()
    assert loop(ours) == pytest.approx(loop(theirs), rel=1e-9)
    same(theirs, child)


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_checkpoints_go_either_way(wrapped_first: bool) -> None:
    """Model and optimizer, saved in the middle of training with the wrapper or without, go on without or with it."""
    theirs, _, ours = pair()
    for model in (theirs, ours):
        model.eval()
    whole = copy.deepcopy(theirs)
    expected = train(whole, torch.optim.Adam(whole.parameters(), 0.01), batches())
    first, second = (ours, theirs) if wrapped_first else (theirs, ours)
    optimizer = torch.optim.Adam(first.parameters(), 0.01)
    losses = train(first, optimizer, batches()[:6])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    optimizer = torch.optim.Adam(second.parameters(), 0.01)
    optimizer.load_state_dict(saved["optimizer"])
    losses += train(second, optimizer, batches()[6:])
    assert losses == pytest.approx(expected, rel=1e-9)


def test_profiler() -> None:
    _, _, ours = pair()
    for x, _ in batches():
        ours(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for x, y in batches():
            F.mse_loss(ours(x), y).backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::einsum" not in names and any("mm" in name for name in names)
    assert ours.cache_info().fallbacks == 0


def test_signature() -> None:
    """Trainers ask ``forward`` for the names of its arguments, to drop other columns of the data."""

    class Labelled(Factorized):
        def forward(self, input_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(input_values)
            return {"logits": found} if labels is None else {"loss": F.mse_loss(found, labels), "logits": found}

    ours = OptimizedModule(Labelled().double().eval())
    assert inspect.signature(ours.forward) == inspect.signature(ours.module.forward)
    assert inspect.signature(copy.deepcopy(ours).forward) == inspect.signature(ours.module.forward)
    assert list(inspect.signature(OptimizedModule(lambda a, *, b=2: a * b).forward).parameters) == ["a", "b"]
    assert list(inspect.signature(OptimizedModule(lambda self: self).forward).parameters) == ["args", "kwargs"]
    wraps_c = functools.wraps(dict)(lambda x: x)
    assert list(inspect.signature(OptimizedModule(wraps_c).forward).parameters) == ["args", "kwargs"]
    (x, y), *_ = batches()
    assert ours(input_values=x, labels=y)["loss"].requires_grad
    assert ours(x).keys() == {"logits"}


# --- trainers of other packages, where they are installed -------------------------------------------------------------


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            x, y = batch
            loss = F.mse_loss(self.model(x), y)
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
            self.losses.append(F.mse_loss(self.model(batch[0]), batch[1]).item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    theirs, child, ours = pair()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    tasks = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        task = Task(model)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=tmp_path,
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        loader = DataLoader(TensorDataset(x, y), batch_size=9)
        trainer.fit(task, loader, loader)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        tasks.append(task)
    assert tasks[1].losses == pytest.approx(tasks[0].losses, rel=1e-9) and len(tasks[0].losses) > 20
    same(theirs, child)
    assert ours.cache_info().hits > 0 and ours.cache_info().fallbacks == 0
    assert tasks[0].state_dict().keys() == tasks[1].state_dict().keys()


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Labelled(Factorized):
        def forward(self, input_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(input_values)
            return {"logits": found} if labels is None else {"loss": F.mse_loss(found, labels), "logits": found}

    x, y = (torch.cat(parts) for parts in zip(*batches(torch.float32), strict=True))
    rows = [{"input_values": a, "labels": b, "dropped": 1} for a, b in zip(x, y, strict=True)]
    torch.manual_seed(0)
    theirs = Labelled()
    child = copy.deepcopy(theirs)
    ours = OptimizedModule(child, on_untraceable="raise")
    losses = []
    for model in (theirs, ours):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=9,
            gradient_accumulation_steps=2,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="epoch",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1] += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) > 8
    same(theirs, child, 1e-4)
    assert ours.cache_info().hits > 0 and ours.cache_info().fallbacks == 0


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    theirs, _, ours = pair()
    metrics = [torchmetrics.MeanSquaredError() for _ in range(2)]
    for x, y in batches(torch.float64):
        for model, metric in zip((theirs.eval(), ours.eval()), metrics, strict=True):
            metric.update(model(x).float(), y.float())
    torch.testing.assert_close(metrics[1].compute(), metrics[0].compute())
