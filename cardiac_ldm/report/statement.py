"""The privacy statement: one page for whoever decides on a release, in the terms of NIST SP 800-226."""

import math

from cardiac_ldm.privacy import Ledger, Mechanism, Standing
from cardiac_ldm.training.selection import TUNED

_SIMULATED = (
    " **These patients are simulated**, and the noise is seeded so that the run can be repeated; for patients who "
    "aren't, it comes from the operating system."
)


def privacy_statement(ledger: Ledger, together: Standing | None = None) -> str:
    """The guarantee of a model, what it covers and what there is to decide, as Markdown.

    together: what all runs on these patients have spent by now; else what they had when this one began.
    """
    if ledger.guarantee == "public data only":
        return f"**No private patient was used.** Trained on public data only: {ledger.public_data}."
    if ledger.guarantee == "none":
        return f"**No guarantee.** Trained on {ledger.private_data} without privacy: for comparison, never for release."
    together, factor = together or ledger.together, math.exp(min(ledger.epsilon, 700))
    right = f"{_right(ledger.epsilon, ledger.delta):.1%} of cases after seeing this model"
    if together and together.runs > 1:
        known = _right(together.epsilon, together.delta)
        right += f", and {known:.1%} after seeing all {together.runs} models of these patients"
    return (
        f"**({ledger.epsilon:g}, {ledger.delta:g})-differential privacy per patient.** The guarantee compares training "
        f"on {ledger.private_data} with training on the same patients less any one of them, all volumes of theirs "
        f"included. The probability of any outcome of this model with the patient is at most e^ε = {factor:.3g} times "
        f"that without, plus an allowance of δ = {ledger.delta:g}, and the other way round. Somebody who starts at "
        "even odds that a given patient took part, and knows everybody else's data, is right about it in at most "
        f"{right}; a coin is right in 50 %."
        + (_SIMULATED if ledger.simulated else f"\n\n{_decisions(ledger, together)}")
        + f"\n\n{_table(ledger, together)}"
    )


_MEASURED = {
    "table": "all patients' attributes",
    TUNED: "the mean of all patients' features, which chooses public ones",
}
"""What mechanisms measure that aren't a training, by what they tune."""


def _right(epsilon: float, delta: float) -> float:
    """The chance of a right guess whether somebody took part, from even odds (arXiv 1311.0776)."""
    return 1.0 if epsilon > 700 else (math.exp(epsilon) + delta) / (1 + math.exp(epsilon))


def _decisions(ledger: Ledger, together: Standing | None) -> str:
    """What there is to decide on a model of real patients."""
    spent = together.epsilon if together else ledger.epsilon
    aside = "".join(f", {m.stage} by its noise alone" for m in ledger.mechanisms if m.tuned in _MEASURED)
    weak = (
        "\n- **ε above 20 is a figure without a promise**: it excludes no attack. Release only what would do no harm "
        "without a guarantee."
        if ledger.epsilon > 20
        else ""
    )
    return (
        "**To decide**\n\n"
        f"- **Which figure counts**: ε = {ledger.epsilon:g} if nothing of the other models of these patients gets out, "
        f"not even through the choice of this one's settings; else ε = {spent:.4g}, an upper limit for each patient "
        "over all models, withdrawn ones included. NIST SP 800-226 sets no limit. The authors of this software call 1 "
        f"strong; at 10 the guarantee allows right guesses in {_right(10, 0):.3%} of cases, and only the weakness of "
        f"real attacks protects.{weak}\n"
        "- **Covered**: the final weights, and whatever is computed from them without another look at the patients: "
        "synthetic volumes, their segmentations, their attributes and quality scores. It holds against anybody, with "
        "any other knowledge.\n"
        "- **Not covered**: general findings, which can say something of a patient whether or not they took part; how "
        "long the training took; data of these patients that is published in any other way. The number of places is "
        "public.\n"
        "- **Evidence**: private training is audited with made-up patients, from end to end (the study's chapter on "
        f"attacks){aside}. No attack was run on these patients: its result would itself reveal something about them.\n"
        "- **Whether it helped**: nobody looked. To compare this model with the public one on these patients would "
        "cost budget of its own; what rehearsals with public patients expect is said before a budget is spent.\n"
        "- **A patient withdraws**: name them under `exclude:` in the cohort's manifest. Models "
        "that exist can't forget them; their influence on these stays bounded by the figures above. To train again "
        "adds to the privacy loss of those who remain.\n\n"
        "| decision | released / released with conditions / not released |\n| --- | --- |\n"
        "| by, on | |\n| reasons, conditions | |"
    )


def _table(ledger: Ledger, together: Standing | None) -> str:
    counted = "not charged yet"
    if together:
        spent = f"together they spent ({together.epsilon:.4g}, {together.delta:g})"
        counted = f"{together.runs}, this one and those that only tried settings out included; {spent}"
    elif ledger.simulated:
        counted = "not counted: they are simulated"
    rows = {
        "unit": "patient",
        "neighbouring cohorts": ledger.adjacency,
        **{f"mechanism: {m.stage}": _described(m) for m in ledger.mechanisms},
        "sampler": ledger.sampler,
        "accountant": f"{ledger.accountant}, which says {ledger.epsilon_pld:.4g}; Rényi DP, a looser bound, says "
        f"{ledger.epsilon_rdp:.4g}",
        "public data": ledger.public_data,
        "models of these patients": counted,
        "released": ledger.released,
        "randomness": ledger.randomness,
        "SHA-256 of the weights": ", ".join(ledger.weights.values()) or "not there yet",
        "written": f"{ledger.date}, cardiac-ldm {ledger.version}",
    }
    return "| term | value |\n| --- | --- |\n" + "".join(f"| {term} | {value} |\n" for term, value in rows.items())


def _described(m: Mechanism) -> str:
    if m.tuned in _MEASURED:
        several = "s" * (m.steps > 1)
        return (
            f"Gaussian mechanism: {m.steps} measurement{several} of {_MEASURED[m.tuned]}, each scaled down to a fixed "
            f"norm, noise multiplier {m.noise_multiplier:.4g}"
        )
    return (
        f"DP-SGD: each patient joins a step with probability {m.sampling_rate:.4g}, {m.steps} steps, clipping "
        f"norm {m.clip:g}, noise multiplier {m.noise_multiplier:.4g}, {m.draws} noise draw(s) a volume; "
        f"trained part of the network: {m.tuned}"
    )


def joint_statement(together: Standing, private_data: str) -> str:
    """What private models of one cohort reveal together, as Markdown."""
    return (
        f"**Together, {together.runs} private model(s) of {private_data} spent "
        f"({together.epsilon:.4g}, {together.delta:g}) per patient.** Whoever sees several of them learns more than "
        "from any one; tables of attributes count as models. It's the most that any one patient has spent, those who "
        "have left since included."
    )
