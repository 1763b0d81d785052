"""What is measured on the CPU; each module has `run(recorder)` and is called by `python -m bench.run`."""
