"""The README and docs/ are true: links lead somewhere, names exist, tables are the code's."""

from __future__ import annotations

import ast
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from app.api import problems
from app.books.timeline import Phase
from app.broker.queues import most_bytes
from app.broker.rights import Role, rules
from app.cli import cli
from app.config.settings import ModelSettings, PriceSettings, Settings
from app.demo.prompts import prompts
from app.jobs import TRANSITIONS
from app.local.doctor import MIN_POSTGRES, MIN_REDIS
from app.store.audit import RULES
from app.store.delivery import DELIVERY_TRANSITIONS
from tests.chaos.__main__ import FAULTS
from tests.mutants import MUTANTS
from tests.pages import ALL, EXAMPLES, NAMED, PAGES, README, ROOT, prose

JOBS = ROOT / "docs" / "jobs.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
MAX_LINES = 10  # of an example


def test_no_example_is_left_out_and_none_is_long() -> None:
    tests = (ROOT / "tests" / "e2e" / "test_examples.py").read_text()
    used = re.findall(r'(?:run|query|export)\("([\w ]+)"|EXAMPLES\["([\w ]+)"\]', tests)

    assert sorted(name for name, _ in NAMED) == sorted({"".join(names) for names in used})
    assert not {name for name, (_, code) in EXAMPLES.items() if code.count("\n") > MAX_LINES}


def test_every_page_is_linked_from_the_readme() -> None:
    links = {(ROOT / target.partition("#")[0]) for _, _, target in _links(PAGES[README])}

    assert not PAGES.keys() - {README} - links


def test_every_file_section_and_function_that_is_linked_exists() -> None:
    for page, text in PAGES.items():
        for is_code, name, target in _links(text):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            where = f"{page.name}: [{name}]({target})"
            assert file.exists(), where
            assert file.is_relative_to(ROOT), where
            assert not anchor or anchor in _anchors(PAGES[file]), where
            if is_code and file.suffix == ".py":
                assert name in _definitions(file), where


def _links(page: str) -> list[tuple[str, str, str]]:
    """Links and images that lead to this repository: "`" or "", the text, the target."""
    links = re.findall(r"\[(`?)([^\]`]*)`?\]\(([^)]*)\)", prose(page))
    return [link for link in links if not link[2].startswith("http")]


def _anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def _definitions(file: Path) -> set[str]:
    """Dotted names of a module's functions, classes, methods and constants."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(prefix + name)
                case ast.ClassDef(name=name, body=inner):
                    found.add(prefix + name)
                    collect(inner, f"{prefix}{name}.")
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)

    collect(ast.parse(file.read_text()).body, "")
    return found


def test_every_command_and_make_target_that_is_named_exists() -> None:
    commands = re.findall(r"(?:^|`)gristmill (?:--config \S+ )?([a-z]+)", ALL, re.MULTILINE)
    targets = re.findall(r"(?:^|`)make ([a-z0-9]+)", ALL, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()

    assert set(commands) <= cli.commands.keys()
    rules = " ".join(re.findall(r"^([a-z0-9 ]+):", makefile, re.MULTILINE)).split()
    assert set(targets) <= set(rules)


def test_the_layout_names_what_is_in_app_and_nothing_else() -> None:
    block = re.search(r"^app/\n((?:  .*\n)+)", PAGES[README], re.MULTILINE)
    assert block
    named = {name for line in block[1].splitlines() for name in re.findall(r"\w+(?:\.py|/)", line)}

    files = {file.name for file in (ROOT / "app").glob("*.py")} - {"__init__.py"}
    folders = {f"{file.parent.name}/" for file in (ROOT / "app").rglob("*/*.py")}
    assert named == files | folders


def test_the_states_are_drawn_as_they_move() -> None:
    for page, table in ((JOBS, TRANSITIONS), (ARCHITECTURE, DELIVERY_TRANSITIONS)):
        drawn = re.findall(r"^    (\w+) --> (\w+)", PAGES[page], re.MULTILINE)

        moves = [(before, after) for before, afters in table.items() for after in afters]
        assert sorted(drawn) == sorted(moves)


def test_the_phases_of_a_timeline_are_those_of_the_code() -> None:
    table = PAGES[JOBS].partition("| phase |")[2].partition("\n\n")[0]

    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(Phase)


def test_the_threads_have_these_names() -> None:
    rows = re.findall(r"^\|[^|]*\| (`[^|]*`) \|", PAGES[ARCHITECTURE], re.MULTILINE)
    source = "".join(file.read_text() for file in (ROOT / "app").rglob("*.py"))
    starts = r'(?:Background\(|beside\(|Thread\([^"]*name=|super\(\).__init__\((?:name=)?)"(\w+)"'

    told = {name for row in rows for name in re.findall(r"\w+", row)}
    assert told == set(re.findall(starts, source))


def test_the_settings_are_those_of_the_code() -> None:
    told = ALL.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]

    assert told.strip() == _settings_table(), f"It should be:\n\n{_settings_table()}\n"


def test_the_rights_of_redis_users_are_those_of_the_code() -> None:
    page = PAGES[ROOT / "docs" / "redis.md"].replace("\\|", "|")

    for role in Role:
        keys, commands = " ".join(rules(Settings(), role)).split(" -@all ")
        assert f"`{keys.removeprefix('resetkeys ')}`" in page
        assert f"`{commands}`" in page


def test_every_setting_that_is_named_exists() -> None:
    sections = {
        name: field.annotation.model_fields
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)`", ALL)

    assert named
    assert not {f"{section}.{key}" for section, key in named if key not in sections[section]}


def test_the_metrics_are_those_of_the_api() -> None:
    source = (ROOT / "app" / "api" / "metrics.py").read_text()
    told = re.findall(r"`(gristmill_\w+)`", PAGES[ROOT / "docs" / "watch.md"])

    names = re.findall(r'"(gristmill_\w+)"', source)
    assert sorted(name.removesuffix("_total") for name in told) == sorted(names)


def _settings_table() -> str:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        if name == "models":
            rows += _rows("models.NAME", ModelSettings)
        elif name == "prices":
            rows += _rows("prices.ID", PriceSettings)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(name, field.annotation)
        else:
            rows.append(_row(name, field))
    return "\n".join(rows)


def _rows(section: str, model: type[BaseModel]) -> list[str]:
    rows: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(f"{section}.{name}", field.annotation)
        else:
            rows.append(_row(f"{section}.{name}", field))
    return rows


def _row(name: str, field: Any) -> str:
    return f"| `{name}` | {_default(field)} | {field.description} |"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    match field.get_default(call_default_factory=True):
        case None:
            return "–"
        case bool() as flag:
            return f"`{str(flag).lower()}`"
        case int() as number:
            return f"`{number:_}`"
        case Decimal() as amount:
            return f"`{amount}`"
        case float() as number:
            return f"`{number:g}`"
        case () | {}:
            return "none"
        case value:
            return f"`{json.dumps(value)}`"


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    told = Settings()

    for phrase in (
        f"`broker.max_inline_bytes` ({told.broker.max_inline_bytes:,})",
        f"that is {round(most_bytes(told.broker), -7) // 10**6} MB for each model",
        f"Up to {told.api.max_bulk_items:,} jobs",
        f"at most {told.api.max_wait_s:.0f} seconds",
        f"the last {told.flower.max_tasks:,} jobs",
        f"{len(prompts())} real prompts",
        f"`make chaos` does the {len(FAULTS)} faults",
        f"`make mutants` plants {len(MUTANTS)}",
        f"Postgres {MIN_POSTGRES[0]} or newer; Redis {MIN_REDIS[0]}.{MIN_REDIS[1]} or newer",
    ):
        assert phrase in ALL, phrase


def test_the_errors_are_those_of_the_api() -> None:
    told = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", ALL, re.MULTILINE))

    assert told == {(str(int(status)), kind.code) for kind, status in problems.STATUS.items()}


def test_the_rules_of_the_audit_are_those_of_the_code() -> None:
    told = ALL.partition("<!-- table: audit -->\n")[2].partition("<!-- end: audit -->")[0]

    rows = [f"| `{rule.name}` | {rule.sentence} |\n" for rule in RULES]
    assert told == "| rule | says |\n|---|---|\n" + "".join(rows)
