"""Runs: what a stage leaves in a folder of its own, which its key names, once it's complete.

A stage is declared once, as a method of `Study` under `stage`. Its key hashes what the result depends on: settings, the
keys of what it needs, the seed and the stage's version, which is raised where its code computes something else. So the
same thing is never computed twice, and a changed one never reuses a result. `metrics.json` is written last.
"""

import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock
from pydantic import BaseModel
from torch import nn

from cardiac_ldm.cohort import Volumes
from cardiac_ldm.models.device import is_first_process, shared_decision, wait_for_all
from cardiac_ldm.privacy import Ledger
from cardiac_ldm.progress import awaited
from cardiac_ldm.training.checkpoint import load_weights, save_weights


@dataclass(frozen=True)
class Run:
    """A stage's folder. key: of all that it depends on."""

    stage: str
    key: str
    folder: Path

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return json.loads((self.folder / "metrics.json").read_text())

    @property
    def done(self) -> bool:
        """Whether it's complete."""
        return (self.folder / "metrics.json").exists()

    @property
    def ledger(self) -> Ledger:
        """What the model's training spent; it must be there, and be of these weights."""
        return Ledger.load(self.folder / "privacy.json")

    @property
    def volumes(self) -> Volumes:
        """The synthetic cohort that the stage drew."""
        return Volumes.load(self.folder / "synthetic.npz")

    @property
    def state(self) -> Path:
        """Where a training keeps what it needs to go on after a kill."""
        return self.folder / "state.pt"

    def table(self, name: str) -> pd.DataFrame:
        """A table that the stage left as `name`.csv."""
        return pd.read_csv(self.folder / f"{name}.csv")

    def load(self, module: nn.Module, name: str = "weights") -> Any:  # noqa: ANN401
        """Give a module the weights that the stage left, in evaluation mode."""
        load_weights(module, self.folder / f"{name}.safetensors")
        return module.eval()

    def read(self, name: str) -> Any:  # noqa: ANN401
        """An object that the stage kept."""
        return pickle.loads((self.folder / f"{name}.pkl").read_bytes())

    def keep(self, name: str, content: object) -> None:
        """Write any object, for `read`."""
        (self.folder / f"{name}.pkl").write_bytes(pickle.dumps(content))

    def leave(self, **contents: nn.Module | pd.DataFrame | Volumes) -> None:
        """Write each by its name: weights, tables, a synthetic cohort."""
        for name, content in contents.items():
            if isinstance(content, nn.Module):
                save_weights(content, self.folder / f"{name}.safetensors")
            elif isinstance(content, pd.DataFrame):
                content.to_csv(self.folder / f"{name}.csv", index=False)
            else:
                content.save(self.folder / f"{name}.npz")


@dataclass(frozen=True)
class Stage:
    """How a stage is declared, and done. Of a `Study` it's the run, or what gives the run for the stage's arguments.

    Attributes:
        work: what it does in an unfinished run: gives the metrics.
        name: of its folders.
        version: raised where its code computes something else.
        settings: names in the profile.
        needs: names in the study: cohorts and stages. Those that take arguments are given each of the stage's own.
        title: what progress calls it.
        together: torchrun's processes do it side by side; the first one alone writes.
    """

    work: Callable[..., Mapping[str, Any]]
    name: str
    version: int
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    title: str = ""
    together: bool = False
    arguments: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", tuple(inspect.signature(self.work).parameters)[2:])
        object.__setattr__(self, "__doc__", self.work.__doc__)

    def __get__(self, study: Any, owner: type) -> Any:  # noqa: ANN401
        if study is None:
            return self
        return partial(self.done, study) if self.arguments else self.done(study)

    def done(self, study: Any, *arguments: Any) -> Run:  # noqa: ANN401
        """The finished run, which is done here if it isn't yet; whatever it needs is done first."""
        with awaited(self.title or self.name):
            return study.shipped(self) or self.complete(study, self.described(study, *arguments), *arguments)

    def planned(self, study: Any, *arguments: Any) -> Run:  # noqa: ANN401
        """The run, done or not; what it needs is done first."""
        return place(study.runs, self.name, self.described(study, *arguments))

    def described(self, study: Any, *arguments: Any) -> dict[str, object]:  # noqa: ANN401
        """What the key hashes."""
        given = [float(x) if isinstance(x, int) else x for x in arguments if not isinstance(x, Run)]
        upstream = [need.key for need in arguments if isinstance(need, Run)]
        for name in self.needs:
            need = getattr(study, name)
            upstream += [need.key] if hasattr(need, "key") else [need(argument).key for argument in arguments]
        settings = {name: plain(attrgetter(name)(study.profile)) for name in self.settings}
        described = {"stage": self.name, "version": self.version, "settings": settings, "seed": study.seed}
        return described | {"arguments": [plain(argument) for argument in given], "upstream": upstream}

    def complete(self, study: Any, described: object, *arguments: Any) -> Run:  # noqa: ANN401
        """Do what is missing of the run whose key hashes this description. Two processes never do the same work."""
        run = place(study.runs, self.name, described)
        if run.done and not self.together:
            return run
        if self.together and not is_first_process():
            if shared_decision():
                self.work(study, run, *arguments)
                wait_for_all()  # until it's written
            return run
        run.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(run.folder / "lock"):
            missing = shared_decision(not run.done) if self.together else not run.done
            if missing:
                print(f"{self.name}: not done yet with these settings; running it in {run.folder.name}")
                (run.folder / "settings.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
                metrics = self.work(study, run, *arguments)
                temporary = run.folder / "metrics.tmp"
                temporary.write_text(json.dumps(metrics, indent=1))
                temporary.replace(run.folder / "metrics.json")
                for state in run.folder.glob("*.pt"):
                    state.unlink()
                if self.together:
                    wait_for_all()
        return run


def stage(name: str, version: int, **declared: Any) -> Callable[[Callable[..., Mapping[str, Any]]], Any]:  # noqa: ANN401
    """Declare a method of `Study`, work(study, run, *arguments), as a stage: see `Stage`."""
    return lambda work: Stage(work, name, version, **declared)


def place(runs: Path, name: str, described: object) -> Run:
    """The run whose key hashes this description."""
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    return Run(name, key, runs / f"{name}-{key}")


def plain(settings: object) -> object:
    """Settings as JSON knows them; an infinite budget becomes a word."""
    if isinstance(settings, BaseModel):
        return settings.model_dump(mode="json")
    return str(settings) if isinstance(settings, float) and settings == float("inf") else settings
