"""Memory and time of converted models beside other ways to save activations; `bench.cases.convert` records them."""
