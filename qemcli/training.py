"""The one training loop: seeded, resumable, stopped early by the validation score, and torchrun's
where asked.

The rows of a batch depend on (seed, epoch) alone, so the number of processes changes the result
by rounding only. Networks of many architectures are drawn a few of one at a time, each architecture
as often as it has networks, and one loss is taken over all that a batch holds.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qemcli.errors import InputError, UsageError
from qemcli.layers.forests import Grown
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.points import Points
from qemcli.spaces import WeightSpace
from qemcli.writing import beside

TOGETHER = 8  # networks of one architecture that stand together in an epoch, where there are many


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam with decoupled weight decay under a one-cycle learning rate.

    epochs; batch_size (networks); lr (peak); weight_decay; warmup (share of the steps that rise);
    patience (epochs without a better validation score before stopping; 0: never).
    """

    epochs: int = 40
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.1
    patience: int = 0


@dataclass(frozen=True)
class Rows:
    """Networks and what is asked of them: target (n,)."""

    networks: Points
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Team:
    """The processes that train together, as torchrun describes them; alone, rank 0 of 1."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Team:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(int(os.environ.get("RANK", "0")), size)


def _only(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """The networks of the one weight space that there is, and the target."""
    (space, flat, _), *_ = rows.networks.parts()
    return space.unflatten(flat), rows.target


def check(train: Rows, val: Rows, what: str) -> None:
    """Refuse what cannot be learned from: too few networks, or a target that is constant."""
    if len(train) < 8 or len(val) < 2:
        raise InputError(
            f"{len(train)} networks to train on and {len(val)} to validate with '{what}' recorded",
            "at least 8 and 2 are needed: a zoo with a split column, or more checkpoints",
        )
    if float(train.target.std()) == 0:
        raise InputError(
            f"'{what}' is the same for all {len(train)} training networks: nothing to learn"
        )


def outputs(model: Metanetwork | Mixed, networks: Points, batch_size: int, device: str) -> Tensor:
    """Raw answers (n, outputs) in evaluation mode, in the order of the networks."""
    model.eval()
    answers = []
    with torch.no_grad():
        for space, flat, places in networks.parts():
            read = model.on(space)
            found = [read(space.unflatten(r.to(device))).cpu() for r in flat.split(batch_size)]
            answers.append((places, torch.cat(found)))
    return networks.restored(answers)


def order(networks: Points, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through the networks.

    Of one weight space at random; of many TOGETHER of one at a time, so that a batch is read in a
    few passes, and each weight space in proportion.
    """
    rng = np.random.default_rng((seed, epoch))
    drawn = torch.from_numpy(rng.permutation(len(networks)))
    if not networks.mixed:
        return drawn
    which = networks.which[drawn]
    runs = [r for n in which.unique().tolist() for r in drawn[which == n].split(TOGETHER)]
    return torch.cat([runs[i] for i in rng.permutation(len(runs))])


class _Reading(nn.Module):
    """The answers to networks of many weight spaces, part by part: what processes share."""

    def __init__(self, model: Metanetwork | Mixed) -> None:
        super().__init__()
        self.model = model

    def forward(self, parts: list[tuple[WeightSpace, Tensor]]) -> Tensor:
        found = [self.model.on(s)(s.unflatten(flat)) for s, flat in parts]
        return found[0] if len(found) == 1 else torch.cat(found)  # editors answer with no tensor


class Run:
    """One training run and its state; `fit` goes through it."""

    def __init__(
        self,
        model: Metanetwork | Mixed,
        task: ModuleType,
        schedule: Schedule,
        seed: int,
        device: str = "cpu",
        state: Path | None = None,
    ) -> None:
        self.task, self.schedule = task, schedule
        self.seed, self.device, self.state = seed, device, state
        self.team = Team.join()
        self.model = model.to(device)
        reading = _Reading(self.model)
        apart = self.team.size > 1 and not isinstance(model, Grown)
        # A batch of many architectures may leave parameters of some kinds of edges unread.
        many = isinstance(model, Mixed)
        self.reading: nn.Module = (
            nn.parallel.DistributedDataParallel(reading, find_unused_parameters=many)
            if apart
            else reading
        )
        self.history: list[dict[str, float]] = []
        self.best = -math.inf
        self.best_state = {k: v.clone() for k, v in model.state_dict().items()}

    def _optimisers(self, train: Rows) -> None:
        s = self.schedule
        decays = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(decays, lr=s.lr, weight_decay=s.weight_decay, fused=True)
        steps = max(2, s.epochs * math.ceil(len(train) / s.batch_size))
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=s.lr, total_steps=steps, pct_start=max(s.warmup, 1.5 / steps)
        )

    def fit(
        self,
        train: Rows,
        val: Rows,
        resume: bool = False,
        on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> list[dict[str, float]]:
        """Train; the model ends with the weights of its best validation epoch, or of the last where
        no epoch has a score (all targets of the validation networks are equal). Returns one row an
        epoch. Trees are grown instead, anew where a run resumes: one row a round.

        Raises InputError for data that nothing can be learned from, UsageError where the loss
        diverges, and where `resume` meets the state of another run or a damaged one.
        """
        check(train, val, self.task.TARGET)
        if isinstance(self.model, Grown):
            learn, hold = (_only(rows) for rows in (train, val))
            self.history = self.model.grow(learn, hold, self.seed, on_epoch)
            return self.history
        self._optimisers(train)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            about = self._about(train) if self.state else {}
            if resume:
                self._restore(about)
            for epoch in range(len(self.history), self.schedule.epochs):
                row = self._epoch(epoch, train, val)
                self._save(about)
                on_epoch(row)
                if self._stale():
                    break
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return self.history

    def _epoch(self, epoch: int, train: Rows, val: Rows) -> dict[str, float]:
        loss = self._pass(epoch, train)
        if not math.isfinite(loss):
            raise UsageError(
                f"the training loss is not finite in epoch {epoch + 1}",
                "lower the learning rate (--lr)",
            )
        raw = outputs(self.model, val.networks, 4 * self.schedule.batch_size, self.device)
        scores = self.task.score(self.task.answer(raw).numpy(), val.target.numpy())
        score = scores.get(self.task.METRIC, math.nan)
        row = {"epoch": epoch + 1, "loss": loss, **{f"val_{k}": v for k, v in scores.items()}}
        self.history.append(row)
        none = math.isnan(score) and self.best == -math.inf
        if score > self.best or none:
            self.best = self.best if none else score
            self.best_state = {k: v.clone() for k, v in self.model.state_dict().items()}
        return row

    def _pass(self, epoch: int, train: Rows) -> float:
        self.model.train()
        total = 0.0
        for batch in order(train.networks, self.seed, epoch).split(self.schedule.batch_size):
            # A batch of fewer networks than processes is read by all of them.
            shared = len(batch) >= self.team.size
            mine = batch[self.team.rank :: self.team.size] if shared else batch
            weight = len(mine) * self.team.size / len(batch) if shared else 1.0
            parts = list(train.networks.parts(mine))
            found = self.reading([(space, flat.to(self.device)) for space, flat, _ in parts])
            wanted = train.target[mine[torch.cat([places for _, _, places in parts])]]
            wanted = wanted.repeat_interleave(self.model.members, dim=0)
            loss = self.task.loss(found, wanted.to(self.device))
            self.optimiser.zero_grad(set_to_none=True)
            (weight * loss).backward()  # processes average gradients as if shares were equal
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.cycle.step()
            total += float(loss.detach()) * len(batch)
        return total / len(train)

    def _stale(self) -> bool:
        patience, metric = self.schedule.patience, f"val_{self.task.METRIC}"
        scores = (row.get(metric, math.nan) for row in self.history)
        values = [-math.inf if math.isnan(score) else score for score in scores]
        return bool(patience) and len(values) - int(np.argmax(values)) > patience

    def _about(self, train: Rows) -> dict[str, Any]:
        """What tells this run from another: nothing else may go on with its state."""
        shapes = {name: list(v.shape) for name, v in self.model.state_dict().items()}
        target = hashlib.sha256(train.target.numpy().tobytes()).hexdigest()
        networks = f"{train.networks.hash()} {target}"
        return {
            "schedule": asdict(self.schedule), "seed": self.seed, "design": shapes,
            "networks": networks,
        }  # fmt: skip

    def _save(self, about: dict[str, Any]) -> None:
        if self.state is None or self.team.rank:
            return
        record = {
            **about,
            "history": self.history,
            "best": self.best,
            "best_state": self.best_state,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "cycle": {k: v for k, v in self.cycle.state_dict().items() if not callable(v)},
            "generator": torch.get_rng_state(),
            "generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        held = io.BytesIO()  # torch's own writer tells nobody that the disk is full
        torch.save(record, held)
        beside(self.state, lambda path: path.write_bytes(held.getvalue()))

    def _restore(self, about: dict[str, Any]) -> None:
        if self.state is None or not self.state.is_file():
            return
        record = _read(self.state)
        other = [name for name, value in about.items() if record.get(name) != value]
        if other:
            raise UsageError(
                f"{self.state}: it was trained with another {', '.join(other)}",
                "train without --resume",
            )
        self.history, self.best = record["history"], record["best"]
        self.best_state = {k: v.to(self.device) for k, v in record["best_state"].items()}
        self.model.load_state_dict(record["model"])
        self.optimiser.load_state_dict(record["optimiser"])
        self.cycle.load_state_dict(record["cycle"])
        torch.set_rng_state(record["generator"])
        if record["generators"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(record["generators"])


def _read(state: Path) -> dict[str, Any]:
    try:
        record = torch.load(state, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        record = None
    if not isinstance(record, dict):
        raise UsageError(f"{state}: no state of a training run", "train without --resume")
    return record
