"""The scanner of simulated patients: what a balanced SSFP cine sequence makes of tissue, field and k-space."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import fft

_FAT_SHIFT = 217.0 / 1.5
"""Hz per tesla by which fat precesses more slowly than water: 3.4 ppm."""


@dataclass(frozen=True)
class Tissue:
    """T1 and T2 (ms) at 1.5 T and at 3 T, and proton density."""

    t1: tuple[float, float]
    t2: tuple[float, float]
    density: float


TISSUES: Mapping[str, Tissue] = {
    "blood": Tissue((1441, 1932), (250, 165), 0.95),
    "myocardium": Tissue((1000, 1200), (50, 45), 0.80),
    "muscle": Tissue((1008, 1412), (40, 35), 0.80),
    "liver": Tissue((586, 809), (46, 34), 0.80),
    "fat": Tissue((300, 382), (80, 68), 0.80),
    "stomach": Tissue((1300, 1600), (110, 95), 0.80),
    "lung": Tissue((1200, 1300), (35, 25), 0.20),
    "marrow": Tissue((549, 586), (49, 49), 0.60),
}
"""Near Stanisz et al., Magn. Reson. Med. 54:507, 2005 (blood, muscle) and de Bazelaire et al., Radiology 230:652, 2004
(liver, fat, marrow); myocardium as in-vivo maps have it. Stomach, lung and densities are guesses. Published values
differ by tens of per cent (Bojorquez et al., Magn. Reson. Imaging 35:69, 2017): every patient's signals vary."""


@dataclass(frozen=True)
class Scanner:
    """A cine protocol and its flaws.

    field: T. repetition_time: ms. flip: degrees. thickness: of a slice, mm; slices lie 10 mm apart. sampled: parts of
    the grid's frequencies that are acquired along rows and columns. noise: standard deviation, blood's signal being 1.
    shading: how much the coil favours the chest wall. off_resonance: spread of the field, Hz.
    """

    field: float
    repetition_time: float
    flip: float
    thickness: float
    sampled: tuple[float, float]
    noise: float
    shading: float
    off_resonance: float


def steady_state(tissue: Tissue, scanner: Scanner, hertz: np.ndarray | float = 0.0) -> np.ndarray:
    """Magnitude of a tissue's balanced steady state, TR / 2 after a pulse, this far from the resonance.

    Freeman and Hill, J. Magn. Reson. 4:366, 1971, with pulses of alternating sign: dark bands lie where the phase
    that's gained between two pulses is an odd multiple of pi.
    """
    at, alpha = int(scanner.field > 2), np.radians(scanner.flip)
    e1, e2 = (np.exp(-scanner.repetition_time / t[at]) for t in (tissue.t1, tissue.t2))
    phase = 2 * np.pi * np.asarray(hertz) * scanner.repetition_time / 1000 + np.pi
    c, d = e2 * (e1 - 1) * (1 + np.cos(alpha)), 1 - e1 * np.cos(alpha) - (e1 - np.cos(alpha)) * e2**2
    transverse = (1 - e1) * np.sin(alpha) * np.abs(1 - e2 * np.exp(-1j * phase)) / (c * np.cos(phase) + d)
    return tissue.density * np.sqrt(e2) * transverse


def signals(scanner: Scanner) -> dict[str, float]:
    """Signals of all tissues on resonance, blood's being 1.

    Fat is counted negative where it lags behind water by about one turn a TR, or another odd number: then the two
    cancel in voxels that hold both, which draws the black outlines of bSSFP.
    """
    signal = {name: float(steady_state(tissue, scanner)) for name, tissue in TISSUES.items()}
    relative = {name: value / signal["blood"] for name, value in signal.items()}
    turns = round(_FAT_SHIFT * scanner.field * scanner.repetition_time / 1000)
    return relative | {"fat": relative["fat"] * (-1) ** turns}


def off_resonance(hertz: np.ndarray, scanner: Scanner) -> np.ndarray:
    """Factor by which myocardium's signal changes where the field is off by so much; a table's values, float32."""
    period = 1000 / scanner.repetition_time
    table = steady_state(TISSUES["myocardium"], scanner, np.linspace(0, period, 512))
    return (table / table[0]).astype(np.float32)[np.round(np.abs(hertz) % period * (511 / period)).astype(np.int32)]


def acquire(magnetisation: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """Image signed magnetisation (n_slices, rows, columns): a part of k-space with thermal noise, then the magnitude.

    What's cut off blurs and rings; a mild apodisation tempers that. The noise becomes Rician.
    """
    shape = magnetisation.shape
    k_space = fft.fft2(magnetisation.astype(np.float32))
    sigma = np.float32(scanner.noise * np.sqrt(shape[1] * shape[2]))
    noise = rng.standard_normal((2, *shape), np.float32) * sigma
    k_space += noise[0] + 1j * noise[1]
    window = []
    for n, sampled in zip(shape[1:], scanner.sampled, strict=True):
        frequency = 2 * np.abs(fft.fftfreq(n)) / sampled
        window.append((frequency <= 1) * (1 - 0.4 * frequency**2))
    return np.abs(fft.ifft2(k_space * np.outer(*window).astype(np.float32)))
