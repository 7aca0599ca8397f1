"""Latent diffusion models of 3D cardiac MRI under patient-level differential privacy."""

import os

# Threads that spin while they wait make torch up to 80 times slower as soon as anything else wants a core; set before
# torch is imported, which is when OpenMP reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
