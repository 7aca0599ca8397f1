"""What an epsilon of volumes means for the patient who gives several: to compare with work that counts volumes."""

from functools import cache

from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import binom

from cardiac_ldm.privacy.accounting import Terms


@cache
def epsilon_of_group(terms: Terms, delta: float, size: int) -> float:
    """Epsilon of `size` units together, such as all volumes of a patient where the unit is the volume.

    Each joins a lot on its own, so a step sees Binomial(size, q) of them: a mixture of Gaussians (PLD, dp-accounting).
    """
    total = None
    for noise_multiplier, rate, steps in terms:
        step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
            noise_multiplier,
            sensitivities=range(size + 1),
            sampling_probs=binom.pmf(range(size + 1), size, rate),
            value_discretization_interval=1e-3,
        ).self_compose(steps)
        total = step if total is None else total.compose(step)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))
