# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ultralytics' trainers from outside: what they must offer, and where and for how long their course is changed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.data import YOLODataset
from ultralytics.engine import trainer as engine
from ultralytics.models import yolo as tasks  # noqa: F401  whose trainers ours extend
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.callbacks import get_default_callbacks

from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.stock.context import MEND, callable_with, quiet, replaced
from yolo_ext.stock.load import raw_checkpoint

# What a trainer is extended at: methods with the number of arguments that ours pass on, and events.
METHODS = {
    "_do_train": 0, "_load_checkpoint_state": 1, "_model_train": 0, "auto_batch": 0, "build_dataset": 1,
    "build_optimizer": 1, "final_eval": 0, "get_model": 3, "get_validator": 0, "optimizer_step": 0, "plot_metrics": 0,
    "preprocess_batch": 1, "progress_string": 0, "resume_training": 1, "run_callbacks": 1, "save_metrics": 1,
    "save_model": 0, "train": 0,
}  # fmt: skip
EVENTS = ("on_pretrain_routine_end", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end")


def check_trainer(stock: Any) -> None:
    """Refuse a trainer that lacks what ours extends, seen through `super()`: its method would just never be called."""
    lacking = [f"the method {m}()" for m, n in METHODS.items() if not callable_with(getattr(stock, m, None), n)]
    lacking += [f"the event {e}" for e in EVENTS if e not in get_default_callbacks()]
    if lacking := lacking + ["strip_optimizer()"] * (not callable_with(getattr(engine, "strip_optimizer", None), 3)):
        what = f"The trainer of Ultralytics {__version__} lacks what yolo_ext extends, or has changed it"
        raise UsageError(f"{what}: {', '.join(lacking)}. {MEND}, and look at your own trainer class.")


def extend(trainer: Any, mixin: type, known: dict[type, type]) -> None:
    """Put a mixin in front of the class of a stock trainer that is just being made and has no model yet."""
    if getattr(trainer, "model", None) is not None or not hasattr(trainer, "args"):
        late = f"attach() comes too late in Ultralytics {__version__}: the trainer has its model before its first event"
        raise UsageError(f"{late}. Use model.train(trainer=yolo_ext.trainer_for(task), ...).")
    stock = type(trainer)
    trainer.__class__ = known.get(stock) or type(f"Compression{stock.__name__}", (mixin, stock), {})


def choosing(use: Callable[[Path], None]) -> AbstractContextManager[None]:
    """Have `use` take the run folder of a trainer that is being made before anything is written there."""
    chosen = engine.get_save_dir

    def choose(*args: Any) -> Path:
        use(folder := chosen(*args))
        return folder

    return replaced(engine, get_save_dir=choose if RANK in {-1, 0} else chosen)


def files_of(loader: Any) -> list[Path]:
    """Return the images of a loader."""
    data = loader.dataset
    return [Path(f) for f in getattr(data, "im_files", None) or [sample[0] for sample in data.samples]]


def agreed(decide: Callable[[], Any]) -> Any:
    """Return what rank 0 decides; on several devices the others receive it as data, or its error."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return decide()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except YoloExtError as e:  # or the others would wait for ever
            box[1] = e
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def labels_optional(wanted: bool) -> AbstractContextManager[None]:
    """Have Ultralytics take a train split without any labels, where training needs none."""
    stock = YOLODataset.cache_labels

    def scan(dataset: Any, *args: Any) -> dict:
        augment, dataset.augment = dataset.augment, False  # its sign of a dataset that needs labels
        try:
            return stock(dataset, *args)
        except ValueError as e:
            refusal = f"Ultralytics {__version__} takes no train split without labels ({e})"
            raise UsageError(f"{refusal}. Label it, or leave quant.supervision=features out.") from e
        finally:
            dataset.augment = augment

    return replaced(YOLODataset, cache_labels=scan if wanted else stock)


def along(model: nn.Module, run: Callable[[torch.Tensor], Any]) -> AbstractContextManager[Any]:
    """Have every forward pass of a model call `run` with its images, whose results live until the next one."""
    held: list[Any] = []

    def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        held[:] = [run(args[0].detach())]  # held until the backward pass is through

    return model.register_forward_hook(hook)


@contextmanager
def whole_final_files(finalize: Callable[[Path], None], keep_optimizer: bool = False) -> Iterator[None]:
    """Have Ultralytics strip final checkpoints beside the old ones, which are then finalized and replaced whole."""
    stock: Any = engine.strip_optimizer
    first: list[tuple[Path, Path]] = []  # last.pt, replaced behind all else: while it holds an epoch, the run can go on

    def strip(f: Path, s: str = "", updates: dict | None = None) -> dict:
        part, result = Path(str(f)).with_name(f".{Path(f).name}"), Path(s or str(f))
        if keep_optimizer:  # what is updated comes last
            updates = {**(updates or {}), "optimizer": raw_checkpoint(f)["optimizer"]}
        with quiet():  # it would name the file beside
            stripped = stock(f, part, updates)
        if stripped:
            finalize(part)
            done = "kept in" if keep_optimizer else "stripped from"
            LOGGER.info(f"Optimizer {done} {f}, {part.stat().st_size / 1e6:.1f}MB")
            if first:
                part.replace(result)
            else:
                first.append((part, result))
        return stripped

    with replaced(engine, strip_optimizer=strip):
        yield
    for part, result in first:
        part.replace(result)


def plain_labels() -> AbstractContextManager[None]:
    """Have pictures show names as they are: Matplotlib takes what is between two $ for a formula."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})


def forget_best(trainer: Any) -> None:
    """Let best.pt and early stopping start anew: what was best before had more channels."""
    trainer.best_fitness = None
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch


def order_of(loader: Any) -> tuple[torch.Tensor, bool] | None:
    """Return the state of a loader's generator and whether it has begun; None where the loader shows neither."""
    if getattr(loader, "generator", None) is None or not hasattr(loader, "iterator"):
        return None
    return loader.generator.get_state(), loader.iterator is not None


def continue_order(loader: Any, order: torch.Tensor, mid_run: bool, resets: bool) -> bool:
    """Make the next iterator of a loader without workers, which may be reset before, go on with an order, if it can."""
    make = getattr(loader, "_get_iterator", None)
    if order_of(loader) is None or not callable(make):
        return False

    def once() -> Any:
        loader._get_iterator = make
        loader.generator.set_state(order)
        iterator = make()
        if mid_run:
            for _ in range(len(loader)):  # the sampler draws its next order only behind the end of the last one
                next(iterator._sampler_iter)
            loader.generator.set_state(order)
        return iterator

    try:
        loader.iterator = once()
    except AttributeError:
        return False
    if resets:
        loader._get_iterator = once
    return True


class Proxy:
    """Object with the interface of the one that it wraps; a copy of it is the plain one."""

    def __init__(self, base: Any, **own: Any) -> None:
        """Wrap `base`; what is `own` stays with the proxy."""
        self.__dict__.update(base=base, **own)

    def __deepcopy__(self, memo: dict) -> Any:
        """Copy the wrapped object only: nothing of ours gets into EMA or a checkpoint."""
        return deepcopy(self.base, memo)

    def __reduce__(self) -> Any:
        """Pickle as the wrapped object, for the same reason, and without a name of ours."""
        return deepcopy, (self.base,)

    def __getattr__(self, name: str) -> Any:
        """Answer for the wrapped object (of a criterion: gains, update, loss names)."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes on the wrapped object."""
        setattr(self.base, name, value)


class LoggedLoss(Proxy):
    """The task's criterion with more for results.csv: `items()` returns detached scalars by the same names."""

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the task's loss vector, and its items with ours behind them."""
        loss, found = self.base(predictions, batch)
        return loss, {**found, **self.items()}


class Reading(Proxy):
    """Validator that measures what `read` makes of the path of a checkpoint."""

    def __call__(self, trainer: Any = None, model: Any = None, **options: Any) -> Any:
        """Validate as the wrapped one."""
        return self.base(trainer, self.read(model) if isinstance(model, Path) else model, **options)
