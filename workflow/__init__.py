"""What the Snakefile is made of: the settings of a workflow, the running of a chapter, and `make clean`."""
