"""Labelled text for the demo: which package a docstring belongs to, or SST-2 sentences."""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("numpy", "python standard library", "torch", "transformers")
MAX_WORDS = 24  # about 32 word pieces, what the model sees
MIN_WORDS = 8
SHINGLE_WORDS = 5  # texts that share so long a run of words count as near-duplicates

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "testing", "idlelib", "ensurepip", "lib2to3", "__pycache__"}
)
_CODE_LINE = re.compile(r"^\s*(>>>|\.\.\.|\.\. |:\w|from \S+ import |import ).*$", re.MULTILINE)
_URL = re.compile(r"\S+://\S+")
_ROLE = re.compile(r":[a-z][a-z:+-]*:(?=`)")
_DOTTED = re.compile(r"~?\b\w+(\.\w+)+\b")
_IDENTIFIER = re.compile(r"\b\w*(_|\d|[a-z][A-Z]|[A-Z]{2}[a-z])\w*\b")
_NAME = re.compile(r"\b(\w*(numpy|torch|aten|transformer|hugging|python)\w*|np|hf|stdlib)\b(\s+face\b)?", re.IGNORECASE)
_MARKUP = re.compile(r"[^A-Za-z,.;:'()-]+")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Dataset:
    """Texts with class indices, split once and for all; `labels` names the classes."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]


def strip_giveaways(docstring: str) -> str:
    """The first words of a docstring as plain prose, without what would give the package away.

    Removed: package names and every word containing one, dotted paths, identifiers, code lines, links and markup.
    """
    text = _CODE_LINE.sub(" ", docstring)
    for pattern in (_URL, _ROLE, _DOTTED, _IDENTIFIER, _NAME, _MARKUP):
        text = pattern.sub(" ", text)
    words = [word for word in text.split() if _WORD.search(word.lower())]
    return " ".join(words[:MAX_WORDS])


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of every module, class and function below `folder`, parsed and never imported.

    Files come in the order of the hash of their relative path: the same order everywhere, and a prefix of it is a
    sample of the whole package.
    """
    files = [path for path in folder.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts)]
    for path in sorted(files, key=lambda path: _digest(path.relative_to(folder).as_posix())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and files in another encoding
            continue
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and (docstring := ast.get_docstring(node)):
                yield docstring


def distinct(texts: Iterable[str], seen: set[tuple[str, ...]]) -> Iterator[str]:
    """Those texts that share no run of SHINGLE_WORDS words with any text before them; `seen` remembers the runs."""
    for text in texts:
        words = _WORD.findall(text.lower())
        shingles = {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
        if len(words) >= MIN_WORDS and seen.isdisjoint(shingles):
            seen |= shingles
            yield text


def split_balanced(
    texts_by_label: list[list[str]], *, train_per_class: int, held_out_per_class: int
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
    """Train and held-out pairs with equally many texts of each class.

    The hash of a text alone decides its side (one in four is held out), so a text never changes sides when others
    come or go.
    """
    sides: tuple[list, list] = ([], [])
    for side, (wanted, keep) in enumerate(((train_per_class, False), (held_out_per_class, True))):
        chosen = [sorted((t for t in texts if _held_out(t) == keep), key=_digest) for texts in texts_by_label]
        count = min(wanted, *map(len, chosen))
        if count == 0:
            raise ValueError(
                f"texts_by_label: expected texts of all classes on both sides, got {list(map(len, chosen))}"
            )
        sides[side].extend((text, label) for label, texts in enumerate(chosen) for text in texts[:count])
    train, held_out = (tuple(sorted(side, key=lambda pair: _digest(pair[0]))) for side in sides)
    return train, held_out


def package_folders() -> dict[str, Path]:
    """Source folder of each class of the docstring task, found without importing the package."""
    folders = {}
    for name in PACKAGES:
        if name == "python standard library":
            folders[name] = Path(sysconfig.get_paths()["stdlib"])
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the docstring task needs the package {name}: pip install {name}")
        folders[name] = Path(spec.origin).parent
    return folders


def docstring_dataset(*, train_per_class: int = 400, held_out_per_class: int = 150) -> Dataset:
    """Docstrings of installed packages, to be told apart by their prose alone; needs no download."""
    seen: set[tuple[str, ...]] = set()
    collected = []
    for folder in package_folders().values():
        texts: list[str] = []
        wanted = [train_per_class, held_out_per_class]
        for text in distinct(map(strip_giveaways, docstrings(folder)), seen):
            texts.append(text)
            wanted[_held_out(text)] -= 1
            if max(wanted) <= 0:
                break
        collected.append(texts)
    train, held_out = split_balanced(collected, train_per_class=train_per_class, held_out_per_class=held_out_per_class)
    return Dataset("docstrings", PACKAGES, train, held_out)


def sst2_dataset(folder: Path | None = None, *, train_limit: int = 1600) -> Dataset:
    """SST-2 from train.tsv and dev.tsv (sentence<TAB>label, no header) in `folder`, else from Hugging Face's hub.

    Held out is the whole dev set; of the training set the `train_limit` texts with the smallest hashes are used.
    """
    train, held_out = (
        _hub_sst2() if folder is None else map(list, map(_read_tsv, (folder / "train.tsv", folder / "dev.tsv")))
    )
    train = sorted(train, key=lambda pair: _digest(pair[0]))[:train_limit]
    return Dataset("sst2", ("negative", "positive"), tuple(train), tuple(held_out))


def _hub_sst2() -> list[list[tuple[str, int]]]:
    advice = "give --data FOLDER with train.tsv and dev.tsv (sentence<TAB>label), or use the default task"
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--task sst2 without --data needs datasets (pip install datasets); {advice}"
        ) from error
    try:
        parts = load_dataset("stanfordnlp/sst2")
    except (OSError, ValueError) as error:  # no network, or the hub does not answer
        raise ConnectionError(f"--task sst2: the hub could not be read ({error}); {advice}") from error
    return [[(row["sentence"].strip(), int(row["label"])) for row in parts[name]] for name in ("train", "validation")]


def _read_tsv(path: Path) -> Iterator[tuple[str, int]]:
    if not path.is_file():
        raise FileNotFoundError(f"--data: expected {path.name} (sentence<TAB>label) in {path.parent}, found none")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        sentence, tab, label = line.rpartition("\t")
        if not tab or label not in ("0", "1"):
            raise ValueError(f"{path}:{number}: expected sentence<TAB>0 or 1, got {line!r}")
        yield sentence, int(label)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _held_out(text: str) -> bool:
    return _digest(text)[-1] % 4 == 0
