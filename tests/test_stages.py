"""A stage's version speaks for its code: `python -m tests.test_stages` accepts what changed and computes the same."""

import ast
import hashlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from cardiac_ldm.cohort import prepare
from cardiac_ldm.cohort.prepare import VERSION
from cardiac_ldm.runs import Run, Stage, stage
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT, Trained

ACCEPTED = Path(__file__).with_name("stages.json")
FOLLOWED = ("cohort", "models", "privacy", "training", "evaluation")
COHORTS = ("public_as_given", "public", "_public_with", "private", "reference_cohort", "audited_cohort")
"""Whose keys say all that they depend on, the segmenter included."""
STAGES = {found.name: found for _, found in inspect.getmembers_static(Study) if isinstance(found, Stage)}


class _Plain(ast.NodeTransformer):
    """Takes the docstrings out."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


@cache
def tree(thing: Any) -> ast.AST:
    return _Plain().visit(ast.parse(textwrap.dedent(inspect.getsource(thing))))


def called(thing: Any, parsed: ast.AST, rooms: tuple[str, ...]) -> Iterator[Any]:
    """The library's functions and classes that a function or a class names, and the methods of a study."""
    names = vars(sys.modules[thing.__module__])
    declared = {found.work: found for found in STAGES.values()}.get(thing)
    known = behind(declared.needs) if declared else set()
    for node in ast.walk(parsed):
        found: Any = None
        if isinstance(node, ast.Name):
            found = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of_study = node.value.id == "self" and thing.__module__ in (Study.__module__, Trained.__module__)
            owner = Study if of_study else names.get(node.value.id)
            if owner is Study or isinstance(owner, ModuleType):
                found = inspect.getattr_static(owner, node.attr, None)
        if isinstance(found, Stage):
            found = None if found in known else found.work  # whose own version is part of the key
        found = getattr(found, "func", getattr(found, "fget", getattr(found, "__wrapped__", found)))
        if isinstance(found, FunctionType | type) and found.__module__.startswith("cardiac_ldm."):
            room = found.__module__.split(".")[1]
            if room in rooms or (room in ("study", "trained") and found not in (Study, Trained)):
                yield found


def digest(work: Any, rooms: tuple[str, ...] = FOLLOWED[1:]) -> str:
    """Of the syntax trees of what is reached from a stage's work, one room of the library after the other."""
    found: dict[str, str] = {}
    left = [work]
    while left:
        thing = left.pop()
        name = f"{thing.__module__}.{thing.__qualname__}"
        if name not in found:
            parsed = tree(thing)
            found[name] = ast.unparse(parsed)
            left += called(thing, parsed, rooms)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def now() -> dict[str, dict[str, Any]]:
    stages = {name: {"version": s.version, "code": digest(s.work)} for name, s in sorted(STAGES.items())}
    return {"cohort": {"version": VERSION, "code": digest(prepare, FOLLOWED[:1])}} | stages


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python write a syntax tree otherwise")
def test_no_stages_code_changes_without_its_version() -> None:
    known = json.loads(ACCEPTED.read_text())
    changed = [name for name, said in now().items() if said != known.get(name)]
    assert not changed, (
        f"{', '.join(changed)}: the code changed. Where it computes something else, raise the stage's version; "
        "then, or where it doesn't, accept it: python -m tests.test_stages"
    )
    assert set(known) == set(now())


def test_a_comment_changes_no_digest_and_a_loop_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = '"""Some."""\n    total = 0\n    for n in range(3):\n        total += n\n    return total\n'
    sources = {
        "first": body,
        "same": body.replace('Some."""', 'Other."""  # a comment'),
        "other": body.replace("range(3)", "range(4)"),
    }
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for name, body in sources.items():
        (tmp_path / f"{name}_work.py").write_text(f"def work():\n    {body}")
        work = __import__(f"{name}_work").work
        found[name] = ast.unparse(tree(work))
    assert found["first"] == found["same"] != found["other"]


def test_what_a_stage_calls_in_the_library_is_part_of_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(STAGES["pretrain"].work)
    room = sys.modules["cardiac_ldm.training.pretrain"]

    def pretrain() -> None:
        raise NotImplementedError

    pretrain.__module__ = room.__name__
    monkeypatch.setattr(sys.modules["cardiac_ldm.trained"], "pretrain", pretrain)
    assert digest(STAGES["pretrain"].work) != before


def test_the_workflow_runs_a_chapter_after_those_that_do_what_it_needs() -> None:
    source = (ROOT / "Snakefile").read_text()
    table = source[source.index("CHAPTERS = {") + len("CHAPTERS = ") : source.index("\n}\n") + 2]
    chapters = ast.literal_eval(re.sub(r"\b(HALF|BOTH|CORES)\b", "1", table))
    requested = {
        name: set(re.findall(r"study\.(\w+)", (ROOT / "notebooks" / f"{notebook}.md").read_text()))
        for name, (_, notebook, *_) in chapters.items()
    }
    after = {name: set[str]() for name in chapters}
    for name, (before, *_) in chapters.items():
        after[name] = set(before).union(*(after[other] for other in before))
    first: dict[str, str] = {}
    for name in chapters:
        for declared in needed(requested[name]):
            assert first.setdefault(declared, name) in {name} | after[name], f"{name} needs {declared}"
    assert {"autoencoder", "pretrained", "trained_privately", "evaluation"} <= set(first)


def needed(names: set[str], without: tuple[str, ...] = ()) -> set[str]:
    """The stages of a study that these of its names lead to, by what they need and by what their code asks for."""
    found, left = set[str](), list(names)
    while left:
        name = left.pop()
        thing = inspect.getattr_static(Study, name, None)
        if thing is None or name in found or name in without:
            continue
        found.add(name)
        left += [*thing.needs, *named(thing.work)] if isinstance(thing, Stage) else named(thing)
    return {name for name in found if isinstance(inspect.getattr_static(Study, name), Stage)}


def named(thing: Any) -> list[str]:
    """What a method of a study names of it."""
    thing = getattr(thing, "func", getattr(thing, "fget", getattr(thing, "__wrapped__", thing)))
    return re.findall(r"self\.(\w+)", inspect.getsource(thing)) if isinstance(thing, FunctionType) else []


def behind(needs: tuple[str, ...]) -> set[Stage]:
    """The stages whose versions are in the key of one with these needs."""
    found = set[Stage]()
    for name in needs:
        thing = inspect.getattr_static(Study, name)
        for way in [thing] if isinstance(thing, Stage) else [inspect.getattr_static(Study, x, 0) for x in named(thing)]:
            if isinstance(way, Stage):
                found |= {way} | behind(way.needs)
    return found


@pytest.mark.parametrize("declared", STAGES.values(), ids=STAGES)
def test_a_stage_asks_only_for_what_its_key_hashes(declared: Stage) -> None:
    requested = {inspect.getattr_static(Study, name) for name in needed({*named(declared.work)}, COHORTS)} - {declared}
    for other in requested - behind(declared.needs):
        assert set(other.settings) <= set(declared.settings), f"{declared.name}: settings of {other.name}"
        assert behind(other.needs) <= behind(declared.needs), f"{declared.name}: needs of {other.name}"


class Counted:
    """As much of a study as stages need."""

    def __init__(self, runs: Path, profile: object = None, seed: int = 0) -> None:
        self.runs, self.seed, self.profile, self.done = runs, seed, profile, list[str]()

    def shipped(self, declared: Stage) -> None:
        return None

    @stage("first", 1, settings=("size",))
    def first(self, run: Run) -> dict[str, int]:
        self.done.append("first")
        return {"n": len(self.done)}

    @stage("second", 1, needs=("first",))
    def second(self, run: Run, epsilon: float) -> dict[str, float]:
        self.done.append("second")
        return {"epsilon": epsilon}


def of_size(size: int) -> Any:
    return type("Profile", (), {"size": size})()


def test_a_stage_is_done_once_and_anew_when_what_its_key_hashes_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Counted(tmp_path, of_size(1))
    first = study.second(1.0)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["first", "second"]
    again = Counted(tmp_path, of_size(1))
    assert again.second(1.0).metrics == first.metrics == {"epsilon": 1.0}
    assert (again.done, study.done) == ([], ["first", "second"])
    others = [Counted(tmp_path, of_size(2)).second(1.0), Counted(tmp_path, of_size(1), seed=1).second(1.0)]
    assert study.second(1).key == first.key
    keys = {run.key for run in (first, study.second(2.0), *others)}
    newer: Callable[[Any], Any] = stage("second", 2, needs=("first",))
    monkeypatch.setattr(Counted, "second", newer(Counted.second.work))
    assert len(keys | {study.second(1.0).key}) == 5


def test_a_stage_that_fails_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, works = Counted(tmp_path, of_size(1)), Counted.first

    def fail(self: Counted, run: Run) -> dict[str, int]:
        (run.folder / "weights.safetensors").write_text("half")
        raise RuntimeError

    monkeypatch.setattr(Counted, "first", stage("first", 1, settings=("size",))(fail))
    with pytest.raises(RuntimeError):
        _ = study.first
    monkeypatch.setattr(Counted, "first", works)
    assert study.first.metrics == {"n": 1}


if __name__ == "__main__":
    ACCEPTED.write_text(json.dumps(now(), indent=1) + "\n")
