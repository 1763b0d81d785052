"""What is measured: families, ways, trainings and sizes, for this machine's CPU, for a GPU, and for a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bench.memory import ways
from bench.memory.families import FAMILIES, Batch, Family, Size, move

FULL, LORA, LORA_DROPOUT = "full", "LoRA", "LoRA, dropout 0.1"
TRAININGS: dict[str, float | None] = {FULL: None, LORA: 0.0, LORA_DROPOUT: 0.1}  # dropout of adapters
RANK = 4  # of adapters on all linears: the paper's (arXiv 2406.16282) for ViT
PAPERS = ("vit", "swin", "llama", "roberta", "bert")  # families that the paper measures
OTHERS = ("mistral", "qwen2", "qwen3", "opt", "gpt2", "gemma", "encoder")
FEW = (ways.EAGER, ways.EXACT, ways.PAPER)


@dataclass(frozen=True)
class Setting:
    """One model as it is trained, on one batch.

    Attributes:
        family, training: keys of `FAMILIES` and `TRAININGS`.
        size, rows, layers: of the model and the batch; of Swin, pairs of layers.
        ways: that are compared, eager first.
        per_layer: whether what one more layer keeps is measured too.
        timed: whether steps are.
    """

    family: str
    training: str
    size: Size
    rows: int
    layers: int = 2
    ways: tuple[str, ...] = FEW
    per_layer: bool = False
    timed: bool = False

    @property
    def about(self) -> Family:
        return FAMILIES[self.family]

    def config(self) -> dict[str, object]:
        """For the rows."""
        return {
            "model": self.about.title,
            "training": self.training,
            "length": self.size.length,
            "rows": self.rows,
            "layers": self.layers,
            "hidden": self.size.width,
            "dtype": "bfloat16 autocast",
        }

    def model(self, device: str, layers: int | None = None) -> nn.Module:
        """A model with random weights, all trained in float32, or frozen with adapters of PEFT."""
        with torch.device(device):
            model = self.about.build(self.layers if layers is None else layers, self.size, 0.0)
        dropout = TRAININGS[self.training]
        if dropout is None:
            return model
        import peft

        targets = self.about.adapted
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            fan_in_fan_out=self.family == "gpt2",
        )
        return peft.get_peft_model(model, config)

    def batch(self, device: str, rows: int | None = None) -> Batch:
        return move(self.about.batch(self.rows if rows is None else rows, self.size), device)


@dataclass(frozen=True)
class Grid:
    """Sizes of one kind of machine.

    Attributes:
        sizes: by family, two each; of other families, one, under "".
        tokens: of a batch, for a width of 768.
        layers: of a model.
        rounds: of timed steps.
        backend: of torch.compile.
    """

    sizes: Mapping[str, Sequence[Size]]
    tokens: int
    layers: int = 2
    rounds: int = 5
    backend: str = "inductor"
    papers: Sequence[str] = PAPERS
    others: Sequence[str] = OTHERS
    trainings: Sequence[str] = (FULL, LORA, LORA_DROPOUT)

    def settings(self) -> list[Setting]:
        """The families of the paper by all ways, full and with adapters, at all their sizes; the rest by eager, exact
        and paper at one; adapters with dropout by these and at the first size."""
        found = []
        for family in (*self.others, *self.papers):  # the many short ones first
            known = family in self.papers
            sizes = self.sizes[family] if family in self.sizes else self.sizes[""]
            for training in self.trainings:
                everything = known and training != LORA_DROPOUT
                if training == LORA and not known:
                    continue
                for number, size in enumerate(sizes if everything else sizes[:1]):
                    found.append(
                        Setting(
                            family,
                            training,
                            size,
                            FAMILIES[family].rows(size, self.tokens * 768 // size.width),
                            self.layers,
                            ways.ALL if everything else FEW,
                            per_layer=number == 0,
                            timed=training != LORA_DROPOUT,
                        )
                    )
        return found


_TEXT = tuple(Size(768, 12, length) for length in (128, 384))
CPU = Grid(
    {
        "": _TEXT,
        "vit": tuple(Size(768, 12, side) for side in (160, 224)),
        "swin": tuple(Size(96, 3, side) for side in (112, 224)),
        "llama": tuple(Size(768, 12, length, inner=2048) for length in (128, 384)),
    },
    tokens=512,
)
_LARGE = tuple(Size(4096, 32, length, inner=11008) for length in (512, 2048))  # LLaMA-7B
_BASE = tuple(Size(768, 12, length) for length in (128, 512))
GPU = Grid(
    {
        "": _LARGE,
        "vit": tuple(Size(1024, 16, side) for side in (224, 384)),  # ViT-L/16
        "swin": tuple(Size(128, 4, side) for side in (224, 448)),  # the first stage of Swin-B
        "bert": _BASE,
        "roberta": _BASE,
        "gpt2": tuple(Size(1600, 25, length) for length in (1024,)),  # GPT-2 XL
        "opt": tuple(Size(4096, 32, length) for length in (2048,)),  # OPT-6.7B
        "gemma": tuple(Size(3072, 16, length, inner=24576) for length in (2048,)),  # Gemma-7B
        "encoder": _BASE[:1],
    },
    tokens=1 << 15,
    layers=4,
    rounds=11,
)
_TINY = Size(32, 4, 16)
DRY = Grid(
    {"": (_TINY,)},
    tokens=1,
    rounds=1,
    backend="aot_eager",
    papers=("llama",),
    others=("encoder",),
    trainings=(FULL, LORA_DROPOUT),
)
