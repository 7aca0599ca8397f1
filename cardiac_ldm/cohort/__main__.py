"""The command line of cohorts: python -m cardiac_ldm.cohort check data_manifests/x.yaml."""

import sys

from cardiac_ldm.cohort.check import main

if __name__ == "__main__":
    sys.exit(main())
