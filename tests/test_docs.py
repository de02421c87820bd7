"""The documentation: the site builds, links lead somewhere, the program takes every example, generated pages are up to date."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import typer
import yaml
from deltalake import write_deltalake
from markdown.extensions.toc import slugify
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from bp_spark.cli import app
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.lakehouse.tables import SCORES
from bp_spark.registry.predictions import PREDICTION_COLUMNS
from docs import reference
from tests.support.browsers import CHROMIUM, HEADLESS

ROOT = Path(__file__).parents[1]
SITE_PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE_PAGES]
FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*", re.DOTALL)
COMMANDS: Any = typer.main.get_command(app.app)
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
FOREIGN_YAML = {"deployment.md"}
"""Pages with YAML of other programs."""


class Block(NamedTuple):
    """A fenced code block."""

    page: Path
    language: str
    code: str


def blocks(*languages: str) -> list[Any]:
    """Return the blocks of all pages as cases of a test, each named after its page and first line."""
    all_blocks = [Block(page, *_unindented(match)) for page in PAGES for match in FENCE.finditer(text(page))]
    return [
        pytest.param(block, id=f"{block.page.name}: {block.code.splitlines()[0][:40]}")
        for block in all_blocks
        if block.language in languages
    ]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _unindented(match: re.Match[str]) -> tuple[str, str]:
    indent, language, code = match.groups()
    return language, "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))


def prose(page: Path) -> str:
    return FENCE.sub("", text(page))


# --- the site ----------------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Collects the addresses that a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and dict(attrs).get("rel") != "canonical"):
            self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    assert {page.stem for page in site.glob("*.html")} >= {page.stem for page in SITE_PAGES}
    assert not list(site.rglob("*.py"))


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loads = Loads()
        loads.feed(text(page))
        assert loads.addresses
        assert not [address for address in loads.addresses if re.match(r"(https?:)?//", address)]
    styles = "".join(text(path) for path in site.rglob("*.css"))
    assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", styles)


@pytest.mark.integration
def test_the_search_finds_pages_of_a_site_that_was_opened_as_a_file(site: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    address = f"{(site / 'index.html').as_uri()}?q=quarantine"
    command = [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r'<a href="[^"]*/([\w-]+\.html)[^"]*" class="md-search-result__link"', shown)
    assert {"data-engineer.html", "commands.html"} <= set(found)


@pytest.mark.parametrize("block", blocks("sql"))
def test_sql_can_be_read_without_scrolling(block: Block) -> None:
    assert [line for line in block.code.splitlines() if len(line) > 80] == []


# --- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that the site and a repository's own view agree on; any other link breaks in one of them."""
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", line) for line in re.findall(r"^#+ (.+)$", prose(page), re.M)]
    shown = {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
    return shown & {slugify(heading, "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]+`", "`code`", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target} is no heading"


# --- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_a_configuration_or_a_mapping_that_loads(block: Block, tmp_path: Path) -> None:
    if block.page.name in FOREIGN_YAML:
        assert list(yaml.safe_load_all(block.code))
        return
    file = tmp_path / "block.yaml"
    file.write_text(block.code, encoding="utf-8")
    if "transactions" in yaml.safe_load(block.code):
        assert "raw_transactions" in FilesSource(file).tables
    else:
        config.load(file)


def shell_commands(code: str) -> Iterator[list[str]]:
    """Yield the simple commands of a script as words, without assignments before them and redirections behind them."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "&&", "||", "|", "(", ")", "&"):
                while command and re.match(r"\w+=", command[0]):
                    command.pop(0)
                if command:
                    yield list(takewhile(lambda item: item not in (">", ">>", "<"), command))
                command = []
            else:
                command.append(word)


def check_command(words: list[str]) -> None:
    """Raise an error if a program of this repository would not take these words."""
    program, *arguments = words
    jobs = [word for word in words if re.fullmatch(r"jobs/\w+\.py", word)]
    if program == "make":
        assert set(arguments) <= MAKE
    elif program == "bp-spark":
        parse(arguments)
    elif program == "spark-submit" and jobs:
        assert (ROOT / jobs[0]).exists()
        parse([Path(jobs[0]).stem, *words[words.index(jobs[0]) + 1 :]])
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith("bench."):
        known = text(ROOT / f"{arguments[1].replace('.', '/')}.py")
        assert all(f'"{word}"' in known for word in arguments if word.startswith("--"))


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that the first words name, and the words that follow; a group where they name no command of it."""
    command = COMMANDS.commands[words[0]]
    words = words[1:]
    if words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(arguments: list[str]) -> None:
    """Parse the command line and load its settings; nothing runs."""
    while arguments[0].startswith("-"):
        arguments = arguments[2:]
    command, arguments = command_of(arguments)
    parameters = command.make_context(command.name, arguments).params
    overrides = parameters.get("overrides") or ()
    assert all(OVERRIDE.fullmatch(override) for override in overrides), overrides
    file = parameters.get("config_file")
    config.load(ROOT / file if file and (ROOT / file).exists() else None, overrides)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_examples_are_calls_that_the_programs_take(block: Block) -> None:
    for words in shell_commands(block.code):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_settings_in_the_text_exist(page: Path) -> None:
    keys = set(config.all_keys())
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for key, value in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)=(\S+)", code):
            if key.partition(".")[0] in Config.model_fields:
                assert key in keys, code
                if not re.fullmatch(r"[A-Z]+|.*….*", value):  # what a reader puts there
                    config.load(overrides=[f"{key}={value}"])
        if dotted := re.match(r"([a-z]+)\.([a-z_.]+)$", code):
            # a file, a module's function or a setting
            section = dotted[1] in Config.model_fields and isinstance(getattr(Config(), dotted[1]), config.Section)
            in_module = (ROOT / f"src/bp_spark/{dotted[1]}.py").exists() and dotted[2] in module_names(dotted[1])
            assert not section or code in keys or in_module or dotted[2] in ("py", "md", "yaml"), code
        if re.match(r"bp-spark [a-z][a-z-]+(?: |$)", code):
            command, _ = command_of(code.split()[1:])
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", code)) <= options, code
        if made := re.match(r"make ([a-z-]+)$", code):
            assert made[1] in MAKE


def module_names(module: str) -> set[str]:
    tree = ast.parse(text(ROOT / f"src/bp_spark/{module}.py"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples_compile_and_import_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("bp_spark"):
            names = ", ".join(alias.name for alias in node.names)
            exec(f"from {node.module} import {names}", {})


@pytest.fixture(scope="module")
def views(spark: SparkSession) -> Iterator[SparkSession]:
    """Register every table, empty, as a view."""
    tables = reference.all_tables()
    for table in tables:
        spark.createDataFrame([], table.schema).createOrReplaceTempView(table.name)
    predictions = StructType([SCORES.schema[name] for name in PREDICTION_COLUMNS])
    spark.udf.register("predict_spend", lambda _: None, predictions)
    yield spark
    spark.sql("DROP TEMPORARY FUNCTION predict_spend")
    for table in tables:
        spark.catalog.dropTempView(table.name)


def queries() -> list[Any]:
    in_shell = [
        pytest.param(Block(case.values[0].page, "sql", words[2]), id=f"{case.id} {words[2][:40]}")
        for case in blocks("bash")
        for words in shell_commands(case.values[0].code)
        if words[:2] == ["bp-spark", "sql"]
    ]
    return [*blocks("sql"), *in_shell]


@pytest.mark.parametrize("block", queries())
def test_queries_fit_the_tables(block: Block, views: SparkSession) -> None:
    queries = re.split(r";|\n\n", re.sub(r"--.*|\bbp\.(?=\w)", "", block.code))
    for query in filter(None, map(str.strip, queries)):
        if query.upper().startswith(("SELECT", "WITH")):
            assert views.sql(query).columns
        else:
            assert views._jsparkSession.sessionState().sqlParser().parsePlan(query)


def example(kind: pa.DataType) -> Any:
    """Return some value of a type."""
    if pa.types.is_map(kind):
        return [(example(kind.key_type), example(kind.item_type))]
    if pa.types.is_list(kind):
        return [example(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: example(field.type) for field in kind}
    moment = datetime(2017, 10, 3, tzinfo=UTC)
    values = {pa.string(): "A", pa.date32(): moment.date(), pa.timestamp("us", "UTC"): moment}
    return values.get(kind, 1)


@pytest.mark.usefixtures("spark")  # for the schema
def test_analysts_without_spark_read_the_tables_as_their_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = to_arrow_schema(SCORES.schema)
    rows = pa.table([pa.array([example(field.type)], field.type) for field in schema], schema=schema)
    write_deltalake(tmp_path / "lakehouse/bp/scores", rows, partition_by=list(SCORES.partition_by))
    write_deltalake(tmp_path / "lakehouse/bp/scores_latest", rows)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for case in blocks("python"):
        if case.values[0].page.name == "analyst.md" and "bp_spark" not in case.values[0].code:
            exec(case.values[0].code, namespace)
    assert namespace["levels"].rows() == [("A", 1, 1.0)]
    assert namespace["reasons"].rows() == [("A", "A")]
    assert namespace["top"] == [("A", 1.0, "A")]
    assert namespace["latest"]["score"].tolist() == [1.0]


# --- pages that are written from the code ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", reference.FILES)
def test_files_written_from_the_code_are_not_stale(path: str) -> None:
    assert text(ROOT / path) == reference.FILES[path](), "make reference writes it anew"


def test_every_section_and_setting_is_on_the_page_with_its_description() -> None:
    page = text(ROOT / "docs/configuration.md").splitlines()
    for setting in reference.settings():
        if setting.field is None:
            assert f"{'##' if '.' not in setting.key else '###'} {setting.key}" in page
        else:
            assert [line for line in page if line.startswith(f"| `{setting.key}` | ") and not line.endswith("|  |")]
