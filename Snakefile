# The study as a workflow: every chapter is a notebook, run by papermill into book/executed/, then the book is built.
# snakemake --cores 2 --config profile=demo epsilons=1,10

# Of real private patients no model without privacy is made, and nothing is spent without spend=True.

from cardiac_ldm.cohort import load_manifest

PROFILE = config.get("profile", "demo")
REAL = load_manifest(config.get("cohort_private", "phantom_private")).secret
PRIVATE = [str(epsilon) for epsilon in str(config.get("epsilons", "1,10")).split(",")] + ["inf"] * (not REAL)
BUDGETS = ["0", *PRIVATE]
COHORTS = {name: config[name] for name in ("cohort_public", "cohort_private") if name in config}
SPEND = {"spend": True} if str(config.get("spend", False)).lower() == "true" else {}
HALF = max(1, workflow.cores // 2)  # two small networks side by side keep cores busier than one on all of them
EXECUTED, DONE = "book/executed", f"runs/chapters/{PROFILE}"
CHAPTERS = [
    "00_cohorts",
    "01_autoencoder",
    "02_pretrain",
    *(f"03_dp_finetune-eps{epsilon}" for epsilon in PRIVATE),
    "04_evaluate",
    "05_privacy_audit",
    "06_tradeoff",
    "07_gallery",
]


def chapter(notebook, budget=""):
    """The paths of a chapter's rule and the shell command that runs its notebook, on as many threads as the rule has."""
    name = notebook + (f"-eps{{{budget}}}" if budget else "")
    spend = SPEND if notebook >= "03" else {}
    given = " ".join(f"-p {key} {value}" for key, value in {"profile": PROFILE, **COHORTS, **spend}.items())
    cohorts = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in COHORTS.items())
    looked = f"python -m cardiac_ldm.privacy would-spend --profile {PROFILE} {cohorts} --epsilons {','.join(PRIVATE)} && "
    if budget:
        given += f" -p epsilon {{wildcards.{budget}}}"
    if notebook >= "04":
        given += f" -p epsilons '{','.join(BUDGETS)}'"
    return {
        "notebook": f"{EXECUTED}/{name}.ipynb",
        "done": f"{DONE}/{name}.done",
        "log": f"{DONE}/{name}.ipynb",
        "run": (looked if REAL and budget else "") + f"OMP_NUM_THREADS={{threads}} papermill notebooks/{notebook}.ipynb {{log}} {given} --log-output"
        " --no-progress-bar --autosave-cell-every 60 < /dev/null && python book/publish.py {log} {output[0]} && touch {output[1]}",
    }


wildcard_constraints:
    epsilon=r"[^/]+",


rule book:
    input:
        expand(f"{EXECUTED}/{{chapter}}.ipynb", chapter=CHAPTERS),
        expand(f"{DONE}/{{chapter}}.done", chapter=CHAPTERS),
    shell:
        "python book/build.py"


rule cohorts:
    input:
        "notebooks/00_cohorts.ipynb",
    output:
        chapter("00_cohorts")["notebook"],
        chapter("00_cohorts")["done"],
    log:
        chapter("00_cohorts")["log"],
    threads: HALF
    shell:
        chapter("00_cohorts")["run"]


rule autoencoder:
    input:
        "notebooks/01_autoencoder.ipynb",
        f"{DONE}/00_cohorts.done",
    output:
        chapter("01_autoencoder")["notebook"],
        chapter("01_autoencoder")["done"],
    log:
        chapter("01_autoencoder")["log"],
    threads: HALF
    shell:
        chapter("01_autoencoder")["run"]


rule pretrain:
    input:
        "notebooks/02_pretrain.ipynb",
        f"{DONE}/00_cohorts.done",
    output:
        chapter("02_pretrain")["notebook"],
        chapter("02_pretrain")["done"],
    log:
        chapter("02_pretrain")["log"],
    threads: HALF
    shell:
        chapter("02_pretrain")["run"]


rule finetune:
    input:
        "notebooks/03_dp_finetune.ipynb",
        f"{DONE}/02_pretrain.done",
    output:
        chapter("03_dp_finetune", "epsilon")["notebook"],
        chapter("03_dp_finetune", "epsilon")["done"],
    log:
        chapter("03_dp_finetune", "epsilon")["log"],
    threads: HALF
    shell:
        chapter("03_dp_finetune", "epsilon")["run"]


rule evaluate:
    input:
        "notebooks/04_evaluate.ipynb",
        f"{DONE}/01_autoencoder.done",
        expand(f"{DONE}/03_dp_finetune-eps{{epsilon}}.done", epsilon=PRIVATE),
    output:
        chapter("04_evaluate")["notebook"],
        chapter("04_evaluate")["done"],
    log:
        chapter("04_evaluate")["log"],
    threads: workflow.cores
    shell:
        chapter("04_evaluate")["run"]


rule audit:
    input:
        "notebooks/05_privacy_audit.ipynb",
        f"{DONE}/04_evaluate.done",
    output:
        chapter("05_privacy_audit")["notebook"],
        chapter("05_privacy_audit")["done"],
    log:
        chapter("05_privacy_audit")["log"],
    threads: HALF
    shell:
        chapter("05_privacy_audit")["run"]


rule tradeoff:
    input:
        "notebooks/06_tradeoff.ipynb",
        f"{DONE}/04_evaluate.done",
    output:
        chapter("06_tradeoff")["notebook"],
        chapter("06_tradeoff")["done"],
    log:
        chapter("06_tradeoff")["log"],
    threads: HALF
    shell:
        chapter("06_tradeoff")["run"]


rule gallery:
    input:
        "notebooks/07_gallery.ipynb",
        f"{DONE}/04_evaluate.done",
    output:
        chapter("07_gallery")["notebook"],
        chapter("07_gallery")["done"],
    log:
        chapter("07_gallery")["log"],
    threads: HALF
    shell:
        chapter("07_gallery")["run"]
