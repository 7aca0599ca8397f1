"""The headline of the published study, as a table and as the README's picture: `python -m benchmarks.headline`.

What of the loss is closed, patient by patient, is read from what `benchmarks.private_recipe private` left.
"""

import json
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from benchmarks import RESULTS, keep
from cardiac_ldm.errors import StudyError
from cardiac_ldm.parameters import CompareParameters
from cardiac_ldm.report.figures import tradeoff
from cardiac_ldm.report.tables import model_name, tradeoff_table
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT

PICTURE = ROOT / "book" / "assets" / "headline.svg"
BUDGETS = "0, 0.1, 1, 10, inf"
INTERVAL = {"value": "", "low": "_low", "high": "_high"}
SHOWN = {
    "FD-EffNet": "FD-EffNet: distance to held-out patients, lower is better",
    "loss closed": "denoising loss: % of the gap closed, higher is better",
}


def save_headline(figure: go.Figure, path: Path) -> None:
    """Write a figure as a still picture, 900 pixels wide, in the format of the suffix (.svg, .png)."""
    scratch = path.with_name(f".{path.name}{path.suffix}")
    try:
        figure.write_image(scratch, width=900, height=figure.layout.height)
    except (ValueError, RuntimeError) as error:
        remedy = 'pip install "cardiac-ldm[book]"; apt-get install chromium'
        raise StudyError(f"{path}: a still picture needs kaleido and Chromium ({remedy})") from error
    scratch.replace(path)


def main() -> None:
    """Evaluate the published budgets (or read what has been evaluated), write table and picture."""
    parameters = CompareParameters.model_validate({"profile": "laptop", "epsilons": BUDGETS})
    study = Study(parameters)
    recipe = json.loads((RESULTS / "private_recipe.json").read_text())["private"]
    tuned = {row["run"]: row for row in recipe["rows"]}
    losses = []
    for epsilon in parameters.budgets:
        name = study.finetuned(epsilon).folder.name
        closed = {part: tuned[name][f"loss_closed{suffix}"] for part, suffix in INTERVAL.items()}
        about = {"metric": "loss closed", "epsilon": epsilon, "model": model_name(epsilon)}
        about |= {"n_patients": recipe["n_patients"], "run": name}
        losses.append(about | closed)
    evaluated = tradeoff_table([study.evaluated(epsilon).metrics for epsilon in parameters.budgets])
    table = pd.concat([evaluated[evaluated.metric.isin(SHOWN)], pd.DataFrame(losses)], ignore_index=True)
    save_headline(tradeoff(table, SHOWN), PICTURE)
    rows = table.assign(epsilon=[str(epsilon) for epsilon in table.epsilon]).to_dict("records")
    keep("headline", profile=parameters.profile, rows=rows)


if __name__ == "__main__":
    main()
