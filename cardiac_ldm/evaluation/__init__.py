"""What a synthetic cohort is worth: fidelity, diversity and control, each beside what real patients reach."""
