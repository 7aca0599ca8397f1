"""What a workflow is asked for (`snakemake --config NAME=VALUE ...`), checked before anything is scheduled."""

import base64
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from cardiac_ldm.errors import ParameterError, PrivacyError

ENCODED = "encoded"
"""The setting in which the workflow hands its others to the jobs of a cluster."""


@dataclass(frozen=True)
class WorkflowSettings:
    """The parameters of the notebooks, as text.

    budgets: the private ones in rising order, as file names have them. digest: of the profile and the manifests, as
    chapters are run again when one of them changes. secret: whether the private patients are real.
    """

    parameters: Mapping[str, str]
    budgets: list[str]
    digest: str
    secret: bool

    @classmethod
    def read(cls, config: Mapping[str, object]) -> Self:
        """Check a workflow's config by the rules of the notebooks' own parameters.

        Every name is one of `CompareParameters`, with `epsilons` the private budgets: the public model (0) is always
        compared with them, and the one with no privacy (inf) where the private cohort is simulated.

        Raises:
            StudyError: a name is unknown or a value is wrong; the message says what is expected.
        """
        if ENCODED in config:  # by this very method, before the job was submitted
            return cls(**json.loads(base64.b64decode(str(config[ENCODED]))))
        # They bring torch, for which every job would wait.
        from cardiac_ldm.cohort import load_manifest
        from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER
        from cardiac_ldm.parameters import CompareParameters
        from cardiac_ldm.profile import PROFILES, Profile

        logging.getLogger().handlers.clear()  # one of them adds one: all would be said twice
        if unknown := [name for name in config if name not in CompareParameters.model_fields]:
            known = ", ".join(CompareParameters.model_fields)
            raise ParameterError(f"{unknown[0]}: the workflow has no such setting; it takes {known}")
        given = {name: _text(name, value) for name, value in config.items()}
        epsilons = given.pop("epsilons", "1,10")
        numbers = {name: int(value) for name, value in given.items() if name == "seed" and value.isdecimal()}
        checked = CompareParameters.read({**given, **numbers, "epsilons": epsilons})
        Profile.load(checked.profile)
        private = [epsilon for epsilon in dict.fromkeys(checked.budgets) if epsilon > 0]
        if not private:
            raise ParameterError(f"epsilons: {epsilons!r} has no budget above 0; the public model (0) is there anyhow")
        _, cohort = map(load_manifest, (checked.cohort_public, checked.cohort_private))
        if cohort.secret and math.inf in private:
            raise PrivacyError(f"epsilons: inf on {cohort.name} would reveal real private patients; give finite ones")
        if not cohort.secret and math.inf not in private:
            private.append(math.inf)
        cohorts = (checked.cohort_public, checked.cohort_private)
        places = [(checked.profile, PROFILES), *((name, MANIFEST_FOLDER) for name in cohorts)]
        files = [Path(n) if n.endswith((".yaml", ".yml")) else folder / f"{n}.yaml" for n, folder in places]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        return cls({"profile": checked.profile, **given}, list(map(budget_name, private)), digest, cohort.secret)

    @property
    def encoded(self) -> list[str]:
        """The settings as `--config` takes them, in letters that no shell and no scheduler on the way changes."""
        return [f"{ENCODED}={base64.b64encode(json.dumps(asdict(self)).encode()).decode()}"]

    @property
    def name(self) -> str:
        """The profile's, for folders."""
        return re.sub(r"[^\w.-]+", "-", Path(self.parameters["profile"]).stem)

    @property
    def would_spend(self) -> list[str]:
        """The command that looks at all budgets of real patients before one of them is spent; nothing otherwise."""
        named = {name: value for name, value in self.parameters.items() if name not in ("seed", "spend")}
        requested = named | {"epsilons": ",".join(self.budgets)}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in requested.items()]
        return [sys.executable, "-m", "cardiac_ldm.privacy", "would-spend", *options] if self.secret else []

    def papermill(self, **budgets: str) -> list[str]:
        """The arguments that give a notebook its parameters, with `epsilon` or `epsilons` where it takes them."""
        taken = {name: value for name, value in self.parameters.items() if budgets or name != "spend"}
        numbers = {name: value for name, value in taken.items() if name in ("seed", "spend")} | budgets
        texts = {name: value for name, value in taken.items() if name not in numbers}
        parts = [("-r", *item) for item in texts.items()] + [("-p", *item) for item in numbers.items()]
        return [part for three in parts for part in three]


def _text(name: str, value: object) -> str:
    """A value as it was typed; Snakemake has made numbers of some, and lists of what a config file lists."""
    parts = value if isinstance(value, list) else [value]
    if not parts or any(part is None or isinstance(part, list | dict) or part == "" for part in parts):
        raise ParameterError(f"{name}: is empty or no plain value; leave it out, or give it as {name}=VALUE")
    text = ",".join(map(str, parts))
    if not text.isprintable():
        raise ParameterError(f"{name}: {text!r} has a character that can't be printed; leave it out")
    return text


def budget_name(epsilon: float) -> str:
    """A budget as its files are named: 1, 0.1, 1e-05, inf."""
    return repr(float(epsilon)).removesuffix(".0")


def only_workflow(runs: Path) -> FileLock:
    """Hold `runs` for one workflow at a time; the lock ends with its process, however that ends.

    Raises:
        ParameterError: another workflow runs.
    """
    runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(runs / "workflow.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ParameterError(f"{runs}: a study is running here already; wait for it, or stop it") from error
    return lock


def forget_killed() -> None:
    """Remove the locks that a killed workflow left in this folder; for whoever holds the `only_workflow` lock."""
    for left in Path(".snakemake", "locks").glob("*"):
        left.unlink()


def runs_folder() -> Path:
    """Where runs are kept: as `Study` has it."""
    return Path(os.environ.get("CARDIAC_LDM_RUNS", "runs"))
