"""What an epsilon of volumes means for the patient who gives two: `python -m benchmarks.volume_level` (seconds).

The paper (Daum et al., arXiv 2407.16405) counts volumes. For 20,000 of them, lots of 256, 150 epochs, and noise that
spends somewhat less than epsilon 10 and 1 for a volume, this keeps what the same training spends for a patient.
"""

from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import binom

from benchmarks import keep
from cardiac_ldm.privacy.accounting import epsilon_pld

VOLUMES, LOT, EPOCHS, DELTA = 20_000, 256, 150, 1e-5
NOISE_MULTIPLIERS = (0.9905, 5.703)


def epsilon_of_group(noise_multiplier: float, rate: float, steps: int, delta: float, size: int) -> float:
    """Epsilon of `size` units together, such as all volumes of a patient where the unit is the volume.

    Each joins a lot on its own, so a step sees Binomial(size, rate) of them: a mixture of Gaussians.
    """
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise_multiplier,
        sensitivities=range(size + 1),
        sampling_probs=binom.pmf(range(size + 1), size, rate),
        value_discretization_interval=1e-3,
    )
    return float(step.self_compose(steps).get_epsilon_for_delta(delta))


def main() -> None:
    """Compute both epsilons for each noise multiplier; print and keep one JSON object."""
    rate, steps, rows = LOT / VOLUMES, round(EPOCHS * VOLUMES / LOT), []
    for sigma in NOISE_MULTIPLIERS:
        per_volume = epsilon_pld(((sigma, rate, steps),), DELTA, 4e-4)
        per_patient = epsilon_of_group(sigma, rate, steps, DELTA, 2)
        rows.append({"noise_multiplier": sigma, "per_volume": per_volume, "per_patient": per_patient})
    keep("volume_level", setting={"volumes": VOLUMES, "batch": LOT, "steps": steps, "delta": DELTA}, rows=rows)


if __name__ == "__main__":
    main()
