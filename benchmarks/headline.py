"""The headline of the quick study, as a table and as the README's picture: `python -m benchmarks.headline`."""

import pandas as pd

from benchmarks import keep
from cardiac_ldm.parameters import CompareParameters
from cardiac_ldm.report.figures import save_headline, tradeoff
from cardiac_ldm.report.tables import tradeoff_table
from cardiac_ldm.study import ROOT, Study

PICTURE = ROOT / "book" / "assets" / "headline.svg"
SHOWN = {
    "FD-EffNet": "FD-EffNet: distance to real hearts, lower is better",
    "denoising loss": "denoising loss on held-out patients, lower is better",
}


def main() -> None:
    """Evaluate the default budgets (or read what has been evaluated), write table and picture."""
    parameters = CompareParameters()
    study = Study(parameters)
    losses = []
    for epsilon in parameters.budgets:
        run = study.held_out_loss(epsilon)
        loss = run.metrics
        mean, half = loss["mean"], 1.96 * loss["standard_error"]
        row = {"metric": "denoising loss", "epsilon": epsilon, "value": mean, "low": mean - half, "high": mean + half}
        losses.append(row | {"n_patients": loss["n_patients"], "run": run.folder.name})
    evaluated = tradeoff_table([study.evaluated(epsilon).metrics for epsilon in parameters.budgets])
    table = pd.concat([evaluated[evaluated.metric.isin(SHOWN)], pd.DataFrame(losses)], ignore_index=True)
    save_headline(tradeoff(table, SHOWN), PICTURE)
    rows = table.assign(epsilon=[str(epsilon) for epsilon in table.epsilon]).to_dict("records")
    keep("headline", profile=parameters.profile, rows=rows)


if __name__ == "__main__":
    main()
