"""Cohorts: from a manifest to prepared patients, with their attributes and the guards on private ones."""

from cardiac_ldm.cohort.arrays import Volumes
from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES, ATTRIBUTES, Attribute, measure_attributes
from cardiac_ldm.cohort.guards import require_labelled, require_public, require_releasable
from cardiac_ldm.cohort.manifest import Manifest, load_manifest
from cardiac_ldm.cohort.patients import Cohort, PatientRecord, Patients
from cardiac_ldm.cohort.prepare import prepare
from cardiac_ldm.cohort.volumes import GRID, Patient, Volume

__all__ = [
    "ATTRIBUTES",
    "ATTRIBUTE_NAMES",
    "GRID",
    "Attribute",
    "Cohort",
    "Manifest",
    "Patient",
    "PatientRecord",
    "Patients",
    "Volume",
    "Volumes",
    "load_manifest",
    "measure_attributes",
    "prepare",
    "require_labelled",
    "require_public",
    "require_releasable",
]
