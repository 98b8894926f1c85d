"""`flamingo-fast verify`: promises that nothing shows fail, by name; ours all have evidence."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fresh_venv import ROOT

from flamingo_fast import cli
from flamingo_fast.bench import promises, records
from flamingo_fast.bench.promises import Area
from flamingo_fast.bench.verify import FOLDER
from flamingo_fast.cli.verify import unknown

TESTS = """
import pytest

@pytest.mark.parametrize("size", [1, 2])
def test_sizes(size): pass

def test_false(): assert 1 == 2

@pytest.mark.matrix
@pytest.mark.parametrize("size", [1, 2])
def test_left_out(size): pass

def test_not_run(): pass

@pytest.mark.skip
def test_skipped(): pass

class TestToys:
    def test_one(self): pass
"""
CASE = '<testcase classname="tests.test_toys{}" name="{}">{}</testcase>'
SKIPPED = '<skipped type="pytest.skip"/>'
JUNIT = "<testsuites><testsuite>{}</testsuite></testsuites>".format(
    "".join(
        [
            CASE.format("", "test_sizes[1]", ""),
            CASE.format("", "test_sizes[2]", ""),
            CASE.format("", "test_false", '<failure message="no">no</failure>'),
            CASE.format("", "test_skipped", SKIPPED),
            CASE.format(".TestToys", "test_one", ""),
        ]
    )
)
TABLE3 = """row,paper_ratio,measured_ratio,low,high,flops_here_ratio,flops_and_parameters_ratio
baseline,1,1.01,0.98,1.03,1,1
every_4th,0.59,0.66,0.64,0.68,0.7,0.6
"""
SHOWN = {"promise": "Toys roll", "kind": "test", "evidence": ["tests/test_toys.py::test_sizes"]}
OTHERS = "tests/test_toys.py::{}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toys.py").write_text(TESTS)
    (tmp_path / "Makefile").write_text("lint:\n\ttrue\n")
    (tmp_path / "README.md").write_text("Toys are 1.50 times as\nfast.\n")
    (tmp_path / "junit.xml").write_text(JUNIT)
    (tmp_path / "table3.csv").write_text(TABLE3)
    return tmp_path


Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Verify:
    """Runs the command in `project` with rows of YAML; returns (exit code, all that it printed)."""
    monkeypatch.setattr(records, "ROOT", project)

    def verify(*rows: dict, arguments: tuple[str, ...] | None = None) -> tuple[int, str]:
        folder = project / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toys.yaml").write_text(yaml.safe_dump({"area": "Toys", "promises": list(rows)}))
        if arguments is None:
            arguments = ("--junit", str(project / "junit.xml"))
        table3 = ("--table3", str(project / "table3.csv"))
        monkeypatch.setattr(sys, "argv", ["flamingo-fast", "verify", *table3, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capfd.readouterr()
        return exit.value.code or 0, captured.out + captured.err

    return verify


def test_what_is_shown_is_in_the_report(verify: Verify, project: Path) -> None:
    rows = (
        SHOWN,
        {"promise": "Toys are fast", "kind": "measured", "short": "1.50 in place of 2, as <heavy>"}
        | {"evidence": [{"file": "README.md", "has": ["1.50 times as fast"]}, "make lint"]},
        {"promise": "They work", "kind": "test"}
        | {"evidence": [{"command": "flamingo-fast doctor --help", "run": True}]},
        {"promise": "They are left out", "kind": "test"}
        | {"evidence": ["tests/test_toys.py::test_left_out"]},
        {"promise": "They need a track", "kind": "rehearsed"}
        | {"evidence": ["tests/test_toys.py::test_skipped"]},
        {"promise": "They have classes", "kind": "test"}
        | {"evidence": ["tests/test_toys.py::TestToys::test_one"]},
    )
    code, printed = verify(*rows)
    assert code == 0, printed
    out = project / "build" / "verify"
    text, page = (out / "report.md").read_text(), (out / "index.html").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "passed" in lines["Toys roll"] and "(2 passed)" in lines["Toys roll"]
    assert "| short; recorded |" in lines["Toys are fast"]
    assert "exits with 0" in lines["They work"]
    assert "| not in this sample |" in lines["They are left out"]
    assert "| skipped |" in lines["They need a track"]
    assert "| passed |" in lines["They have classes"]
    assert "1.50 in place of 2, as &lt;heavy&gt;" in page and "<svg" in page
    assert (out / "table3.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evidence": []}, "no evidence"),
        ({"evidence": None}, "no evidence"),
        ({"evidence": "tests/test_toys.py"}, "evidence: expected a list"),
        ({"evidence": [{"test": "x"}]}, "evidence: expected a test, a command"),
        ({"evidence": [{"file": "README.md"}]}, "evidence: expected a test, a command"),
        ({"kind": "hoped"}, "kind: expected one of test, measured, predicted, rehearsed"),
        ({"kind": "measured"}, "measured: expected a file with its numbers"),
        (
            {"kind": "rehearsed", "evidence": [{"file": "README.md", "has": ["Toys"]}]},
            "rehearsed: expected a test or a command",
        ),
        ({"shrot": "typo"}, "unknown fields: shrot"),
        ({"short": " "}, "short: expected how it fell short"),
        ({"evidence": [OTHERS.format("test_nothing")]}, "there is no such test"),
        ({"evidence": [OTHERS.format("test_size")]}, "there is no such test"),
        ({"evidence": [OTHERS.format("test_not_run")]}, "or it did not run"),
        ({"evidence": ["make lint"]}, "test: expected a test, a command that is run each time"),
        ({"evidence": ["tests/test_gone.py::test_sizes"]}, "there is no such file"),
        ({"evidence": [OTHERS.format("test_false")]}, "1 of 1 failed"),
        ({"evidence": ["tests/test_toys.py"]}, "1 of 5 failed: tests/test_toys.py::test_false"),
        ({"evidence": ["make nothing"]}, "the Makefile has no nothing"),
        ({"evidence": ["flamingo-fast nothing"]}, "there is no command 'nothing'"),
        ({"evidence": ["flamingo-fast doctor --nothing"]}, "there is no option --nothing"),
        ({"evidence": ["rm -rf toys"]}, "expected flamingo-fast, make or a file"),
        ({"evidence": [{"command": "make lint", "run": True}]}, "only flamingo-fast is run"),
        (
            {"evidence": [{"command": "flamingo-fast params --preset x", "run": True}]},
            "exit code 2",
        ),
        (
            {"kind": "measured", "evidence": [{"file": "README.md", "has": ["2.00 times"]}]},
            "README.md has no '2.00 times'",
        ),
        ({"kind": "measured", "evidence": [{"file": "gone.csv", "has": ["2"]}]}, "no such file"),
    ],
)
def test_what_is_not_shown_fails_by_name(verify: Verify, change: dict, said: str) -> None:
    code, printed = verify(SHOWN, SHOWN | {"promise": "Toys: a row"} | change)
    assert code == 1
    (line,) = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED toys.yaml: Toys: a row: ") and said in line


def test_a_promise_is_made_once(verify: Verify) -> None:
    code, printed = verify(SHOWN, SHOWN | {"promise": "Toys  roll."})
    assert code == 1
    assert printed.count("another row has the same promise") == 2


def test_tests_run_in_one_call(verify: Verify, project: Path) -> None:
    rows = (
        SHOWN,
        {"promise": "All hold", "kind": "test", "evidence": ["tests/test_toys.py"]},
        SHOWN | {"promise": "Unknown", "evidence": ["tests/test_toys.py::test_gone"]},
    )
    code, printed = verify(*rows, arguments=("--", "-p", "no:cacheprovider"))
    assert code == 1
    failed = [line for line in printed.splitlines() if line.startswith("FAILED toys.yaml")]
    assert "All hold: 1 of 8 failed" in failed[0] and "Unknown" in failed[1]
    # Tests that two rows name ran once.
    assert (project / "build/verify/junit.xml").read_text().count('name="test_sizes[1]"') == 1


@pytest.mark.parametrize("content", ["", "<testsuites/>", "junk"])
def test_junit_files_without_tests_are_refused(verify: Verify, project: Path, content: str) -> None:
    (project / "junit.xml").write_text(content)
    code, printed = verify(SHOWN)
    assert code == 1
    assert "junit.xml" in printed and "Traceback" not in printed


def test_the_worst_of_several_runs_counts(verify: Verify, project: Path) -> None:
    folder = project / "runs"
    folder.mkdir()
    (folder / "a.xml").write_text(JUNIT)
    (folder / "b.xml").write_text(JUNIT.replace(SKIPPED, "<error/>"))
    row = SHOWN | {"evidence": [OTHERS.format("test_skipped")]}
    code, printed = verify(row, arguments=("--junit", str(folder)))
    assert code == 1 and "test_skipped" in printed


def test_a_file_that_can_not_be_imported_fails_by_name(verify: Verify, project: Path) -> None:
    case = '<testcase classname="" name="tests.test_toys"><error message="no">no</error></testcase>'
    (project / "junit.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    code, printed = verify(SHOWN)
    assert code == 1 and "Toys roll: 1 of 1 failed: tests/test_toys.py" in printed


def test_what_a_run_leaves_out_by_hand_fails(verify: Verify) -> None:
    other = SHOWN | {"promise": "One", "evidence": [OTHERS.format("TestToys::test_one")]}
    code, printed = verify(SHOWN, other, arguments=("--", "-k", "test_one"))
    assert code == 1 and "or it did not run" in printed


def test_pytest_that_fails_without_a_test_is_a_failure(verify: Verify, project: Path) -> None:
    hook = (
        "def pytest_sessionfinish(session):\n"
        "    session.exitstatus = 0 if session.config.option.collectonly else 1\n"
    )
    (project / "tests" / "conftest.py").write_text(hook)
    code, printed = verify(SHOWN, arguments=("--", "-p", "no:cacheprovider"))
    assert code == 1 and "exit code 1, and no test failed" in printed


def test_files_of_no_promises_are_one_line(verify: Verify, project: Path) -> None:
    code, printed = verify()
    assert code == 1
    assert "toys.yaml: expected `area` and a list `promises`" in printed
    assert "Traceback" not in printed


# Ours


@pytest.fixture(scope="module")
def areas() -> list[Area]:
    return promises.read(ROOT / FOLDER)


def test_every_promise_of_ours_has_evidence_that_is_there(areas: list[Area]) -> None:
    rows = promises.of(areas)
    promises.check(rows, ROOT, unknown)
    wrong = [f"{each}: {'; '.join(each.problems)}" for each in rows if each.problems]
    assert not wrong, "\n".join(wrong)


def test_every_test_that_ours_name_is_there(areas: list[Area]) -> None:
    # `make verify-collected` asks pytest, of all that did not run; this is quicker.
    defined: dict[str, set[str]] = {}
    named = {e.test for each in promises.of(areas) for e in each.evidence if e.test}
    for file in {each.partition("::")[0] for each in named}:
        if not (ROOT / file).is_file():
            continue
        found = defined.setdefault(file, {file})
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(f"{file}::{node.name}")
                found |= {
                    f"{file}::{node.name}::{each.name}"
                    for each in node.body
                    if isinstance(each, ast.FunctionDef)
                }
    assert not sorted(each for each in named if each not in defined.get(each.split("::")[0], ()))
