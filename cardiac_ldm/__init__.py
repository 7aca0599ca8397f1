"""Latent diffusion models of 3D cardiac MRI under patient-level differential privacy."""
