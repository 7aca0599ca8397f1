"""The headline of the quick study, as a table and as the README's picture: `python -m benchmarks.headline`."""

import json
from pathlib import Path

from cardiac_ldm.report.figures import save_headline, tradeoff
from cardiac_ldm.report.tables import tradeoff_table
from cardiac_ldm.study import ROOT, CompareParameters, Study

RESULT, PICTURE = Path(__file__).parent / "results" / "headline.json", ROOT / "book" / "assets" / "headline.svg"
SHOWN = {
    "FD-EffNet": "FD-EffNet: distance to real hearts, lower is better",
    "correlation LVEDV": "r of LV volume asked for and drawn, higher is better",
}


def main() -> None:
    """Evaluate the default budgets (or read what has been evaluated), write table and picture."""
    parameters = CompareParameters()
    study = Study(parameters)
    table = tradeoff_table([study.evaluated(epsilon).metrics for epsilon in parameters.budgets])
    save_headline(tradeoff(table, {name: title for name, title in SHOWN.items() if name in set(table.metric)}), PICTURE)
    rows = table[table.metric.isin(SHOWN)].astype({"epsilon": str}).to_dict("records")
    result = {"benchmark": "headline", "profile": parameters.profile, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
