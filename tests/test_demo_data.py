"""The demo's text: giveaways stripped, near-duplicates dropped, balanced and stable splits, readable errors."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import demo_data

SMALL = {"train_per_class": 24, "held_out_per_class": 8}


@pytest.fixture(scope="module")
def docstrings() -> demo_data.Dataset:
    """A small set of the default task, from the packages installed here."""
    return demo_data.docstring_dataset(**SMALL)


def runs_of_words(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall("[a-z]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_giveaways_are_stripped():
    docstring = """Return a NumPy copy of :class:`~torch.nn.Module` weights, see https://pytorch.org/docs for more.

    >>> import numpy as np
    import transformers
    The HuggingFace `PreTrainedModel` calls torch.add with requires_grad and **two** more Transformers; Python's own.
    """
    text = demo_data.strip_giveaways(docstring)
    assert text == "Return a copy of weights, see for more. The calls with and two more ; 's own.".replace(" ;", "")


@pytest.mark.parametrize(
    "word", ["numpy", "NumPy's", "torch", "pytorch", "np", "Hugging Face", "transformers", "Python"]
)
def test_package_names_are_stripped(word: str):
    assert demo_data.strip_giveaways(f"alpha {word} beta").replace("'s ", "") == "alpha beta"


def test_text_is_cut():
    text = demo_data.strip_giveaways(" ".join(["word"] * 100))
    assert text.split() == ["word"] * demo_data.MAX_WORDS


def test_docstrings_are_parsed_and_never_executed(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('"""Of a test."""')
    (tmp_path / "broken.py").write_text('"""Unfinished."""\ndef f(:\n')
    (tmp_path / "module.py").write_text(
        '"""Of the module."""\nraise SystemExit\nclass A:\n    """Of the class."""\n'
        '    async def f(self):\n        """Of the method."""\n    x = 1\n    """Of nothing."""\n'
    )
    assert sorted(demo_data.docstrings(tmp_path)) == ["Of the class.", "Of the method.", "Of the module."]


def test_files_come_in_an_order_of_their_own(tmp_path: Path):
    names = [f"{letter}.py" for letter in "abcdefgh"]
    for folder, order in (("one", names), ("two", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(f'"""{name}"""')
    one, two = (list(demo_data.docstrings(tmp_path / folder)) for folder in ("one", "two"))
    assert one == two
    assert one != names


def test_distinct_drops_near_duplicates_and_short_texts():
    seen: set[tuple[str, ...]] = set()
    first = "one two three four five six seven eight"
    near = "nine ONE two, three four five ten eleven twelve"
    other = "one two three four nine ten eleven twelve"
    assert list(demo_data.distinct([first, near, "too short a text", other], seen)) == [first, other]
    assert list(demo_data.distinct([first], seen)) == []


def test_split_is_balanced_and_a_text_never_changes_sides():
    texts = [[f"{label} text number {i}" for i in range(400 + 100 * label)] for label in range(3)]
    train, held_out = demo_data.split_balanced(texts, train_per_class=100, held_out_per_class=50)
    for side, count in ((train, 100), (held_out, 50)):
        assert [sum(label == wanted for _, label in side) for wanted in range(3)] == [count] * 3
        assert all(text in texts[label] for text, label in side)
    assert not set(train) & set(held_out)
    assert demo_data.split_balanced([t[::-1] for t in texts], train_per_class=100, held_out_per_class=50) == (
        train,
        held_out,
    )
    fewer = demo_data.split_balanced([t[:300] for t in texts], train_per_class=1000, held_out_per_class=1000)
    assert not set(fewer[0]) & set(held_out)
    assert not set(fewer[1]) & set(train)


def test_split_needs_every_class_on_both_sides():
    with pytest.raises(ValueError, match="texts_by_label: expected texts of all classes"):
        demo_data.split_balanced([["a text"], []], train_per_class=1, held_out_per_class=1)


def test_docstring_task_is_balanced(docstrings: demo_data.Dataset):
    assert len(docstrings.labels) == 4
    for side, count in ((docstrings.train, 24), (docstrings.held_out, 8)):
        assert [sum(label == wanted for _, label in side) for wanted in range(4)] == [count] * 4


def test_docstring_task_is_the_same_every_time(docstrings: demo_data.Dataset):
    assert demo_data.docstring_dataset(**SMALL) == docstrings


def test_docstring_task_gives_no_package_away(docstrings: demo_data.Dataset):
    given_away = re.compile(r"numpy|torch|transformer|hugging|python|\bnp\b|>>>|_|\w\.\w", re.IGNORECASE)
    assert [text for text, _ in docstrings.train + docstrings.held_out if given_away.search(text)] == []


def test_no_text_is_nearly_on_both_sides(docstrings: demo_data.Dataset):
    length = demo_data.SHINGLE_WORDS
    train = set().union(*(runs_of_words(text, length) for text, _ in docstrings.train))
    assert all(train.isdisjoint(runs_of_words(text, length)) for text, _ in docstrings.held_out)


def test_sst2_reads_a_folder(tmp_path: Path):
    (tmp_path / "train.tsv").write_text("fine , really\t1\ndull\t0\nodd\ttab\t1\n")
    (tmp_path / "dev.tsv").write_text("good\t1\n")
    data = demo_data.sst2_dataset(tmp_path)
    assert sorted(data.train) == [("dull", 0), ("fine , really", 1), ("odd\ttab", 1)]
    assert data.held_out == (("good", 1),)
    assert len(demo_data.sst2_dataset(tmp_path, train_limit=2).train) == 2


def test_sst2_errors_name_file_and_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--data: expected train\.tsv"):
        demo_data.sst2_dataset(tmp_path)
    (tmp_path / "train.tsv").write_text("good\t1\nbad\tnegative\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: expected sentence<TAB>0 or 1, got 'bad\\tnegative'"):
        demo_data.sst2_dataset(tmp_path)


def test_sst2_without_data_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install datasets.*--data FOLDER"):
        demo_data.sst2_dataset()
