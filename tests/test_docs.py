"""The documentation: what it says runs, its pictures and numbers are those that scripts make."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from fresh_venv import ROOT
from typer.testing import CliRunner

from flamingo_fast.cli import app
from flamingo_fast.training.config import TrainConfig

DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "kernels/*.md", "profiling/*.md")
    for page in ROOT.glob(pattern)
)

# Other programs that a block may name; what they are told is not looked at.
OTHER_PROGRAMS = {"pip", "git", "python", "torchrun"}

# Commands that take seconds; the others' options are parsed.
CHEAP = {
    "flamingo-fast doctor",
    "flamingo-fast params --table3",
    "flamingo-fast generate --help",
    "flamingo-fast bench ops --quick --op gated_residual --out results/first",
}


def blocks(language: str) -> list[Any]:
    """Of all pages, by page and number."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.S | re.M)
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT).with_suffix('')}-{number}")
        for page in PAGES
        for number, block in enumerate(pattern.findall(page.read_text()))
    ]


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block, each split into its words."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if set(word) <= set("&|;"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


# Of tables and sentences: with their options, as names alone are no whole commands.
INLINE = {
    shlex.join(shlex.split(command))
    for page in PAGES
    for command in re.findall(r"`(flamingo-fast [^`\n]* --[^`\n]*)`", page.read_text())
}
COMMANDS = sorted(
    INLINE
    | {shlex.join(command) for block in blocks("sh") for command in commands_of(block.values[0])}
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(name: str) -> types.SimpleNamespace:
    """What a script of docs/ defines."""
    return types.SimpleNamespace(**runpy.run_path(str(DOCS / f"{name}.py")))


def test_there_are_blocks_to_run() -> None:
    assert len(blocks("python")) > 30 and len(COMMANDS) > 60
    assert {page.stem for page in PAGES} >= {"README", "index", "ops", "training", "extending"}


@pytest.mark.parametrize("block", blocks("python"))
def test_example_runs(block: str, elsewhere: Path) -> None:
    if "patch_on_load" in block and importlib.metadata.version("transformers")[0] == "4":
        pytest.skip("transformers 4 can't put other classes into models that it loads")
    exec(block, {})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_runs_described_in_yaml_are_configs(block: str, elsewhere: Path) -> None:
    (elsewhere / "run.yaml").write_text(block)
    config = TrainConfig.from_yaml("run.yaml")
    assert config.optimizer.lr == 1e-4 and len(config.datasets) == 2


def usage_error(words: list[str], folder: Path) -> str:
    """What the command says of words that it doesn't take; nothing of others. It does nothing."""
    # What a page names is there: what it has for files ends in a suffix.
    for word in words:
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) and not word.startswith("-"):
            path = folder / word
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
    group: Any = typer.main.get_command(app)
    commands = [*group.commands.values()]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        command.callback = None
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            group(args=words, prog_name="flamingo-fast")
        except SystemExit as end:
            assert end.code in (None, 0, 2)
            return told.getvalue() if end.code else ""
    return ""


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one(command: str, elsewhere: Path) -> None:
    program, *words = shlex.split(command)
    if program == "torchrun" and "flamingo_fast.cli" in words:
        program, words = "flamingo-fast", words[words.index("flamingo_fast.cli") + 1 :]
    if program == "flamingo-fast":
        assert not usage_error(words, elsewhere)
    elif program == "make":
        result = subprocess.run(
            ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
    elif "/" in program:
        assert program.startswith(".venv/") or (ROOT / program).is_file(), program
    else:
        assert program in OTHER_PROGRAMS, command
    for word in words:
        if Path(program).name == "python" and word.endswith(".py"):
            assert (ROOT / word).is_file(), command
        for extra in re.findall(r"\[([\w,]+)\]", word) if program == "pip" else ():
            assert set(extra.split(",")) <= extras(), command


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.M))


@pytest.mark.parametrize(
    "command",
    [
        "flamingo-fast no-such-command",
        "flamingo-fast bench --no-such-option",
        "flamingo-fast table3 --steps none",
        "flamingo-fast data pack",
        "make no-such-target",
        "no-such-program",
        "pip install '.[no_such_extra]'",
        "python docs/no_such_script.py",
    ],
)
def test_what_is_none_is_told(command: str, elsewhere: Path) -> None:
    with pytest.raises(AssertionError):
        test_command_is_one(command, elsewhere)


@pytest.mark.parametrize("command", sorted(CHEAP))
def test_command_runs(command: str, elsewhere: Path) -> None:
    assert command in COMMANDS
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    if "--out" in command:
        assert (elsewhere / "results" / "first" / "index.html").is_file()


# Pictures.


def pixels(file: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB"), dtype=np.int16)


def difference(file: Path, other: Path) -> float:
    """Of pictures of nearly one size, the mean over pixels, from 0 to 255."""
    one, two = pixels(file), pixels(other)
    if max(abs(a - b) for a, b in zip(one.shape, two.shape, strict=True)) > 4:
        return 255.0
    height, width = (min(a, b) for a, b in zip(one.shape[:2], two.shape[:2], strict=True))
    return float(np.abs(one[:height, :width] - two[:height, :width]).mean())


# Another matplotlib may move a letter.
_ALIKE = 4.0


def test_pictures_are_those_that_the_script_makes(tmp_path: Path) -> None:
    pictures = script("make_pictures")
    for name in pictures.RECIPES:
        made = pictures.save(name, tmp_path)
        assert difference(made, DOCS / "pictures" / name) < _ALIKE, name


def test_other_pictures_are_told(tmp_path: Path) -> None:
    one, two = (DOCS / "pictures" / name for name in ("attend.png", "masks.png"))
    assert difference(one, two) > _ALIKE
    text = (DOCS / "make_pictures.py").read_text()
    assert "_locations(48, 6, 14, 30)" in text
    other = tmp_path / "make_pictures.py"
    other.write_text(text.replace("_locations(48, 6, 14, 30)", "_locations(48, 6, 24, 30)"))
    save = runpy.run_path(str(other))["save"]
    assert difference(save("attend.png", tmp_path), one) > _ALIKE


def test_every_picture_has_a_recipe_and_is_shown() -> None:
    recipes = set(script("make_pictures").RECIPES)
    shown = {
        name
        for page in DOCS.glob("*.md")
        for name in re.findall(r"\]\(pictures/([^)]+)\)", page.read_text())
    }
    there = {file.name for file in (DOCS / "pictures").iterdir()}
    assert shown == recipes == there


# Numbers.


@pytest.fixture(scope="module")
def tables() -> types.SimpleNamespace:
    return script("make_tables")


def _tables() -> Iterator[Any]:
    for page in sorted(DOCS.glob("*.md")):
        for name, arguments in re.findall(r"<!-- table (\S+)(?: ([^>]*?))? -->", page.read_text()):
            yield pytest.param(page, name, arguments, id=f"{page.stem}-{name}-{arguments}")


@pytest.mark.parametrize(("page", "name", "arguments"), [*_tables()])
def test_tables_are_those_that_are_computed(page, name, arguments, tables) -> None:
    table = tables.TABLES[name](*arguments.split())
    head = f"<!-- table {name}{' ' if arguments else ''}{arguments} -->\n"
    assert f"{head}{table}<!-- end -->" in page.read_text(), (
        f"{page.name}: run python docs/make_tables.py"
    )


def test_numbers_of_tables_have_three_digits(tables) -> None:
    values = (0, 0.0004, 0.00512, 12.34, 99.96, 999.7, 123456)
    expected = ["0", "0.000400", "0.00512", "12.3", "100", "1,000", "123,456"]
    assert [tables._number(each) for each in values] == expected


def test_all_rows_of_table_3_are_there() -> None:
    from flamingo_fast.models import table3_configs

    text = (DOCS / "models.md").read_text()
    assert all(f"| `{name}` |" in text for name in table3_configs())


def test_an_old_table_is_told(tables) -> None:
    page = (DOCS / "ops.md").read_text()
    begin = page.index("<!-- table work squared_relu")
    old = page[:begin] + page[begin:].replace("| fwd |", "| fwd, of old |", 1)
    assert old != page and tables.with_tables(old[begin:]) == page[begin:]


# The site.


def test_a_page_that_loads_something_from_elsewhere_is_told() -> None:
    pytest.importorskip("mkdocs")
    found = script("check_pages").loaded_from_elsewhere
    assert found('<script src="https://cdn.example/a.js"></script>') == ["https://cdn.example/a.js"]
    assert found('<link rel="stylesheet" href="//fonts.example/a">') == ["//fonts.example/a"]
    assert found("<img class=x src=http://example/a.png>") == ["http://example/a.png"]
    assert not found('<a href="https://arxiv.org">x</a><script src="a.js"></script>')


def test_the_index_of_kernels_names_every_file() -> None:
    index = (ROOT / "kernels" / "README.md").read_text()
    files = {file.name for file in (ROOT / "kernels").glob("*.py")}
    missing = files - set(re.findall(r"\w+\.py\b", index))
    assert not missing, f"kernels/README.md: add {missing}"


def api_names() -> list[str]:
    return re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)


def _object(name: str) -> Any:
    module, _, rest = name.rpartition(".")
    return getattr(importlib.import_module(module), rest)


@pytest.mark.parametrize(
    "package",
    ["flamingo_fast", "flamingo_fast.modules", "flamingo_fast.models", "flamingo_fast.patching"],
)
def test_the_api_has_every_public_name(package: str) -> None:
    documented = {id(_object(name)) for name in api_names()}
    missing = [
        name
        for name in importlib.import_module(package).__all__
        if not name.startswith("__") and id(_object(f"{package}.{name}")) not in documented
    ]
    assert not missing, f"docs/api.md: add {missing}"


def test_an_entry_of_several_arguments_is_one_of_each() -> None:
    pytest.importorskip("griffe")
    split = script("joint_entries").split_entries
    after = "\n    z: a, b: c.\n\nReturns:\n    a, b: c."
    docstring = f"Does.\n\nArguments:\n    x, y: of it,\n        and more.{after}"
    entries = "    x: see `y`.\n    y: of it,\n        and more."
    assert split(docstring) == f"Does.\n\nArguments:\n{entries}{after}"


GOOD = """
def planted(x: int, y: int) -> int:
    \"\"\"Does.

    Arguments:
        x, y: numbers.
    \"\"\"
    return x + y
"""


def built(folder: Path, page: str, module: str) -> str:
    """What mkdocs says of a site of one page, by our own settings; "" if it builds it."""
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "index.md").write_text(page)
    (folder / "planted.py").write_text(module)
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = re.sub(r"^nav:\n(  .*\n)+", "", settings, flags=re.M)
    for name in ("check_pages.py", "joint_entries.py"):
        settings = settings.replace(f"docs/{name}", str(DOCS / name))
    (folder / "mkdocs.yml").write_text(settings)
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout + result.stderr if result.returncode else ""


def test_a_good_page_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    assert not built(tmp_path, "# Page\n\n::: planted.planted\n", GOOD)
    html = (tmp_path / "build" / "site" / "index.html").read_text()
    assert "see <code>y</code>" in html and "planted" in html


@pytest.mark.parametrize(
    ("page", "module", "told"),
    [
        ("::: planted.planted", GOOD.replace("x, y:", "x, z:"), "Parameter 'z' does not appear"),
        ("::: planted.none", GOOD, "planted.none"),
        ("[a](none.md)", GOOD, "none.md"),
        ("[a](#none)", GOOD, "#none"),
        ('<img src="https://example.org/a.png">', GOOD, "loads https://example.org/a.png"),
    ],
)
def test_a_bad_page_is_not_built(tmp_path: Path, page: str, module: str, told: str) -> None:
    pytest.importorskip("mkdocs")
    assert told in built(tmp_path, f"# Page\n\n{page}\n", module)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_check_builds_the_site() -> None:
    result = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True)
    assert (
        "mkdocs build" in result.stdout
        and "--quiet" not in result.stdout.partition("mkdocs build")[2].splitlines()[0]
    ), result.stderr
