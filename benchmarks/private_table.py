"""How near a private table of attributes is to the population it was learnt from: `python -m benchmarks.private_table`.

The simulated private cohort of the `laptop` profile plays the hospital: N of its train patients are drawn, and their
table measured, several times. The truth is `phantom_rehearsal`, other patients of the same population. Beside it stand
the public table, which no private patient is needed for, the same table without noise, and the N patients themselves,
who are what no table can beat. Then what the table's share of a release's budget costs the training beside it. The
alternative is Private-PGM, which fits graphical models to noisy marginals: how near its tables are at the same budgets,
and what its library (mbi) would add to the set-up. It's installed in a folder of its own, for a process of its own.
Minutes; no picture is drawn.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.stats import rankdata, wasserstein_distance
from sklearn.metrics import mutual_info_score
from tqdm import tqdm

from benchmarks import keep
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.cohort.requests import with_end_systole
from cardiac_ldm.evaluation.intervals import mean
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.privacy.accounting import calibrate
from cardiac_ldm.privacy.table import FREE, SHARE, TablePlan, fit, rows_of
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT

SIZES, BUDGETS = (80, 400, 4000), (0.1, 1.0, math.inf)
DRAWS, SAMPLED = 8, 4000
SHARES, RELEASES = (0.05, 0.1, 0.2, 0.4), (1.0, 10.0)
BINS, ITERATIONS = (8, 16), 5000
_COLUMNS = [ATTRIBUTE_NAMES.index(name) for name in FREE]
_LOW = np.array([ATTRIBUTES[i].low for i in _COLUMNS])
_RANGES = np.array([ATTRIBUTES[i].high for i in _COLUMNS]) - _LOW
_WHOLE = np.isin(FREE, ["SEX", "DEPTH"])
_PAIRS = np.triu_indices(len(FREE), 1)


def correlations(rows: np.ndarray) -> np.ndarray:
    """Rank correlations of all pairs, (55,): 0 where an attribute is the same in all rows."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(rankdata(rows, axis=0), rowvar=False))[_PAIRS]


class Truth:
    """A population, and how far rows are from it."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.pairs = rows, correlations(rows)

    def marginals(self, rows: np.ndarray) -> np.ndarray:
        """Wasserstein distance of each attribute, (11,), in its unit."""
        pairs = zip(rows.T, self.rows.T, strict=True)
        return np.array([wasserstein_distance(ours[~np.isnan(ours)], theirs) for ours, theirs in pairs])

    def errors(self, rows: np.ndarray) -> dict[str, float]:
        """Mean distance of the attributes in % of their ranges; rank correlations: mean error, and r to the truth."""
        pairs = correlations(rows[~np.isnan(rows).any(axis=1)])
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


class Marginals:
    """Counts of every attribute's bins, and of the 10 pairs of a tree: the one of most mutual information in some rows.

    Bins are cut over the fixed, public ranges; whole values have their own. Nothing may be missing.
    """

    def __init__(self, bins: int, rows: np.ndarray) -> None:
        self.sizes = np.where(_WHOLE, _RANGES + 1, bins).astype(int)
        self.low, self.widths = _LOW - 0.5 * _WHOLE, (_RANGES + _WHOLE) / self.sizes
        columns = self.levels(rows).T
        shared = np.array([[mutual_info_score(a, b) for b in columns] for a in columns])
        tree = np.argwhere(minimum_spanning_tree(-np.triu(shared, 1)).toarray())
        self.cliques = [[j] for j in range(len(FREE))] + tree.tolist()

    def levels(self, rows: np.ndarray) -> np.ndarray:
        """The bin of every value, int64 (n, 11)."""
        return np.clip((rows - self.low) // self.widths, 0, self.sizes - 1).astype(np.int64)

    def values(self, levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Values anywhere in their bins, (n, 11), whose physics holds as a table's does."""
        within = np.where(_WHOLE, 0.5, rng.random(levels.shape))
        drawn = np.full((len(levels), len(ATTRIBUTES)), np.nan)
        drawn[:, _COLUMNS] = self.low + (levels + within) * self.widths
        return with_end_systole(drawn)[:, _COLUMNS]

    def measured(self, rows: np.ndarray, sigma: float, rng: np.random.Generator) -> dict[str, Any]:
        """All counts by one Gaussian mechanism: a patient is in one bin of each, so their norm is the root of how many.

        Places bound how many patients there are, which the counts tell as a table's do.
        """
        levels, noise, counts = self.levels(rows), sigma * math.sqrt(len(self.cliques)), list[np.ndarray]()
        for clique in self.cliques:
            sizes = self.sizes[clique]
            exact = np.bincount(np.ravel_multi_index(tuple(levels[:, clique].T), tuple(sizes)), minlength=sizes.prod())
            counts.append(exact + rng.normal(0, noise, len(exact)))
        weights = np.array([1 / len(count) for count in counts])
        error, spread, places = noise**2 / weights.sum(), (0.1 * len(rows)) ** 2, len(rows)
        total = np.average([count.sum() for count in counts], weights=weights)
        total = min((total * spread + places * error) / (spread + error), places)
        return {"counts": [count.tolist() for count in counts], "total": float(total)}


def graphical(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Levels drawn from graphical models of noisy counts, and the seconds of each; for the process that has mbi."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import mbi

    domain, fits = mbi.Domain(range(len(asked["sizes"])), asked["sizes"]), list[dict[str, Any]]()
    for number, job in enumerate(asked["jobs"]):
        begun = time.perf_counter()
        pairs = zip(job["counts"], asked["cliques"], strict=True)
        counts = [mbi.LinearMeasurement(np.array(count), tuple(clique)) for count, clique in pairs]
        model = mbi.estimation.MirrorDescent().estimate(domain, counts, job["total"], iters=ITERATIONS)
        np.random.seed(number)  # noqa: NPY002 - mbi draws from it
        drawn = model.synthetic_data(SAMPLED).to_dict()
        levels = np.stack([drawn[j] for j in domain.attributes], axis=1).tolist()
        fits.append({"levels": levels, "seconds": time.perf_counter() - begun})
    return fits


def graphical_models(
    folder: str, private: np.ndarray, public: np.ndarray, truth: Truth, delta: float
) -> list[dict[str, Any]]:
    """Errors of Private-PGM, whose library is in `folder`, by bins, tree, N and epsilon.

    A tree of the private patients themselves is one that a release would have to pay for; here it's free.
    """
    settings, rows = list(product(SIZES, BUDGETS)), list[dict[str, Any]]()
    sigmas = {epsilon: 0.0 if math.isinf(epsilon) else calibrate(epsilon, delta, 1.0, 1) for epsilon in BUDGETS}
    for bins, (tree, of) in tqdm(list(product(BINS, (("public", public), ("private", private)))), desc="graphical"):
        marginals, jobs = Marginals(bins, of), list[dict[str, Any]]()
        for (n, epsilon), seed in product(settings, range(DRAWS)):
            rng = np.random.default_rng(seed)
            jobs.append(marginals.measured(rng.permutation(private)[:n], sigmas[epsilon], rng))
        asked = json.dumps({"sizes": marginals.sizes.tolist(), "cliques": marginals.cliques, "jobs": jobs})
        command = [sys.executable, "-m", "benchmarks.private_table", "graphical"]
        environment = os.environ | {"PYTHONPATH": folder}
        told = subprocess.run(
            command, cwd=ROOT, env=environment, input=asked, stdout=subprocess.PIPE, text=True, check=True
        )
        fits = json.loads(told.stdout)
        for i, (n, epsilon) in enumerate(settings):
            own = fits[i * DRAWS : (i + 1) * DRAWS]
            made = [marginals.values(np.array(fit["levels"]), np.random.default_rng(j)) for j, fit in enumerate(own)]
            about = {"bins": bins, "tree": tree, "patients": str(n)}
            about["epsilon"] = "∞" if math.isinf(epsilon) else f"{epsilon:g}"
            seconds = float(np.median([fit["seconds"] for fit in own]))
            rows.append(about | repeated(made.__getitem__, truth) | {"fit_seconds": seconds})
    return rows


def set_up(folder: str) -> dict[str, object]:
    """How long mbi takes to install with the project's constraints, and what it adds to disk beyond them."""
    known = {found.name.lower().replace("_", "-") for found in distributions()}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--target", folder]
    subprocess.run([*command, "-c", ROOT / "constraints.txt", "mbi==2.0.0"], check=True)
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
    if sys.argv[1:] == ["graphical"]:
        print(json.dumps(graphical(json.load(sys.stdin))))
        return
    study = Study(Parameters(profile="laptop"))
    elsewhere = Study(Parameters(profile="laptop", cohort_private="phantom_rehearsal"))
    public, private = (rows_of(cohort.split("train")) for cohort in (study.public, study.private))
    others = [rows_of(elsewhere.private.split(split)) for split in ("train", "validation", "test")]
    truth, delta = Truth(np.concatenate(others)), study.profile.finetune.delta
    with tempfile.TemporaryDirectory() as folder:
        alternative = set_up(folder) | {"tables": graphical_models(folder, private, public, truth, delta)}
    keep(
        "private_table",
        public_patients=len(public),
        truth_patients=len(truth.rows),
        delta=delta,
        share=SHARE,
        tables=qualities(private, public, truth, delta),
        attributes=by_attribute(private, public, truth, delta),
        shares=shares(study, len(private)),
        alternative=alternative,
    )


if __name__ == "__main__":
    main()
