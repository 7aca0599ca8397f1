"""Networks only: they know nothing of patients, files or training."""
