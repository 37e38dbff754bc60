"""The meter: what is booked is what the source said, and attempts pay for all of their time."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.energy import NOTHING_KNOWN, EnergyMethod, Paid, PowerModel
from app.config.file import PROJECT, load
from app.config.settings import Settings
from app.errors import ConfigError
from app.worker.energy import rapl
from app.worker.energy.counter import Unusable
from app.worker.energy.meter import EnergyMeter, EnergyWatch, Joules
from app.worker.energy.nvml import NvmlCounter
from app.worker.energy.rapl import RaplCounter, rapl_counters
from app.worker.energy.source import Source, choose
from app.worker.engine.hours import Hours
from app.worker.engine.page import PAGE_BYTES, Clock, Phase, Totals, shown

MS = 1_000_000
SECOND = 1_000_000_000
MEASURED, ESTIMATED, ABSENT = EnergyMethod


class Clocked:
    """An engine process's clock, by hand, and a counter beside it that draws 50 W or 300 W."""

    wraps_at_nj = None

    def __init__(self) -> None:
        self.now_ns = 5
        self.nj = 1_000
        self.is_away = False
        self.hours = Hours(lambda: self.now_ns)
        self.page = bytearray(PAGE_BYTES)
        self.hours.begin(self.page)

    def meter(self, model: PowerModel | None = None, *, is_counted: bool = True) -> EnergyMeter:
        counters = (self,) if is_counted else ()
        source = Source("nvml", "gpu", "for this test", counters, model)
        return EnergyMeter(source, self.hours, lambda: self.now_ns)

    def read(self) -> int | None:
        return None if self.is_away else self.nj

    def goes_on(self, lasts_ns: int, watts: int) -> None:
        self.now_ns += lasts_ns
        self.nj += lasts_ns * watts

    def turns(self, phase: Phase, given: int = 0, *, in_vain: bool = False) -> None:
        clock: Clock = shown(self.page)
        clock.turn(phase, self.now_ns, given, in_vain=in_vain)
        clock.show(self.page)


def test_energy_goes_where_the_time_went_and_a_job_pays_for_its_own() -> None:
    device = Clocked()
    meter = device.meter()

    # given a load, then idling, then a step that was shared out but for 10 ms between steps
    device.goes_on(100 * MS, watts=200)
    device.turns(Phase.IDLE)
    meter.read()
    device.goes_on(1000 * MS, watts=50)
    meter.read()
    device.turns(Phase.STEP)
    device.goes_on(100 * MS, watts=300)
    device.turns(Phase.IDLE, given=90 * MS)
    meter.read()

    # then
    assert meter.pay(90 * MS, 0) == Paid(27 * SECOND, 0, MEASURED)
    assert meter.joules() == Joules(
        Totals(load=20 * SECOND, busy=27 * SECOND, idle=50 * SECOND, overhead=3 * SECOND)
    )


def test_the_energy_of_a_step_that_runs_waits_for_its_end() -> None:
    device = Clocked()
    device.turns(Phase.STEP)
    meter = device.meter()
    for _ in range(10):
        device.goes_on(100 * MS, watts=300)
        meter.read()
    assert meter.joules().parts == Totals()

    device.turns(Phase.IDLE, given=600 * MS, in_vain=False)

    assert meter.pay(600 * MS, 0).energy_nj == 180 * SECOND


def test_what_a_step_draws_while_it_runs_is_not_taken_for_the_idle_times_before() -> None:
    device = Clocked()
    meter = device.meter()
    device.turns(Phase.IDLE)
    device.goes_on(SECOND, watts=50)
    meter.read()
    device.goes_on(100 * MS, watts=50)
    device.turns(Phase.STEP)
    device.goes_on(900 * MS, watts=300)

    meter.read()

    assert meter.joules().parts == Totals(idle=55 * SECOND)


def test_what_runs_within_one_step_of_the_counter_pays_at_the_power_before() -> None:
    device = Clocked()
    meter = device.meter()
    device.turns(Phase.IDLE)
    device.goes_on(1000 * MS, watts=50)
    meter.read()
    device.turns(Phase.STEP)
    device.goes_on(20 * MS, watts=50)
    device.turns(Phase.IDLE, given=20 * MS)

    assert meter.pay(20 * MS, 0) == Paid(1 * SECOND, 0, MEASURED)


def test_a_power_model_is_an_estimate_and_exact() -> None:
    device = Clocked()
    meter = device.meter(PowerModel(idle_mw=10_500, busy_mw=95_001), is_counted=False)
    device.turns(Phase.IDLE)
    device.goes_on(10, watts=0)
    device.turns(Phase.STEP)
    device.goes_on(7, watts=0)
    device.turns(Phase.IDLE, given=7)

    assert meter.pay(7, 0) == Paid(665, 0, ESTIMATED)
    assert meter.joules().parts == Totals(busy=665, idle=105)
    assert meter.joules().num_estimated > 0


def test_without_a_source_nothing_is_known() -> None:
    device = Clocked()
    meter = device.meter(is_counted=False)
    device.turns(Phase.STEP)
    device.goes_on(10, watts=100)
    device.turns(Phase.IDLE, given=10)

    assert meter.pay(10, 0) == NOTHING_KNOWN
    assert meter.joules().parts == Totals()
    assert meter.joules().num_absent > 0


@pytest.mark.parametrize("model", [None, PowerModel(5_000, 30_000)])
def test_a_board_that_the_models_do_not_run_on_tells_nothing_of_their_energy(
    model: PowerModel | None,
) -> None:
    device = Clocked()
    meter = device.meter(model)
    device.goes_on(SECOND, watts=400)
    meter.read()

    meter.forsake_counters()

    device.turns(Phase.STEP)
    device.goes_on(10, watts=400)
    device.turns(Phase.IDLE, given=10)
    meter.read()
    assert meter.source.name == ("model" if model else "none")
    assert meter.pay(10, 0) == (Paid(300, 0, ESTIMATED) if model else NOTHING_KNOWN)
    assert meter.joules().parts == (Totals(load=30 * SECOND, busy=300) if model else Totals())


def test_what_was_drawn_before_the_engine_process_is_nobodys() -> None:
    device = Clocked()
    device.hours = Hours(lambda: device.now_ns)
    meter = device.meter()
    device.goes_on(SECOND, watts=100)
    meter.read()

    device.hours.begin(device.page)
    device.goes_on(SECOND, watts=200)
    meter.read()

    assert meter.joules().parts == Totals(load=200 * SECOND)


def test_the_time_of_a_killed_engine_process_has_its_energy() -> None:
    device = Clocked()
    meter = device.meter()
    device.turns(Phase.STEP)
    device.goes_on(500 * MS, watts=300)
    device.hours.end(was_busy=True)
    meter.read()

    assert meter.pay(0, 500 * MS) == Paid(0, 150 * SECOND, MEASURED)

    # and between two processes it is overhead
    device.goes_on(100 * MS, watts=50)
    device.hours.begin(bytearray(PAGE_BYTES))
    meter.read()
    assert meter.joules().parts == Totals(waste=150 * SECOND, overhead=5 * SECOND)


def test_a_reset_is_seen_and_the_counter_is_followed_from_there() -> None:
    device = Clocked()
    meter = device.meter()
    device.turns(Phase.IDLE)
    device.goes_on(SECOND, watts=50)
    meter.read()

    device.now_ns, device.nj = device.now_ns + SECOND, 7
    meter.read()
    device.goes_on(SECOND, watts=60)
    meter.read()

    told = meter.joules()
    assert (told.parts.idle, told.num_resets, told.num_estimated) == (160 * SECOND, 1, 1)


def test_a_driver_that_fails_again_and_again_ends_no_worker() -> None:
    device = Clocked()
    meter = device.meter()
    device.read = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]

    watch = EnergyWatch(meter, 1)
    watch._restart_s = 0
    watch.start()
    watch.join(30)

    assert not watch.is_alive()


happenings = st.lists(
    st.tuples(
        st.sampled_from(Phase),
        st.integers(0, 3 * SECOND),  # lasts
        st.integers(0, 700),  # watts
        st.integers(0, 3 * SECOND),  # given
        st.booleans(),  # in vain
        st.sampled_from(["read", "pay", "away", "reset", "kill", "nothing"]),
    ),
    max_size=30,
)


@given(happenings, st.sampled_from([None, PowerModel(30_000, 250_007)]), st.booleans())
def test_all_attempts_together_pay_for_all_time_that_was_shared_out_or_wasted(
    happenings: list[tuple[Any, ...]], model: PowerModel | None, is_counted: bool
) -> None:
    device = Clocked()
    meter = device.meter(model, is_counted=is_counted)
    gave = wasted = paid_ns = paid_nj = 0

    def pay(ns: int) -> None:
        nonlocal paid_ns, paid_nj
        bill = meter.pay(ns, 0)
        paid_ns, paid_nj = paid_ns + ns, paid_nj + (bill.energy_nj or 0)
        assert (bill.energy_nj or 0) >= 0

    for phase, lasts_ns, watts, given_ns, in_vain, what in happenings:
        device.is_away = what == "away"
        device.goes_on(lasts_ns, watts)
        device.turns(phase, given_ns, in_vain=in_vain)
        if what == "kill":
            device.hours.end(was_busy=in_vain)
            device.page = bytearray(PAGE_BYTES)
            device.hours.begin(device.page)
        if what == "reset":
            device.nj = 0
        if what in ("read", "away", "reset"):
            meter.read()
        look = device.hours.look()
        gave, wasted = look.given.busy, look.given.waste
        if what == "pay":
            pay((gave + wasted - paid_ns) // 2)
    pay(gave + wasted - paid_ns)

    parts = meter.joules().parts
    assert min(parts.load, parts.busy, parts.idle, parts.waste, parts.overhead) >= 0
    assert paid_nj == parts.busy + parts.waste


# ── sources ──────────────────────────────────────────────────────────────────────────────────────


def fake_nvml(boards: dict[str, int], *, cut: bool = False) -> Any:
    """The driver's library with boards and what their counters say, in millijoules."""
    nvml: Any = types.SimpleNamespace(boards=boards, loads=0, asked=[])

    class NVMLError(Exception):
        pass

    def consumption(handle: tuple[int, str]) -> int:
        if handle[0] != nvml.loads or nvml.loads < 0:
            raise NVMLError("GPU is lost")
        return nvml.boards[handle[1]]

    def found(how: str, key: Any) -> tuple[int, str]:
        nvml.asked.append((how, key))
        try:
            name = list(boards)[key] if how == "index" else {"GPU-b": "b"}.get(key, "a")
        except IndexError:
            raise NVMLError("Invalid Argument") from None
        return nvml.loads, name

    nvml.NVMLError = NVMLError
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: found("index", index)
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: found("uuid", uuid)
    nvml.nvmlDeviceGetHandleByPciBusId = lambda address: found("address", address)
    nvml.nvmlDeviceGetTotalEnergyConsumption = consumption
    nvml.nvmlDeviceGetName = lambda handle: f"Board {handle[1]}"
    nvml.nvmlDeviceGetMigMode = lambda handle: (int(cut), int(cut))
    return nvml


@pytest.mark.parametrize(
    ("device", "visible", "address", "asked"),
    [
        ("auto", None, "", ("index", 0)),
        ("cuda:1", None, "", ("index", 1)),
        ("cuda:0", "1,0", "", ("index", 1)),
        ("cuda", "GPU-b", "", ("uuid", "GPU-b")),
        ("cuda:0", "1", "06:00", ("address", "0000:06:00.0")),
        ("cuda:0", None, "0000:06:00.1", ("address", "0000:06:00.1")),
    ],
)
def test_nvml_is_asked_for_the_board_that_cuda_uses(
    device: str, visible: str | None, address: str, asked: tuple[str, Any]
) -> None:
    nvml = fake_nvml({"a": 1, "b": 2})
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    counter = NvmlCounter(device, pci_address=address, environ=environ, library=nvml)

    assert nvml.asked == [asked]
    assert counter.read() in (1_000_000, 2_000_000)


def test_after_a_reload_of_the_driver_nvml_finds_the_board_again() -> None:
    nvml = fake_nvml({"a": 5_000})
    counter = NvmlCounter("cuda", environ={}, library=nvml)

    nvml.loads, nvml.boards["a"] = 1, 3

    assert [counter.read(), counter.read()] == [None, 3_000_000]


@pytest.mark.parametrize(
    ("nvml", "visible", "why"),
    [
        (fake_nvml({}), None, "NVML says: Invalid Argument"),
        (fake_nvml({"a": 1}), "", "hides device 0"),
        (fake_nvml({"a": 1}, cut=True), None, "MIG"),
    ],
)
def test_what_nvml_cannot_tell_is_said(nvml: Any, visible: str | None, why: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    with pytest.raises(Unusable, match=why):
        NvmlCounter("cuda", environ=environ, library=nvml)


def test_the_real_library_has_what_is_called_of_it() -> None:
    nvml = pytest.importorskip("pynvml")
    for name in vars(fake_nvml({})):
        assert name in ("boards", "loads", "asked") or hasattr(nvml, name)


def zone(folder: Path, name: str, energy: str, most: str = "1000") -> Path:
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_rapl_counts_packages_and_their_memory_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", "10")
    zone(tmp_path / "intel-rapl:0:0", "core", "4")
    zone(tmp_path / "intel-rapl:0:1", "dram", "2")
    zone(tmp_path / "intel-rapl:1", "package-1", "20")
    zone(tmp_path / "intel-rapl:2", "psys", "90")
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", "10")

    counters = rapl_counters(tmp_path)

    assert [each.read() for each in counters] == [10_000, 2_000, 20_000]
    assert {each.wraps_at_nj for each in counters} == {1_000_000}


@pytest.mark.parametrize("energy", ["", "-5", "many", "1.5"])
def test_what_is_no_number_is_no_reading(tmp_path: Path, energy: str) -> None:
    counter = RaplCounter(zone(tmp_path / "intel-rapl:0", "package-0", "10"))

    (tmp_path / "intel-rapl:0" / "energy_uj").write_text(energy)

    assert counter.read() is None


def test_rapl_that_is_not_there_or_for_root_alone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unusable, match="shows no processor's counter"):
        rapl_counters(tmp_path / "none")

    def refused(path: Path) -> bytes:
        raise PermissionError

    zone(tmp_path / "intel-rapl:0", "package-0", "10")
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(Unusable, match="only root may read"):
        rapl_counters(tmp_path)


def settings(**variables: str) -> Settings:
    environ = {f"GRISTMILL_{name.upper()}": value for name, value in variables.items()}
    return load(PROJECT / "configs" / "default.toml", environ).settings


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "powercap")
    return tmp_path / "powercap"


def test_auto_takes_the_board_then_the_processors_then_the_watts_then_none(
    powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watts = {"energy__idle_watts": "5", "energy__busy_watts": "30"}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    nothing = choose(settings())
    assert (nothing.name, nothing.boundary) == ("none", None)
    assert "no nvml: NVML says: Invalid Argument; no rapl: " in nothing.why
    assert "set energy.idle_watts and energy.busy_watts" in nothing.why

    modelled = choose(settings(**watts))
    assert (modelled.name, modelled.boundary) == ("model", "device")
    assert modelled.model == PowerModel(5_000, 30_000)

    zone(powercap / "intel-rapl:0", "package-0", "10")
    assert choose(settings(**watts)).name == "rapl"

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({"a": 1}))
    board = choose(settings())
    assert (board.name, board.boundary, board.why) == ("nvml", "gpu", "the counter of the Board a")
    assert board.is_assumed and not choose(settings(worker__device="cuda:0")).is_assumed
    assert choose(settings(worker__device="cpu")).name == "rapl"
    assert choose(settings(energy__source="none")).name == "none"


@pytest.mark.parametrize("source", ["nvml", "rapl"])
def test_a_source_that_is_named_and_not_there_is_refused(
    powercap: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    with pytest.raises(ConfigError, match=f"energy.source is {source}, but "):
        choose(settings(energy__source=source, energy__busy_watts="30"))
