"""The text: split without overlap, equal everywhere, batches a function of seed and step alone."""

import functools

import numpy as np
import pytest

from optax_muon.errors import UsageError
from optax_muon.training.data import corpus as corpora
from optax_muon.training.data.corpus import load_corpus


def write(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def many_files(folder, count=200):
    write(folder, {f"{i % 7}/file{i}.txt": b"<%d>" % i * 20 for i in range(count)})


def files_in(tokens):
    return set(tokens.tobytes().split(b"\0")) - {b""}


def test_every_file_is_in_exactly_one_part(tmp_path):
    many_files(tmp_path)
    corpus = load_corpus(str(tmp_path), context=8)
    train, held_out = files_in(corpus.train), files_in(corpus.held_out)
    assert not train & held_out
    assert train | held_out == {b"<%d>" % i * 20 for i in range(200)}
    assert 2 <= len(held_out) <= 20  # a twentieth of 200 in the mean


def test_the_same_files_are_held_out_wherever_the_folder_is(tmp_path):
    many_files(tmp_path / "here")
    many_files(tmp_path / "far" / "away")
    here = load_corpus(str(tmp_path / "here"), context=8)
    away = load_corpus(str(tmp_path / "far" / "away"), context=8)
    assert here.fingerprint == away.fingerprint


def test_the_held_out_files_are_fixed_for_good():
    # Values of the hash, not of the machine: these must never change.
    held_out = [i for i in range(100) if corpora.is_held_out(f"package/module{i}.py")]
    assert held_out == [17, 22, 26, 43, 47, 55, 65]


def test_the_standard_library_is_text_without_tests_or_installed_packages():
    root, files = corpora._standard_library()
    names = {path.relative_to(root).as_posix() for path in files}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not [name for name in names if "site-packages/" in name or "/test/" in name]


def test_of_few_files_the_ends_are_held_out(tmp_path):
    write(tmp_path, {"a.txt": b"a" * 190 + b"A" * 10, "b.txt": b"b" * 95 + b"B" * 5})
    corpus = load_corpus(str(tmp_path / "*.txt"), context=8)
    assert corpus.train.tobytes() == b"\0" + b"a" * 190 + b"\0" + b"b" * 95
    assert corpus.held_out.tobytes() == b"\0" + b"A" * 10 + b"\0" + b"B" * 5


def test_one_file_is_a_corpus(tmp_path):
    write(tmp_path, {"a.txt": bytes(range(1, 201))})
    corpus = load_corpus(str(tmp_path / "a.txt"), context=8)
    assert corpus.train.size + corpus.held_out.size == 202


def test_a_glob_of_two_stars_goes_into_folders(tmp_path):
    many_files(tmp_path)
    assert load_corpus(f"{tmp_path}/**/*.txt", context=8).origin.endswith("held out")


def test_no_match_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no file matches .*nothing\.txt"):
        load_corpus(str(tmp_path / "nothing.txt"), context=8)


@pytest.mark.parametrize(
    ("size", "part"), [(100, "held-out"), (5, "training")], ids=["held-out", "training"]
)
def test_text_too_short_for_one_sequence_is_refused(tmp_path, size, part):
    write(tmp_path, {"a.txt": b"x" * size})
    with pytest.raises(UsageError, match=f"in the {part} part; at least 33 are needed"):
        load_corpus(str(tmp_path / "a.txt"), context=32)


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    draw = functools.partial(corpora.starts, tokens, size=4, context=16)
    np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
    assert (draw(1, 2) != draw(1, 3)).any()
    assert (draw(1, 2) != draw(2, 1)).any()


def test_windows_are_pieces_of_the_text_and_reach_its_end():
    tokens = np.arange(40, dtype=np.uint8)
    starts = [corpora.starts(tokens, 0, step, 8, context=16) for step in range(200)]
    draws = corpora.windows(tokens, np.concatenate(starts), context=16)
    np.testing.assert_array_equal(np.diff(draws), 1)
    assert draws.dtype == np.int32
    assert (draws.min(), draws.max()) == (0, 39)


def test_held_out_windows_do_not_overlap_and_span_the_text():
    tokens = np.arange(100, dtype=np.uint8)
    windows = corpora.windows(
        tokens, corpora.held_out_starts(tokens, size=50, context=9), context=9
    )
    assert windows.shape == (10, 10)
    np.testing.assert_array_equal(windows.ravel(), np.arange(100))
