"""The case `convert`: its 8-bit baseline, bytes, products in float32, what is run again, what rows are made into."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzo

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import allocations
from bench.harness import Recorder, load
from bench.memory import measure, mesa, plot, products, record, settings, table, ways
from bench.memory.families import FAMILIES, Encoder, Size
from bench.memory.rows import found

BF16 = torch.bfloat16

# Mesa ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("count", [256, 257, 1000, 4096])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (50.0, 1.0), (-3.0, 100.0)])
def test_no_value_is_off_by_more_than_a_step(count, dtype, mean, spread):
    torch.manual_seed(0)
    x = (torch.randn(count) * spread + mean).to(dtype)
    values = mesa.Compressed(x).decode()
    assert values.dtype == dtype
    for start in range(0, count, mesa.GROUP):
        group, decoded = (t[start : start + mesa.GROUP].double() for t in (x, values))
        least, most = group.aminmax()
        step = (1 + 2**-6) * (most - least + 2**-7 * least.abs()) / 255
        # And the value is rounded: to the dtype, and, of code, step and least value, in float32.
        rounding = decoded.abs() * torch.finfo(dtype).eps / 2 + 4 * 2**-24 * group.abs().max()
        assert bool(((decoded - group).abs() <= step + rounding).all())


def test_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(mesa.GROUP)
    compressed = mesa.Compressed(x)
    draws = 400
    mean = sum(mesa.Compressed(x).decode() for _ in range(draws)) / draws
    # A draw is one of two neighbouring levels, with a standard deviation of half a step at most: 5 sigma, and float32.
    assert float((mean - x).abs().max()) <= 5 * float(compressed.step[0]) / 2 / draws**0.5 + 1e-5
    assert float((mean - x).abs().max()) > 0


def test_compressed_bytes():
    assert mesa.Compressed(torch.randn(4 * mesa.GROUP)).nbytes == 4 * mesa.GROUP + 4 * (2 + 2)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-30])
def test_equal_values(value):
    x = torch.full((300,), value)
    torch.testing.assert_close(mesa.Compressed(x).decode(), x, rtol=2**-6 / 255 + 2**-7 / 255 + 1e-6, atol=1e-37)


def test_not_a_number_stays_in_its_group():
    x = torch.randn(2 * mesa.GROUP)
    x[3] = torch.nan
    values = mesa.Compressed(x).decode()
    assert values[: mesa.GROUP].isnan().all() and values[mesa.GROUP :].isfinite().all()


def saved_by(run: Any) -> list[Any]:
    """What Mesa's hooks gave autograd, in order of saving."""
    seen = []
    hooks = mesa.Mesa()
    pack = hooks.pack_hook
    hooks.pack_hook = lambda tensor: seen.append(pack(tensor)) or seen[-1]
    with hooks:
        result = run()
    assert result.requires_grad
    return seen


def test_a_storage_is_compressed_once_and_views_come_back_from_it():
    torch.manual_seed(0)
    x = torch.randn(64, 32, requires_grad=True) * 1.5

    def run() -> Tensor:
        return (x.sin() + x.t().cos().t() + x.view(32, 64).exp().view(64, 32)).sum()

    views = [each for each in saved_by(run) if isinstance(each, mesa.View)]
    assert len(views) == 3 and views[0].whole is views[1].whole
    torch.testing.assert_close(views[0].tensor(), views[1].tensor().t(), rtol=0, atol=0)
    assert views[2].whole is not views[0].whole  # exp saves its result


def test_what_changed_in_place_is_compressed_again():
    leaf = torch.randn(32, 32, requires_grad=True)

    def run() -> Tensor:
        x = leaf * 1.5
        before = x.sin()
        return before.sum() + x.mul_(2.0).cos().sum()

    views = [each for each in saved_by(run) if isinstance(each, mesa.View)]
    assert len(views) == 2 and views[0].whole is not views[1].whole


def test_weights_statistics_and_frozen_parts_are_left_alone():
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    model[3].requires_grad_(False)
    x = torch.randn(16, 32)

    def run() -> Tensor:
        with torch.autocast("cpu", BF16):
            return model(x).sum()

    kept = saved_by(run)
    compressed = [tuple(each.size) for each in kept if isinstance(each, mesa.View)]
    assert compressed == [(16, 32), (16, 64)]  # of the linear and of GELU
    raw = [tuple(each.shape) for each in kept if isinstance(each, Tensor)]
    # Of the norm its input, which has no gradient, weight, bias, statistics; the weights of both linears, transposed.
    assert sorted(raw) == sorted([(16, 32), (32,), (32,), (16, 1), (16, 1), (64, 32), (32, 64)])


def test_gradients_are_right_on_average():
    """Of linear layers and a square they are products of independently rounded factors: no bias, variance / draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    x = torch.randn(64, 32)

    def gradient(hooks: bool) -> Tensor:
        model.zero_grad()
        if hooks:
            with mesa.Mesa():
                loss = model(x).square().sum()
        else:
            loss = model(x).square().sum()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    true, draws = gradient(False), [gradient(True) for _ in range(32)]
    single = torch.stack([(draw - true).square().sum() for draw in draws]).mean()
    assert single > 0
    assert (sum(draws) / len(draws) - true).square().sum() <= 2 * single / len(draws)
    assert single.sqrt() < 0.02 * true.norm()


# Bytes and products --------------------------------------------------------------------------------------------------

SMALL = Size(64, 4, 32)


@pytest.mark.parametrize("way", [ways.EAGER, ways.EXACT])
def test_the_allocator_and_autograd_count_the_same_bytes(way, one_thread):
    """Up to what autograd keeps of the batch, which was there before, and 64 bytes of rounding and numbers."""
    family = FAMILIES["encoder-gelu"]
    model, batch = family.build(2, SMALL, 0.0), family.batch(2, SMALL)
    loss = ways.prepare(way, model)
    loss(batch).backward()
    kept = allocations.alive(lambda: loss(batch)).kept_bytes
    counted = pyzo.memory.account(lambda: loss(batch), model).nbytes
    assert -64 <= counted - kept <= sum(value.nbytes for value in batch.values()) + 64


def test_most_at_one_time_and_what_is_left():
    def call() -> Tensor:
        first = torch.empty(1000)
        second = first.clone()
        del first
        return second[:1].clone()

    assert allocations.alive(call) == allocations.Alive(peak_bytes=8000, kept_bytes=4)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mm", [(5, 7), (7, 3)]),
        ("addmm", [(3,), (5, 7), (7, 3)]),
        ("bmm", [(2, 5, 7), (2, 7, 3)]),
        ("baddbmm", [(2, 5, 3), (2, 5, 7), (2, 7, 3)]),
        ("mm", [(0, 7), (7, 3)]),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_round_once(name, shapes, transposed):
    torch.manual_seed(0)
    operands = [torch.randn(shape).to(BF16) for shape in shapes]
    if transposed:
        operands[-1] = operands[-1].mT.contiguous().mT
    exact = getattr(torch, name)(*(x.double() for x in operands))
    kernel = products._kernel(name, len(operands) - 2)
    got = kernel(None, *operands)
    assert got.dtype == BF16 and got.is_contiguous()
    # One rounding to 8 bits, and 8 sums in float32 of numbers below 5 * 5.
    assert bool(((got - exact).abs() <= exact.abs() * 2**-8 + 8 * 2**-24 * 200).all())
    out = torch.empty_like(got)
    into = products._kernel(f"{name}.out", len(operands) - 2)
    assert into(None, *operands, out=out) is out and torch.equal(out, got)
    if operands[0].shape == got.shape:
        inside = operands[0].clone()
        changed = products._kernel(f"{name}_", len(operands) - 2)(None, inside, *operands[1:])
        assert changed is inside and torch.equal(inside, got)


def test_units_per_layer_are_those_of_the_tests_of_conversion(one_thread):
    """Which count by `pyzo.memory.account`."""
    setting = settings.Setting("encoder-gelu", settings.FULL, SMALL, rows=1)

    def counted(layers: int, rows: int) -> int:
        loss, batch = ways.prepare(ways.EXACT, setting.model("cpu", layers)), setting.batch("cpu", rows)
        loss(batch)
        return pyzo.memory.account(lambda: loss(batch)).nbytes

    few, many = (counted(2, rows) - counted(1, rows) for rows in (1, 2))
    units = measure.units_per_layer(setting, ways.EXACT, "cpu")
    assert units == pytest.approx((many - few) / (2 * 32 * 64), abs=1e-3) and units > 5


# Settings and ways ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [settings.CPU, settings.GPU, settings.DRY])
def test_settings_are_distinct_and_start_with_eager(grid):
    keys = [record.key("", "", setting.config()) for setting in grid.settings()]
    assert len(set(keys)) == len(keys)
    assert all(setting.ways[0] == ways.EAGER for setting in grid.settings())


def test_issues_targets_have_a_setting():
    asked = {setting.family for setting in settings.CPU.settings() if setting.per_layer and setting.training == "full"}
    assert asked == {*settings.PAPERS, *settings.OTHERS}


def test_a_way_that_has_no_numbers_says_why():
    assert ways.left_out(ways.LIGER, "vit", "cpu") == ""
    assert "GPU" in ways.left_out(ways.LIGER, "llama", "cpu")
    assert ways.left_out(ways.EXACT, "vit", "cpu") is None
    with pytest.raises(ValueError, match="way: expected one of"):
        ways.prepare("magic", Encoder(1, SMALL, 0.0))


# Rows ----------------------------------------------------------------------------------------------------------------

BYTES = {way: 100 - 10 * number for number, way in enumerate(ways.ALL)}


class Machine:
    """Stands for the measurements, and counts them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, function: Any, setting: settings.Setting, *arguments: Any) -> Any:
        self.calls.append((function, *arguments))
        if function is measure.steps:
            return "native", {way: [BYTES[way] / 100, BYTES[way] / 100] for way in arguments[0]}
        numbers = {"products": "native", "saved_bytes": BYTES[arguments[0]], "peak_bytes": 2 * BYTES[arguments[0]]}
        return {**numbers, "units_per_layer": BYTES[arguments[0]] / 10}


def recorded(path: Path, machine: Machine, *, clean: bool = True) -> list[dict[str, Any]]:
    recorder = Recorder("convert", dry_run=True, out=path)
    recorder.clean = clean
    record.Convert(recorder, settings.DRY, machine).all()
    return load(path)


def test_rows_of_a_setting(tmp_path):
    rows = recorded(tmp_path / "rows.jsonl", Machine())
    mine = {(r["what"], r["provider"]): r for r in rows if r["config"]["model"] == "LLaMA" and "reason" not in r}
    assert mine[record.MEMORY, ways.EAGER]["value"] == mine[record.MEMORY, ways.EAGER]["saved_share"] == 1
    assert mine[record.MEMORY, ways.EXACT]["value"] == mine[record.MEMORY, ways.EXACT]["saved_share"] == 0.9
    less = mine[record.LESS, record.BEST]
    assert less["value"] == pytest.approx(0.2) and less["best"] == ways.PAPER
    assert mine[record.STEP, ways.EXACT]["ratio"]["of_medians"] == pytest.approx(1 / 0.9)
    (reason,) = {r["reason"] for r in rows if "reason" in r}
    assert "GPU" in reason


def test_targets_of_the_issue(tmp_path, monkeypatch):
    recorder = Recorder("convert", dry_run=True, out=tmp_path / "rows.jsonl")
    monkeypatch.setattr(recorder, "dry_run", False)
    record.Convert(recorder, settings.DRY, Machine()).all()
    targets = {
        (r["what"], r["provider"], r["config"]["model"], r["config"]["training"]): (r["target"], r["met"])
        for r in recorder.rows
        if "target" in r
    }
    full = [(FAMILIES[name], "full") for name in ("llama", "encoder")]
    expected = {(record.STEP, ways.EXACT, about.title, kind): (0.97, True) for about, kind in full}
    expected |= {(record.LESS, record.BEST, about.title, kind): (about.minimum, False) for about, kind in full}
    expected[record.LESS, record.BEST, "nn.TransformerEncoder", "full"] = (0.2, 1 - 8 / 10 >= 0.2)
    assert targets == expected


def test_what_is_recorded_is_not_measured_again(tmp_path):
    path, machine = tmp_path / "rows.jsonl", Machine()
    rows = recorded(path, machine)
    calls = len(machine.calls)
    assert recorded(path, machine) == rows and len(machine.calls) == calls
    lines = path.read_text().splitlines()
    gone = [(row["what"], row["provider"]) == (record.MEMORY, ways.EAGER) for row in rows]
    kept = [line for line, missing in zip(lines, gone, strict=True) if not missing]
    path.write_text("\n".join(kept) + "\n")
    recorded(path, machine)
    assert [call[0] for call in machine.calls[calls:]] == sum(gone) * [measure.memory]


def test_rows_of_a_dirty_tree_do_not_count_for_a_clean_one(tmp_path):
    path, machine = tmp_path / "rows.jsonl", Machine()
    recorded(path, machine, clean=False)
    calls = len(machine.calls)
    recorded(path, machine, clean=True)
    assert len(machine.calls) == 2 * calls
    recorded(path, machine, clean=True)
    recorded(path, machine, clean=False)
    assert len(machine.calls) == 2 * calls


def real(path: Path) -> list[dict[str, Any]]:
    """Rows as of a real run."""
    return [{**row, "dry_run": False, "clean": True} for row in recorded(path, Machine())]


def test_tables(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected clean rows"):
        table.tables(recorded(tmp_path / "dry.jsonl", Machine()))
    text = table.tables(real(tmp_path / "rows.jsonl"))
    assert "| LLaMA | full | 10.0 | 9.0 | 8.0 | 20.0% |  |" in text.splitlines()
    assert "| LLaMA | full | 16 | pyzo exact | 0.90 | 0.90 | 1.11 |" in text.splitlines()
    assert ways.LIGER not in text
    widths = {line.count("|") for line in text.split("\n\n")[0].splitlines()}
    assert widths == {len(table.PER_LAYER) + 1}


def test_targets_in_the_table(tmp_path):
    rows = real(tmp_path / "rows.jsonl")
    for row in rows:
        if row["what"] == record.LESS and row["config"]["training"] == settings.FULL:
            row |= {"target": 0.45, "met": False}
    assert "| LLaMA | full | 10.0 | 9.0 | 8.0 | 20.0% | 45%, missed |" in table.tables(rows).splitlines()


def test_of_rows_recorded_twice_the_last_counts(tmp_path):
    rows = real(tmp_path / "rows.jsonl")
    (first,) = (r for r in rows if (r["what"], r["provider"]) == ("memory", ways.PAPER) and "LLaMA full" in name(r))
    before, again = found(rows), found([*rows, {**first, "value": 0.5}])
    peaks = {one.config["model"]: one.peak(ways.PAPER) for one in again if one.config["training"] == settings.FULL}
    assert peaks == {"nn.TransformerEncoder": 0.8, "LLaMA": 0.5} and len(again) == len(before)


def name(row: dict[str, Any]) -> str:
    return f"{row['config']['model']} {row['config']['training']}"


def test_plot_draws_clean_rows_only_and_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected clean rows"):
        plot.draw(recorded(tmp_path / "dry.jsonl", Machine()), tmp_path / "convert.svg")
    rows = real(tmp_path / "rows.jsonl")
    for file in ("first.svg", "second.svg"):
        plot.draw(rows, tmp_path / file)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    text = (tmp_path / "first.svg").read_text()
    assert text.rstrip().endswith("</svg>") and plot.COLOURS[ways.MESA] in text
