"""Which private recipe teaches most, and what the chosen one reaches: `python -m benchmarks.private_recipe [PART]`.

rehearsal: a second PUBLIC phantom population of 4,000 patients (`phantom_rehearsal`) plays the private one, so that
nothing is chosen on private patients, simulated or not. Every recipe starts from the `laptop` profile's public model
(the one that is shipped, where it is); what it is worth is the change of the denoising loss on held-out rehearsal
patients, patient by patient, with the same timesteps and noise. A rehearsal draws lots of a sixth of the recipe's
size with a sixth of its noise: what privacy adds to the mean gradient is the same, what sampling adds is more, and
nothing is claimed for it. First, how much of a mean gradient each part of the network holds, and how much noise it
would get (half an hour or more; resumable).

subspace: the same with the directions of a public subspace, beside the weights that were tuned before it. What was
rehearsed of it from the public model of one cycle is kept as first_cycle, as is the rehearsal above; first_study is the
part below of that model, tuned by its edges.

selection: the same once public patients who were chosen privately have taught the model again: how far chances may
leave uniform ones, how long they teach, and, as a control, as many steps on all public patients alike.

private: the profile's recipe, frozen, runs on the simulated private cohort at every budget. Beside it stand all weights
trained from scratch at epsilon 10, all weights tuned with no noise, and the recipe after a selection. On test patients:
the Frechet distance, and the part of the way from the public model to the one that was tuned with no noise (epsilon
inf, the same recipe) that each model has gone (hours; resumable).
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import RESULTS, keep
from cardiac_ldm.cohort import Patients
from cardiac_ldm.evaluation.intervals import Estimate, bootstrap, mean
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import PrivatePlan, Randomness
from cardiac_ldm.privacy.accounting import epsilon_pld, terms_of
from cardiac_ldm.study import Run, Study
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import Latents, held_out_loss, random_loss
from cardiac_ldm.training.selection import SelectionSettings
from cardiac_ldm.training.subspace import SubspaceSettings

N_VALIDATION = 100
SHARE = 6
"""A rehearsal draws this part of a recipe's lots, with this part of its noise."""
N_GRADIENTS = 192
"""Patients from whom the mean gradient is estimated."""
BASE = {"tuned": "edges", "learning_rate": 1e-3, "steps": 20, "expected_batch": 384, "draws": 1, "average_decay": 0.9}
BASE |= {"clip": 0.1, "subspace": None, "selection": None}
ALL = {"tuned": "all", "learning_rate": 1e-3, "clip": 0.3, "subspace": None, "selection": None}


@dataclass(frozen=True)
class Recipe:
    """The budget, and what differs from the base recipe."""

    epsilon: float
    changes: Mapping[str, object] = field(default_factory=dict)


GRID = [
    Recipe(math.inf),
    Recipe(math.inf, {"tuned": "head"}),
    Recipe(math.inf, {"tuned": "head", "learning_rate": 3e-3}),
    Recipe(1),
    Recipe(1, {"tuned": "head"}),
    Recipe(1, {"tuned": "head", "learning_rate": 3e-3}),
    Recipe(10),
    Recipe(10, {"tuned": "head"}),
    Recipe(10, {"tuned": "head", "learning_rate": 3e-3}),
    Recipe(1, {"tuned": "head", "draws": 2}),
    Recipe(1, {"learning_rate": 5e-4}),
    Recipe(math.inf, ALL),
    Recipe(10, ALL),
    Recipe(1, ALL),
    Recipe(10, {"tuned": "lora-4", "clip": 0.3}),
    Recipe(10, {"tuned": "attention"}),
    Recipe(10, {"learning_rate": 2e-3}),
    Recipe(1, {"timesteps": ((30, 150, 1.0),)}),
]
PUBLIC = {"dimensions": 384, "patients": 400, "draws": 8, "power": 0.25}
ALONG = {"tuned": "subspace", "subspace": SubspaceSettings.model_validate(PUBLIC), "learning_rate": 3.0, "clip": 0.03}
FASTER = ALONG | {"learning_rate": 6.0}
MANY = SubspaceSettings.model_validate(PUBLIC | {"dimensions": 10_000, "apart": True})
APART = FASTER | {"subspace": MANY}
ALIKE = 1e9
"""So much doubt leaves all public patients the same chances."""


SELECTED = SelectionSettings(share=0.5, doubt=1.0, steps=1500, learning_rate=1e-3)


def selected(**changes: float) -> dict[str, object]:
    """A recipe along directions, after a selection."""
    return APART | {"selection": SELECTED.model_copy(update=changes)}


SELECTION = [
    Recipe(1, APART),
    Recipe(1, selected()),
    Recipe(1, selected(doubt=ALIKE)),
    Recipe(0.1, selected()),
    Recipe(10, selected()),
    Recipe(1, selected(doubt=0.3)),
    Recipe(1, selected(doubt=3.0)),
]
SUBSPACE = [Recipe(1), Recipe(1, ALONG), Recipe(1, FASTER), Recipe(10, FASTER), Recipe(1, APART), Recipe(10, APART)]
GRIDS = {"rehearsal": GRID, "subspace": SUBSPACE, "selection": SELECTION}


def signal(study: Study) -> list[dict[str, object]]:
    """How much of the mean clipped gradient lies in what may be tuned, and how it compares with the noise it'd get."""
    patients, model = study.private.split("train")[:N_GRADIENTS], study.denoiser(study.pretrained)
    latents = study.latents(patients, study.private)
    attributes, parameters = torch.from_numpy(patients.attributes), model.tunable("all")
    settings = study.profile.finetune.model_copy(update=BASE)
    plans = [settings.plan(epsilon, settings.delta, len(study.private.split("train"))) for epsilon in (10, 1)]
    gradients = []
    for patient in tqdm(range(len(patients)), desc="gradients"):
        own, generator = np.flatnonzero(patients.patient_index == patient), torch.Generator().manual_seed(patient)
        loss = random_loss(model, torch.from_numpy(latents[own]), attributes[own], generator).mean()
        parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        gradients.append(dict(zip(parameters, parts, strict=True)))
    rows: list[dict[str, object]] = []
    for tuned in ("all", "edges", "head", "attention", "attributes"):
        names = list(deepcopy(model).tunable(tuned))
        flat = torch.stack([torch.cat([gradient[name].flatten() for name in names]) for gradient in gradients])
        norms = flat.norm(dim=1)
        clip = float(norms.median())
        clipped = flat * (clip / norms).clamp(max=1)[:, None]
        total, pairs = clipped.sum(dim=0), len(clipped) * (len(clipped) - 1)
        signal = math.sqrt(
            max(float(total @ total - clipped.square().sum()) / pairs, 0.0)
        )  # no patient with themselves
        row: dict[str, object] = {
            "tuned": tuned,
            "parameters": len(flat.T),
            "median_norm": clip,
            "mean_gradient": signal,
        }
        for plan in plans:
            noise = plan.noise_multiplier * clip / plan.expected_batch * math.sqrt(len(flat.T))
            row |= {f"noise_{plan.epsilon:g}": noise, f"run_{plan.epsilon:g}": signal * math.sqrt(plan.steps) / noise}
        rows.append(row)
    return rows


def _share(public: np.ndarray, tuned: np.ndarray, unbounded: np.ndarray, chosen: np.ndarray) -> float:
    """How much of the public model's excess loss over the unbounded one's has gone, in per cent."""
    return float(100 * (public - tuned)[chosen].mean() / (public - unbounded)[chosen].mean())


def part_of(plan: PrivatePlan) -> PrivatePlan:
    """A plan of a sixth of the batch with a sixth of the noise, which states what it spends itself."""
    batch, noise = plan.expected_batch // SHARE, plan.noise_multiplier / SHARE
    smaller = replace(plan, expected_batch=batch, noise_multiplier=noise)
    terms = terms_of(smaller.mechanisms("denoiser", "")) if noise else ()
    return replace(smaller, epsilon=epsilon_pld(terms, plan.delta, 1e-3) if noise else math.inf)


def _shown(value: object) -> str:
    return "∞" if value == ALIKE else f"{value:g}" if isinstance(value, float | int) else str(value)


def rehearse(part: str, grid: Sequence[Recipe]) -> dict[str, object]:
    """Run what has not been run yet; one row a recipe, kept as soon as it's there. A row of the very same run stays."""
    study = Study(Parameters(profile="laptop", cohort_private="phantom_rehearsal"))
    train, validation = study.private.split("train"), study.private.split("validation")[:N_VALIDATION]
    latents, held_out = study.latents(train, study.private), study.latents(validation, study.private)
    randomness = Randomness(0, simulated=True)
    before = held_out_loss(study.denoiser(study.pretrained), held_out, validation)
    about: dict[str, Any] = {"run": study.pretrained.key, "public_loss": float(before.mean())}
    about |= {"n_patients": len(validation), "patients": len(train)}
    about |= {"signal": signal(study)} if part == "rehearsal" else {"public": PUBLIC}
    print(about, flush=True)
    known, rows = kept_rows(part), list[dict[str, Any]]()
    for recipe in tqdm(grid, desc="recipes"):
        settings = study.profile.finetune.model_copy(update=BASE | dict(recipe.changes))
        described = json.dumps([str(recipe.epsilon), study.private.key, settings.model_dump(mode="json")])
        key = hashlib.sha256(described.encode()).hexdigest()[:12]
        folder = study.runs / "recipes" / f"{study.pretrained.key}-{key}"
        plan, along = settings.plan(recipe.epsilon, settings.delta, len(train)), settings.subspace
        told = {
            "epsilon": str(recipe.epsilon),
            **{name: str(value) for name, value in (BASE | dict(recipe.changes)).items()},
            "directions": str(along.dimensions) if along else "–",
            "of": ("tensors" if along.apart else "network") if along else "–",
            **{
                f"selection_{name}": _shown(getattr(settings.selection, name, "–"))
                for name in SelectionSettings.model_fields
            },
            "clip": f"{settings.clip:g}",
            "timesteps": ", ".join(f"{low}–{high}" for low, high, _ in settings.timesteps),
            "run": folder.name,
            "noise_multiplier": plan.noise_multiplier,
        }
        if folder.name in known:
            rows.append(known[folder.name] | told)
            continue
        smaller = part_of(plan)
        model = study.denoiser(study.pretrained)
        study.profile = study.profile.model_copy(update={"finetune": settings})
        finetune(model, train, latents, smaller, settings, randomness, folder, "phantom_public", *study.load_public())
        change = held_out_loss(model.eval(), held_out, validation) - before
        worth = mean(change, resamples=1000, seed=0)
        told |= {"change_milli": 1000 * worth.value, "low_milli": 1000 * worth.low, "high_milli": 1000 * worth.high}
        rows.append(told | {"better_patients": float((change < 0).mean())})
        print(rows[-1], flush=True)
        keep_part(part, about | {"rows": with_others(rows, known)})
    return about | {"rows": rows}


def _step(study: Study, epsilon: float) -> float:
    """The step size that a budget's noise allows."""
    recipe = study.profile.finetune
    return recipe.step_size(recipe.plan(epsilon, recipe.delta, len(study.private.split("train"))))


def run_private() -> dict[str, object]:
    """Tune and evaluate what has not been; one row a model. A row that was kept of the very same run stays."""
    study, whole, scratch, chosen = (Study(Parameters(profile="laptop")) for _ in range(4))
    selection = study.profile.finetune.model_copy(update={"selection": SELECTED})
    chosen.profile = study.profile.model_copy(update={"finetune": selection})
    everything = study.profile.finetune.model_copy(update=ALL)
    untrained = study.profile.pretrain.model_copy(update={"steps": 0, "further": ()})
    whole.profile = study.profile.model_copy(update={"finetune": everything})
    scratch.profile = whole.profile.model_copy(update={"pretrain": untrained})
    models = [(study, 0.0), (study, math.inf), (study, 10.0), (study, 1.0), (study, 0.1), (whole, math.inf)]
    test = study.private.split("test")
    latents = study.latents(test, study.private)
    about: dict[str, Any] = {"n_patients": len(test), "patients": len(study.private.split("train"))}
    about |= {f"ceiling_{key}": value for key, value in _distance(study.ceiling).items()}
    known, rows, losses = kept_rows("private"), list[dict[str, Any]](), list[np.ndarray]()
    about["scratch"], before = _of_scratch(scratch, 10.0, latents, test), kept_rows("private", "selected")
    about["selected"] = [*before.values()]
    for owner, epsilon in models:
        run = owner.finetuned(epsilon)
        losses.append(held_out_loss(owner.denoiser(run), latents, test))
        row = {
            "epsilon": str(epsilon),
            "tuned": "nothing" if epsilon == 0 else owner.profile.finetune.tuned,
            "expected_batch": owner.profile.finetune.expected_batch if epsilon else "",
            "step": _step(owner, epsilon) if epsilon else "",
            "run": run.folder.name,
            "loss": float(losses[-1].mean()),
            **(_fd(known.get(run.folder.name, {}) if owner is whole else {}) or _distance(owner.evaluated(epsilon))),
        }
        rows.append(row)
        public, unbounded = rows[0], rows[min(1, len(rows) - 1)]
        closed = partial(_share, losses[0], losses[-1], losses[min(1, len(rows) - 1)])
        worth = (
            bootstrap(closed, len(test), resamples=1000, seed=0)
            if len(rows) > 1
            else Estimate(0.0, 0.0, 0.0, len(test))
        )
        row |= {"loss_closed": worth.value, "loss_closed_low": worth.low, "loss_closed_high": worth.high}
        gap = public["fd"] - unbounded["fd"]
        row |= {
            "fd_closed": 100 * (public["fd"] - row["fd"]) / gap if gap else 0.0,
            "fd_over_public": row["fd"] / public["fd"],
        }
        if epsilon and owner is study:
            row |= _beyond_public(study, epsilon)
        print(row, flush=True)
        keep_part("private", about | {"rows": with_others(rows, known)})
    about["selected"] = with_others([_of_selection(chosen, 1.0, losses[0], latents, test)], before)
    return about | {"rows": rows}


def _beyond_public(study: Study, epsilon: float) -> dict[str, float]:
    """By how much the distance of a budget's model differs from the public one's, request by request."""
    found = study.differing(epsilon, 0.0).table("differences").query("metric == 'FD-EffNet'").iloc[0]
    return {f"fd_change{end}": float(found[end.strip("_") or "value"]) for end in ("", "_low", "_high")}


def _of_selection(study: Study, epsilon: float, public: np.ndarray, latents: Latents, test: Patients) -> dict[str, Any]:
    """What the recipe reaches after a selection, and by how much that changes each patient's loss x 1000."""
    run = study.finetuned(epsilon)
    own = held_out_loss(study.denoiser(run), latents, test)
    worth = mean(1000 * (own - public), resamples=1000, seed=0)
    found = {"change": worth.value, "change_low": worth.low, "change_high": worth.high, "loss": float(own.mean())}
    found |= _distance(study.evaluated(epsilon)) | _beyond_public(study, epsilon)
    return {"epsilon": str(epsilon), "run": run.folder.name, **SELECTED.model_dump(), **found}


def _of_scratch(study: Study, epsilon: float, latents: Latents, test: Patients) -> dict[str, Any]:
    """What all weights reach that are trained from scratch: it isn't on the way from the public model to any."""
    run = type(study).trained_privately.planned(study, epsilon)
    path = RESULTS / "private_recipe.json"
    known = json.loads(path.read_text()).get("private", {}).get("scratch", {}) if path.exists() else {}
    if known.get("run") == run.folder.name:
        return dict(known)
    loss = held_out_loss(study.denoiser(study.finetuned(epsilon)), latents, test).mean()
    found = _distance(study.evaluated(epsilon))
    return {"epsilon": str(epsilon), "run": run.folder.name, "loss": float(loss), **found}


def _fd(row: Mapping[str, Any]) -> dict[str, float]:
    """The distance in a row that is known of the very same run."""
    return {name: row[name] for name in ("fd", "fd_low", "fd_high", "fd_floor") if name in row}


def _distance(run: Run) -> dict[str, float]:
    """FD-EffNet of an evaluation with its interval, and the floor that held-out patients reach."""
    row = next(row for row in run.metrics["rows"] if row["metric"] == "FD-EffNet")
    return {"fd": row["value"], "fd_low": row["low"], "fd_high": row["high"], "fd_floor": row["reference"]}


def kept_rows(part: str, name: str = "rows") -> dict[str, dict[str, Any]]:
    """The rows of a part that are known, by the run that each is of."""
    path = RESULTS / "private_recipe.json"
    rows = json.loads(path.read_text()).get(part, {}).get(name, []) if path.exists() else []
    return {row["run"]: row for row in rows if "run" in row}


def with_others(rows: list[dict[str, Any]], known: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows so far, and what is known of others: a script that is stopped forgets nothing."""
    return rows + [row for run, row in known.items() if run not in {row["run"] for row in rows}]


def keep_part(part: str, found: Mapping[str, object]) -> None:
    """Write one part's results beside what is known of the other."""
    path = RESULTS / "private_recipe.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    keep(
        "private_recipe",
        **{name: known[name] for name in known if name != "benchmark"} | {part: found},
    )


def main() -> None:
    """Measure the parts that are asked for, or all."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="*", choices=[*GRIDS, "private", []], help="all unless told")
    for part in arguments.parse_args().parts or [*GRIDS, "private"]:
        grid = GRIDS.get(part)
        keep_part(part, rehearse(part, grid) if grid else run_private())


if __name__ == "__main__":
    main()
