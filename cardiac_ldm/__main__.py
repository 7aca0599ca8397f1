"""One private model without its notebook, on as many processes as torchrun starts.

`torchrun --standalone --nproc-per-node 2 -m cardiac_ldm --epsilon 1` leaves its run where `03_dp_finetune` finds it.
Takes that notebook's parameters.
"""

import argparse
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

from cardiac_ldm.errors import StudyError
from cardiac_ldm.models.device import is_first_process
from cardiac_ldm.parameters import FinetuneParameters
from cardiac_ldm.study import Study


def main() -> None:
    """Fine-tune for one budget, with the patients of every batch split over the processes."""
    parser = argparse.ArgumentParser(description="Fine-tune on private patients, alone or under torchrun.")
    for name, field in FinetuneParameters.model_fields.items():
        kind = float if field.annotation is float else type(field.default)
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": field.default}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    parameters = FinetuneParameters.read(vars(parser.parse_args()))
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=7))
    run = Study(parameters).finetuned(parameters.epsilon)
    if is_first_process():
        print(f"weights, ledger and metrics: {run.folder}")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
