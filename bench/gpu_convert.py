"""GPU stage: whole models converted, at the widths of real ones, beside other ways to save activations.

A run that is stopped goes on where it was when it is started again with the same file of rows.
"""

from bench import gpu_stage
from bench.memory import record


def main() -> None:
    """Adds the rows of all settings."""
    recorder = gpu_stage.begin("convert")
    record.run(recorder)
    gpu_stage.end(recorder)


if __name__ == "__main__":
    main()
