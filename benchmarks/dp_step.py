"""What privacy costs a training step, in time and memory: `python -m benchmarks.dp_step` (about 15 minutes; with names
of parts behind it, `rows` or `two_processes`, it measures those alone again).

Every method takes the same step: the gradient of one lot of 8 patients, two volumes each, with K noise draws a volume,
on one thread. Methods alternate within each round, so that what else the machine does hits them alike; a ratio is the
median over rounds of method / ordinary training, with its smallest and largest value. Memory is the peak above what
the process held before the first step, each method in a process of its own.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad, vmap

from benchmarks import RESULTS, keep
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, GRID, Patients, load_manifest
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import PrivatePlan, Randomness
from cardiac_ldm.privacy.dpsgd import gaussian
from cardiac_ldm.privacy.planning import propose
from cardiac_ldm.profile import Profile
from cardiac_ldm.training.subspace import Directions, SubspaceLoss

PATIENTS = 8
DIRECTIONS = 128
"""Of the whole network: as many numbers to read a gradient along as the `laptop` profile's 10,000 of tensors."""
SEEDED = Randomness(0, simulated=True)


@dataclass(frozen=True)
class Case:
    """A network, its latents' channels and plane, the draws of each volume, the precision, and how many rounds."""

    name: str
    channels: tuple[int, ...]
    latent: tuple[int, int]
    draws: int
    precision: str
    rounds: int

    @property
    def label(self) -> str:
        """How the table calls it."""
        return f"{self.name}, K = {self.draws}, {self.precision}"

    def build(self) -> Denoiser:
        """The denoiser with random weights."""
        torch.manual_seed(0)
        if self.name == "laptop":
            return Profile.load("laptop").denoiser.build(self.latent[0])
        quick = self.name == "quick"
        ranges = torch.tensor([[a.low for a in ATTRIBUTES], [a.high for a in ATTRIBUTES]])
        attention = (False, *[True] * (len(self.channels) - 1))
        sizes = (1, 2, 32, 0) if quick else (2, 4, 16, 0)
        return Denoiser(self.latent[0], 1, self.channels, attention, *sizes, GRID.n_slices, ranges, "modern")


QUICK, LAPTOP, PAPER = ((16, 32), (4, 12)), ((32, 64), (4, 24)), ((32, 64, 96), (1, 24))
CASES = [
    Case("laptop", *LAPTOP, 1, "fp32", 5),
    Case("quick", *QUICK, 1, "fp32", 7),
    Case("quick", *QUICK, 4, "fp32", 5),
    Case("quick", *QUICK, 4, "bf16", 1),
    Case("paper's, width 32", *PAPER, 1, "fp32", 3),
]


class MeanLoss(nn.Module):
    """A denoiser's mean loss, as a module's forward pass."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, *rows: Tensor) -> Tensor:
        """Of latents, attributes, timesteps and noise."""
        return self.model.loss(*rows).mean()


class Work:
    """One case's data, and a function for each method that takes one step's gradient."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.build()
        self.parameters = list(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        shape = (PATIENTS, 2 * case.draws, case.latent[0], GRID.n_slices, case.latent[1], case.latent[1])
        volumes = torch.randn((PATIENTS, 2, *shape[2:]), generator=generator)
        self.latents = repeat(volumes, "p v ... -> p (v k) ...", k=case.draws)
        ages = torch.rand((PATIENTS, 1, len(ATTRIBUTES)), generator=generator)
        self.attributes = ages.expand(-1, 2 * case.draws, -1)
        self.plan = PrivatePlan(1000, PATIENTS, 10**6, 1.0, case.draws, 10.0, 1e-5, noise_multiplier=1.0)
        batches = (self.plan.sample_batch(SEEDED.generator(step, 0)).sum() for step in range(500))
        self.steps = [step for step, batch in enumerate(batches) if batch == PATIENTS]

    @property
    def methods(self) -> dict[str, Callable[[int], None]]:
        """What takes a step's gradient, by name."""
        return {"ordinary": self.ordinary, "ours": self.ours, "subspace": self.subspace, "vmap": self.vmapped}

    def loss(self, latents: Tensor, attributes: Tensor, seed: int) -> Tensor:
        """Mean diffusion loss over the rows."""
        generator = torch.Generator().manual_seed(seed)
        timesteps = torch.randint(150, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.precision == "bf16"):
            return self.model.loss(latents, attributes, timesteps, noise).mean()

    def ordinary(self, number: int) -> None:
        """One batch of all rows, one backward pass."""
        latents, attributes = rearrange(self.latents, "p r ... -> (p r) ..."), self.attributes.flatten(0, 1)
        torch.autograd.grad(self.loss(latents, attributes, number), self.parameters)

    def ours(self, number: int) -> None:
        """The private gradient of one lot, noise included."""

        def unit_loss(unit: int, generator: torch.Generator) -> Tensor:
            own = unit % PATIENTS
            return self.loss(self.latents[own], self.attributes[own], int(torch.randint(99, (), generator=generator)))

        self.plan.gradient(self.steps[number], self.parameters, unit_loss, SEEDED)

    def subspace(self, number: int) -> None:
        """The same along 128 directions, through which every patient's whole gradient is read."""
        self.along.z.grad = None
        self.plan.gradient(self.steps[number], [self.along.z], self.along, SEEDED)

    @cached_property
    def along(self) -> SubspaceLoss:
        """The loss along random directions: what they are changes no cost."""

        def gradients(units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
            rows = []
            for unit in units:
                own, seed = unit % PATIENTS, int(torch.randint(99, (), generator=draws(unit)))
                parts = torch.autograd.grad(self.loss(self.latents[own], self.attributes[own], seed), self.parameters)
                rows.append(torch.cat([part.flatten() for part in parts]))
            yield torch.stack(rows)

        weights = sum(parameter.numel() for parameter in self.parameters)
        directions = Directions([(DIRECTIONS, weights)])
        directions.block0 = torch.randn(DIRECTIONS, weights) / weights
        return SubspaceLoss(self.model, directions, gradients)

    def vmapped(self, number: int) -> None:
        """vmap(grad) over patients, clipped and summed; no noise, which costs all methods the same."""
        whole = MeanLoss(self.model)
        weights = {name: p.detach() for name, p in whole.named_parameters()}
        generator = torch.Generator().manual_seed(number)
        timesteps = torch.randint(150, self.latents.shape[:2], generator=generator)
        noise = torch.randn(self.latents.shape, generator=generator)

        def loss(weights: dict[str, Tensor], *rows: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.case.precision == "bf16"):
                return functional_call(whole, weights, rows)

        each = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(weights, self.latents, self.attributes, timesteps, noise)
        flat = torch.cat([part.flatten(1) for part in each.values()], dim=1)
        (flat * (1 / flat.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def ratios(case: Case) -> list[dict[str, Any]]:
    """Time of each method over ordinary training's, in alternating rounds."""
    work = Work(case)
    methods = work.methods
    if case.rounds < 4:
        del methods["vmap"]  # it takes minutes, and the small network shows what it costs
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(case.rounds + 1):
        for name, step in methods.items():
            start = time.process_time()
            step(number)
            if number:  # the first round warms up
                taken[name].append(time.process_time() - start)
    base = np.array(taken.pop("ordinary"))
    rows = []
    for name, seconds in taken.items():
        each = np.array(seconds) / base
        memory = peak_memory(case, name) / peak_memory(case, "ordinary")
        rows.append(
            {
                "network": case.label,
                "parameters": sum(p.numel() for p in work.parameters),
                "method": name,
                "time": float(np.median(each)),
                "time_low": float(each.min()),
                "time_high": float(each.max()),
                "memory": memory,
                "ordinary_seconds": float(np.median(base)),
                "rounds": case.rounds,
            }
        )
        print(rows[-1], flush=True)
    return rows


def peak_memory(case: Case, method: str) -> float:
    """Peak MB of a process above what it held before its first two steps by this method."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, method))


def _peak(case: Case, method: str) -> float:
    torch.set_num_threads(1)
    work = Work(case)
    before = _most_held(reset=True)
    for number in (0, 1):
        work.methods[method](number)
    return _most_held() - before


def _most_held(reset: bool = False) -> float:
    """The most MB of memory that this process has held (Linux), since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def opacus_reasons() -> list[dict[str, str]]:
    """What Opacus says to the quick network as it is, and what it computes once the parts it refuses are frozen."""

    def attempt(ghost: bool, frozen: tuple[str, ...]) -> str:
        work = Work(CASES[0])
        for name, parameter in work.model.named_parameters():
            parameter.requires_grad_(not (frozen and (name.startswith(frozen[0]) or name.endswith(frozen[1]))))
        try:
            if ghost:
                wrapped = GradSampleModuleFastGradientClipping(
                    work.model, strict=False, max_grad_norm=1.0, use_ghost_clipping=True
                )
            else:
                wrapped = GradSampleModule(work.model, strict=False)
            latents, attributes = work.latents.flatten(0, 1), work.attributes.flatten(0, 1)
            work.loss(latents, attributes, 0, wrapped).backward()
            if ghost:
                wrapped.get_norm_sample()
            samples = [getattr(p, "grad_sample", None) for p in work.model.parameters()]
            sizes = sorted({len(sample) for sample in samples if sample is not None})
            return f"runs, but gives {sizes} gradients for {PATIENTS} patients: it would clip slices, not patients"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"

    frozen = ("attributes.", ".position")
    return [
        {"method": "Opacus hooks", "network": "as it is", "outcome": attempt(False, ())},
        {"method": "Opacus ghost clipping", "network": "as it is", "outcome": attempt(True, ())},
        {"method": "Opacus hooks", "network": "without what it refuses", "outcome": attempt(False, frozen)},
        {"method": "Opacus ghost clipping", "network": "without what it refuses", "outcome": attempt(True, frozen)},
    ]


def noise_cost(parameters: int) -> dict[str, float]:
    """Seconds of the noise of one step: ours (ChaCha20, four draws averaged) and PyTorch's, neither safe nor secret."""
    ours, torchs = [], []
    for number in range(7):
        start = time.process_time()
        gaussian(parameters, 1.0, SEEDED.generator(number, 1))
        middle = time.process_time()
        torch.randn(parameters)
        ours.append(middle - start)
        torchs.append(time.process_time() - middle)
    return {"parameters": parameters, "ours_seconds": float(np.median(ours)), "torch_seconds": float(np.median(torchs))}


def setting_up(n_patients: int) -> dict[str, float]:
    """Seconds and MB to be ready for the first step with this many patients: tables, latents, noise, ledger."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        row = {"group": None, "labelled": True, "attributes": [[0.0] * len(ATTRIBUTE_NAMES)] * 2}
        row |= {"repairs": [], "doubts": []}
        with (Path(folder) / "train.jsonl").open("w") as table:
            table.writelines(json.dumps({"id": f"p{i:06d}"} | row) + "\n" for i in range(n_patients))
        shape = (2 * n_patients, 4, GRID.n_slices, 12, 12)
        np.lib.format.open_memmap(Path(folder) / "latents.npy", mode="w+", dtype=np.float32, shape=shape).flush()
        return pool.apply(_set_up, (folder, n_patients))


def _set_up(folder: str, n_patients: int) -> dict[str, float]:
    settings = Profile.load("paper").finetune
    before, start = _most_held(reset=True), time.perf_counter()
    patients = Patients(load_manifest("phantom_private"), "train", Path(folder))
    latents = np.load(Path(folder) / "latents.npy", mmap_mode="r")
    plan = settings.plan(10, settings.delta, len(patients))
    plan.ledger(SEEDED, stage="denoiser", tuned="all", private_data=patients.name, public_data="")
    batch = plan.sample_batch(SEEDED.generator(0, 0))
    spans = zip(patients.offsets[:-1][batch][:16], patients.offsets[1:][batch][:16], strict=True)
    read = [latents[first:after] for first, after in spans]
    seconds = time.perf_counter() - start
    assert read[0].shape[0] == len(patients.attributes) // n_patients
    return {"patients": n_patients, "seconds": seconds, "megabytes": _most_held() - before}


def cores(rounds: int = 7) -> list[dict[str, Any]]:
    """Patients a second on two cores over one core's, a patient a core or a patient's work spread over both."""
    found = []
    for case in CASES[:2]:
        work, ratios = Work(case), list[tuple[float, float]]()

        def together(number: int, work: Work = work) -> None:
            """Patient after patient, each on as many cores as torch likes."""
            for patient in range(PATIENTS):
                loss = work.loss(work.latents[patient], work.attributes[patient], number)
                work.plan.clipped(loss, work.parameters)

        for number in range(rounds + 1):
            seconds = []
            for threads, step in ((1, work.ours), (2, work.ours), (2, together)):
                torch.set_num_threads(threads)
                start = time.perf_counter()
                step(number)
                seconds.append(time.perf_counter() - start)
            ratios.append((seconds[0] / seconds[1], seconds[0] / seconds[2]))
        for name, its in zip(("a patient a core", "a patient on both"), zip(*ratios[1:], strict=True), strict=True):
            spread = {"ratio": float(np.median(its)), "low": min(its), "high": max(its), "rounds": rounds}
            found.append({"network": case.label, "cores": name, **spread})
    torch.set_num_threads(1)
    return found


def throughput(rounds: int = 3) -> dict[str, float]:
    """Patients a second of two processes over one's, in alternating rounds; every process has one thread."""
    each = []
    for _ in range(rounds):
        one, two = (_launch(processes) for processes in (1, 2))
        each.append(one / two)
        print(f"two processes: {each[-1]:.2f} x", flush=True)
    return {"ratio": float(np.median(each)), "low": min(each), "high": max(each), "rounds": rounds}


def _launch(processes: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*command, "-m", "benchmarks.dp_step", "--worker"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return float(run.stdout.split()[-1])


def _worker() -> None:
    """Seconds of the same ten lots of about 16 patients, on as many processes as there are."""
    distributed.init_process_group("gloo")
    work = Work(CASES[1])
    plan = PrivatePlan(1000, 16, 10**6, 1.0, 4, 10.0, 1e-5, noise_multiplier=1.0)

    def unit_loss(unit: int, generator: torch.Generator) -> Tensor:
        own = unit % PATIENTS
        return work.loss(work.latents[own], work.attributes[own], 0)

    plan.gradient(0, work.parameters, unit_loss, SEEDED)
    distributed.barrier()
    start = time.perf_counter()
    for step in range(1, 6):
        plan.gradient(step, work.parameters, unit_loss, SEEDED)
    distributed.barrier()
    if distributed.get_rank() == 0:
        print(time.perf_counter() - start)
    distributed.destroy_process_group()


def plans(step: dict[str, Any]) -> list[dict[str, float]]:
    """What half an hour on one core allows for 4,000 patients and the network of this row, at two budgets."""
    seconds_per_patient = step["ordinary_seconds"] * step["time"] / PATIENTS
    found: list[dict[str, float]] = []
    hours = {"n_patients": 4000, "n_parameters": step["parameters"], "hours": 0.5}
    for epsilon in (1, 10):
        table = propose(epsilon, 1e-5, **hours, seconds_per_patient=seconds_per_patient)
        found += [{"epsilon": epsilon, **row} for row in table.to_dict("records")]
    return found


def main(wanted: list[str]) -> None:
    """Measure everything, or only the parts that are named; print and keep one JSON object."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = RESULTS / "dp_step.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if wanted and path.exists() else {}
    kept.pop("benchmark", None)
    parts: dict[str, Callable[[], object]] = {
        "rows": lambda: [row for case in CASES for row in ratios(case)],
        "plans": lambda: plans(next(row for row in kept["rows"] if row["network"] == CASES[1].label)),
        "opacus": opacus_reasons,
        "cores": cores,
        "two_processes": throughput,
        "noise": lambda: [noise_cost(n) for n in (300_000, 4_400_000)],
        "setting_up": lambda: [setting_up(n) for n in (300, 3_000, 30_000)],
    }
    for name in wanted or parts:
        kept[name] = parts[name]()
    keep("dp_step", **kept)


if __name__ == "__main__":
    _worker() if "--worker" in sys.argv else main(sys.argv[1:])
