# The study as a workflow: every chapter is a notebook, run by papermill; then the book of the run is built in runs/book.
# snakemake --cores 2 --config profile=demo epsilons=1,10
# On a cluster: snakemake --workflow-profile slurm (or kubernetes), see profiles/.
import shlex, sys

from cardiac_ldm.errors import StudyError
from workflow.settings import WorkflowSettings, forget_killed, only_workflow, runs_folder

RUNS = runs_folder()
try:
    STUDY = WorkflowSettings.read(config)
    if workflow.is_main_process and not workflow.output_settings.dryrun:
        LOCK = only_workflow(RUNS)
        forget_killed()
except StudyError as error:
    sys.exit(f"{type(error).__name__}: {error}")
workflow.config_settings.config_args = STUDY.encoded  # jobs on a cluster get them through two shells and sbatch

RAW, EXECUTED = f"{RUNS}/chapters/{STUDY.name}", f"{RUNS}/executed/{STUDY.name}"
ROOT, CORES = workflow.basedir, workflow.resource_settings.cores or 16  # of a cluster nobody says them
HALF = CORES if workflow.remote_exec else max(1, CORES // 2)  # two small networks keep two cores busier than one does
BOTH = max(HALF, min(2, CORES))  # but alone a chapter takes both, and the last of three budgets would be alone

# rule: what follows which; the notebook; what else it takes; threads; GPUs, GB and hours for the `paper` profile
CHAPTERS = {
    "cohorts": ([], "00_cohorts", "", BOTH, 0, 16, 4),
    "autoencoder": (["cohorts"], "01_autoencoder", "", BOTH, 1, 64, 48),
    "pretrain": (["autoencoder"], "02_pretrain", "", BOTH, 1, 64, 48),
    "finetune": (["pretrain"], "03_dp_finetune", "epsilon", BOTH, 1, 64, 48),
    "evaluate": (["finetune"], "04_evaluate", "epsilons", HALF, 1, 64, 24),
    "audit": (["finetune"], "05_privacy_audit", "epsilons", HALF, 1, 64, 24),
    "tradeoff": (["evaluate"], "06_tradeoff", "epsilons", HALF, 1, 32, 4),
    "gallery": (["evaluate"], "07_gallery", "epsilons", HALF, 1, 32, 4),
}

def executed(rule_name):
    """The executed notebooks of a rule: one, or one for each budget."""
    notebook, takes = CHAPTERS[rule_name][1:3]
    each = [f"-eps{epsilon}" for epsilon in STUDY.budgets] if takes == "epsilon" else [""]
    return [f"{EXECUTED}/{notebook}{end}.ipynb" for end in each]

def given(takes):
    """What gives papermill the parameters of a rule's notebook; `:q` quotes each."""
    budgets = {"epsilons": ",".join(["0", *STUDY.budgets])} if takes == "epsilons" else {}
    return lambda wildcards: STUDY.papermill(**budgets, **dict(wildcards.items()))

wildcard_constraints: epsilon=r"[\w.+-]+",

rule book:
    localrule: True
    input: [path for name in CHAPTERS for path in executed(name)],
    output: f"{RUNS}/book/_build/html/index.html",
    params: python=sys.executable, build=f"{ROOT}/book/build.py", executed=EXECUTED, into=f"{RUNS}/book",
    shell: "rm -rf {params.into:q}; exec {params.python:q} {params.build:q} {params.executed:q} {params.into:q}"

for name, (after, notebook, takes, threads_, gpus, gigabytes, hours) in CHAPTERS.items():
    stem = notebook + ("-eps{epsilon}" if takes == "epsilon" else "")
    rule:
        name: name
        input: f"{ROOT}/notebooks/{notebook}.ipynb", [path for other in after for path in executed(other)],
        output: f"{EXECUTED}/{stem}.ipynb",
        log: f"{RAW}/{stem}.ipynb",
        params:
            given=given(takes), settings=STUDY.digest, python=sys.executable, run=f"{ROOT}/workflow/chapter.py",
            look=(takes == "epsilon" and shlex.join(STUDY.would_spend)) or "true",
        threads: threads_
        resources:
            mem_mb=1000 * gigabytes, runtime=60 * hours, **({"gpu": gpus, "gpu_manufacturer": "nvidia"} if gpus else {}),
        shell:
            "{params.look} || exit; exec {params.python:q} {params.run:q} {input[0]:q} {log:q} {output:q} {params.given:q}"
