"""Simulated patients: who they are, their hearts as contours, what lies round them, and the scanner that images it."""

from cardiac_ldm.cohort.phantom.patient import simulate
from cardiac_ldm.cohort.phantom.population import Population

__all__ = ["Population", "simulate"]
