"""How far synthetic slices lie from real ones: Frechet distance and kernel distance of their features."""

import numpy as np
from scipy import linalg


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to features (n, d) and (m, d) (Heusel et al., arXiv 1706.08500).

    |mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S with n - 1 degrees of freedom. With centred features X and Y,
    the trace of the root is the nuclear norm of X Y' / ((n - 1) (m - 1))^(1/2), exact for singular S too: the sum of
    the roots of the eigenvalues of its Gram matrix, never larger than d x d.
    """
    mean_1, mean_2 = first.mean(axis=0, dtype=np.float64), second.mean(axis=0, dtype=np.float64)
    x, y = (first - mean_1) / np.sqrt(len(first) - 1), (second - mean_2) / np.sqrt(len(second) - 1)
    variances = np.square(x).sum() + np.square(y).sum()
    x, y = (linalg.qr(z, mode="r")[0] if len(z) > z.shape[1] else z for z in (x, y))
    product = x @ y.T
    gram = product @ product.T if len(product) <= len(product.T) else product.T @ product
    overlap = np.sqrt(linalg.eigvalsh(gram).clip(0)).sum()
    return float(np.square(mean_1 - mean_2).sum() + max(variances - 2 * overlap, 0.0))


class KernelDistance:
    """KID between parts of two cohorts: MMD^2 with the kernel (x.y / d + 1)^3 (Binkowski et al., arXiv 1801.01401).

    Slices of one patient resemble each other, so pairs WITHIN a patient are left out, not only a slice with itself:
    thus the estimate is unbiased for patients as the unit, and zero on average between two parts of one cohort. With
    one slice a patient it's the textbook's unbiased estimate. The kernel is summed once into blocks of patients.
    """

    def __init__(
        self, first: np.ndarray, first_owners: np.ndarray, second: np.ndarray, second_owners: np.ndarray
    ) -> None:
        """Sum the kernel of features (n, d) and (m, d) by the patients who own them: (n,) and (m,), from 0."""
        self._blocks = {
            "11": _block_sums(first, first_owners, first, first_owners),
            "22": _block_sums(second, second_owners, second, second_owners),
            "12": _block_sums(first, first_owners, second, second_owners),
        }

    def __call__(self, first: np.ndarray, second: np.ndarray) -> float:
        """Give the distance between these patients of the first cohort and these of the second, nobody repeated."""
        return (
            _mean(self._blocks["11"], first, first, within=False)
            + _mean(self._blocks["22"], second, second, within=False)
            - 2 * _mean(self._blocks["12"], first, second, within=True)
        )


def _block_sums(
    x: np.ndarray, x_owners: np.ndarray, y: np.ndarray, y_owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel and numbers of pairs, both (patients of x, patients of y)."""
    in_x, in_y = (
        np.equal.outer(np.arange(owners.max() + 1), owners).astype(np.float64) for owners in (x_owners, y_owners)
    )
    kernel = (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3
    return in_x @ kernel @ in_y.T, np.outer(in_x.sum(axis=1), in_y.sum(axis=1))


def _mean(block: tuple[np.ndarray, np.ndarray], rows: np.ndarray, columns: np.ndarray, *, within: bool) -> float:
    """Mean of the kernel over the pairs of these patients, those within one patient left out or not."""
    sums, counts = (part[np.ix_(rows, columns)] for part in block)
    kept = np.ones_like(counts) if within else rows[:, None] != columns[None, :]
    return float((sums * kept).sum() / (counts * kept).sum())
