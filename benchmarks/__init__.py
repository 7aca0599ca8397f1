"""Scripts that measure: each prints one JSON object on its last line and keeps it in benchmarks/results/."""
