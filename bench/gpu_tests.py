"""GPU stage: runs the test suite and records what passed, what failed and what was skipped, with reasons."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

from bench import gpu_stage
from bench.machine import ROOT

# The suite's own tests of this stage would run the stage again.
SUITE = [str(ROOT / "tests"), "--deselect", "tests/test_bench.py::test_stage_dry_run"]
DRY_SUITE = [str(ROOT / "tests/test_bench.py"), "-k", "quantile or huge"]


def main() -> None:
    """Runs pytest once; a failed test fails the stage."""
    recorder = gpu_stage.begin("tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(ROOT),
            f"--junitxml={report}",
        ]
        done = subprocess.run([*command, *(DRY_SUITE if recorder.dry_run else SUITE)], check=False, cwd=folder)
        cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [
        (name(case), case.find("skipped").get("message", "")) for case in cases if case.find("skipped") is not None
    ]
    failed = [name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = len(cases) - len(skipped) - len(failed)
    recorder.add(
        "suite", "pytest", {}, value=passed, unit="passed", failed=failed, skipped=len(skipped), status=done.returncode
    )
    for test, reason in skipped:
        recorder.add("skipped", "pytest", {"test": test}, reason=reason)
    for case in cases:
        if "huge" in name(case) and case.find("skipped") is None:
            recorder.add(
                "above 2^31 elements", "pytest", {"test": name(case)}, value=float(case.get("time", "nan")), unit="s"
            )
    gpu_stage.end(recorder, failed=done.returncode != 0)


def name(case: xml.etree.ElementTree.Element) -> str:
    """Module and test."""
    return f"{case.get('classname')}::{case.get('name')}"


if __name__ == "__main__":
    main()
