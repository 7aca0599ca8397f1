"""How near a private table of attributes is to the population it was learnt from: `python -m benchmarks.private_table`.

The simulated private cohort of the `laptop` profile plays the hospital: N of its train patients are drawn, and their
table measured, several times. The truth is `phantom_rehearsal`, other patients of the same population. Beside it stand
the public table, which no private patient is needed for, the same table without noise, and the N patients themselves,
who are what no table can beat. Then what the table's share of a release's budget costs the training beside it, and what
the library that fits graphical models to noisy marginals (mbi) would add to the set-up. Minutes; no picture is drawn.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, wasserstein_distance
from tqdm import tqdm

from benchmarks import keep
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.evaluation.intervals import mean
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.privacy.table import FREE, SHARE, TablePlan, fit, rows_of
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT

SIZES, BUDGETS = (80, 400, 4000), (0.1, 1.0, math.inf)
DRAWS, SAMPLED = 8, 4000
SHARES, RELEASES = (0.05, 0.1, 0.2, 0.4), (1.0, 10.0)
_COLUMNS = [ATTRIBUTE_NAMES.index(name) for name in FREE]
_RANGES = np.array([ATTRIBUTES[i].high - ATTRIBUTES[i].low for i in _COLUMNS])
_PAIRS = np.triu_indices(len(FREE), 1)


class Truth:
    """A population, and how far rows are from it."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.pairs = rows, spearmanr(rows)[0][_PAIRS]

    def marginals(self, rows: np.ndarray) -> np.ndarray:
        """Wasserstein distance of each attribute, (11,), in its unit."""
        pairs = zip(rows.T, self.rows.T, strict=True)
        return np.array([wasserstein_distance(ours[~np.isnan(ours)], theirs) for ours, theirs in pairs])

    def errors(self, rows: np.ndarray) -> dict[str, float]:
        """Mean distance of the attributes in % of their ranges; rank correlations: mean error, and r to the truth."""
        pairs = spearmanr(rows[~np.isnan(rows).any(axis=1)])[0][_PAIRS]
        return {
            "marginals": float(100 * (self.marginals(rows) / _RANGES).mean()),
            "pairs": float(np.abs(pairs - self.pairs).mean()),
            "r": float(np.corrcoef(pairs, self.pairs)[0, 1]),
        }


def repeated(made: Callable[[int], np.ndarray], truth: Truth, draws: int = DRAWS) -> dict[str, Any]:
    """Errors of rows that are made anew by each seed: mean, and its 95 % interval over seeds."""
    found = [truth.errors(made(seed)) for seed in range(draws)]
    row: dict[str, Any] = {"draws": draws}
    for name in found[0]:
        estimate = mean(np.array([one[name] for one in found]), resamples=1000, seed=0)
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def tabled(plan: TablePlan, private: np.ndarray, public: np.ndarray) -> Callable[[int], np.ndarray]:
    """Draws as many of the private rows as the plan has places, measures their table and samples it, by a seed."""

    def made(seed: int) -> np.ndarray:
        chosen = np.random.default_rng(seed).permutation(private)[: plan.n_patients]
        randomness = Randomness(seed, simulated=True, run=f"{plan.n_patients}/{plan.epsilon}")
        table = plan.measure(chosen, public, randomness)
        return table.sample(SAMPLED, np.random.default_rng(seed))[:, _COLUMNS]

    return made


def qualities(private: np.ndarray, public: np.ndarray, truth: Truth, delta: float) -> list[dict[str, Any]]:
    """Errors by N and epsilon, first of the public table and of the patients themselves."""
    of_public = fit(public)
    rows = [
        {"table": "public patients' table", "patients": "–", "epsilon": "0"}
        | repeated(lambda seed: of_public.sample(SAMPLED, np.random.default_rng(seed))[:, _COLUMNS], truth)
    ]
    progress = tqdm(total=len(SIZES) * (len(BUDGETS) + 1), desc="tables")
    for n in SIZES:
        for epsilon in BUDGETS:
            plan, word = TablePlan.for_budget(epsilon, delta, n), "without noise" if math.isinf(epsilon) else "private"
            about = {"table": word, "patients": str(n), "epsilon": "∞" if math.isinf(epsilon) else f"{epsilon:g}"}
            rows.append(about | repeated(tabled(plan, private, public), truth))
            progress.update()
        about = {"table": "the patients themselves", "patients": str(n), "epsilon": "∞"}
        rows.append(about | repeated(lambda seed, n=n: np.random.default_rng(seed).permutation(private)[:n], truth))
        progress.update()
    return rows


def by_attribute(private: np.ndarray, public: np.ndarray, truth: Truth, delta: float) -> list[dict[str, Any]]:
    """Wasserstein distance of every attribute in its unit, for 400 patients: mean over seeds."""
    plans = {f"eps_{epsilon:g}".replace(".", "_"): TablePlan.for_budget(epsilon, delta, 400) for epsilon in BUDGETS}
    found = {"public": truth.marginals(fit(public).sample(SAMPLED, np.random.default_rng(0))[:, _COLUMNS])}
    for name, plan in plans.items():
        made = tabled(plan, private, public)
        found[name] = np.mean([truth.marginals(made(seed)) for seed in range(DRAWS)], axis=0)
    units = [ATTRIBUTES[i].unit for i in _COLUMNS]
    return [
        {"attribute": name, "unit": units[j]} | {kind: float(values[j]) for kind, values in found.items()}
        for j, name in enumerate(FREE)
    ]


def shares(study: Study, places: int) -> list[dict[str, Any]]:
    """By how many per cent a table's share of a release's epsilon raises the noise of the training beside it."""
    recipe, rows = study.profile.finetune, list[dict[str, Any]]()
    for epsilon in RELEASES:
        alone = recipe.plan(epsilon, recipe.delta, places).noise_multiplier
        for share in SHARES:
            plan = TablePlan.for_budget(share * epsilon, recipe.delta, places)
            beside = recipe.plan(epsilon, recipe.delta, places, plan.mechanisms)
            noise = 100 * (beside.noise_multiplier / alone - 1)
            rows.append({"epsilon": f"{epsilon:g}", "share": share, "places": places, "noise": noise})
    return rows


def set_up() -> dict[str, object]:
    """How long mbi takes to install with the project's constraints, and what it adds to disk beyond them."""
    known = {found.name.lower().replace("_", "-") for found in distributions()}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "-c", ROOT / "constraints.txt"]
        subprocess.run([*command, "mbi==2.0.0"], check=True)
        seconds = time.perf_counter() - begun
        added = {
            found.name: sum(Path(str(found.locate_file(file))).stat().st_size for file in found.files or ()) / 1e6
            for found in distributions(path=[folder])
            if found.name.lower().replace("_", "-") not in known
        }
    return {
        "library": "mbi 2.0.0",
        "seconds": seconds,
        "megabytes": sum(added.values()),
        "largest": max(added.items(), key=lambda x: x[1])[0],
    }


def main() -> None:
    """Measure all, keep the rows."""
    study = Study(Parameters(profile="laptop"))
    elsewhere = Study(Parameters(profile="laptop", cohort_private="phantom_rehearsal"))
    public, private = (rows_of(cohort.split("train")) for cohort in (study.public, study.private))
    others = [rows_of(elsewhere.private.split(split)) for split in ("train", "validation", "test")]
    truth, delta = Truth(np.concatenate(others)), study.profile.finetune.delta
    keep(
        "private_table",
        public_patients=len(public),
        truth_patients=len(truth.rows),
        delta=delta,
        share=SHARE,
        tables=qualities(private, public, truth, delta),
        attributes=by_attribute(private, public, truth, delta),
        shares=shares(study, len(private)),
        alternative=set_up(),
    )


if __name__ == "__main__":
    main()
