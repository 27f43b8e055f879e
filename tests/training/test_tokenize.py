"""Tokenizers and the folders of tokens: nothing lost, nothing twice, the same after a kill."""

import base64
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from commands import refused

from optax_muon.cli.huggingface import ImportHF
from optax_muon.cli.main import main
from optax_muon.errors import UsageError
from optax_muon.training.data import prompts, tokens
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.data.tokens import TokenizeJob
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.run_folder import RunFolder

pytest.importorskip("tokenizers", reason="pip install optax-muon[tokenize]")
from optax_muon.training.data import tokenizer

pytestmark = pytest.mark.usefixtures("standard_promotion")

TEMPLATE = (
    "{% for message in messages %}<|im_user|>{{ message['role'] }}: {{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_user|>assistant: {% endif %}"
)
TEXTS = [f"def f{i}(x):\n    return x + {i}  # né {chr(0x4E00 + i)}\n" * 3 for i in range(60)]


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The same documents as files of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "text" / f"{i:03}.py").write_bytes(text.encode())
    rows = [{"text": text, "other": 1} for text in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def split(array, separator=0):
    """The documents of an array of tokens."""
    cuts = [*np.flatnonzero(array == separator), len(array)]
    return [array[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]


def made(inputs, out, source="rows.jsonl", *options):
    main(["tokenize", str(inputs / source), "--out", str(out), "--train-vocab", "300", *options])
    return out


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    return made(inputs, tmp_path_factory.mktemp("out") / "tokens")


# Tokenizers


def test_every_text_comes_back(trained):
    for text in [*TEXTS, "\0 \x7f é 中 😀\r\n\t", ""]:
        assert trained.decode(trained.encode(text)) == text


def test_a_special_token_in_a_text_is_text_unless_asked_for(trained):
    assert trained.encode(tokenizer.END_OF_TEXT, special=True) == [0] == [*trained.begin]
    plain = trained.encode(tokenizer.END_OF_TEXT)
    assert 0 not in plain and trained.decode(plain) == tokenizer.END_OF_TEXT


def by_rank(piece, ranks):
    """Byte-pair encoding as it is defined: the pair of lowest rank is merged, again and again."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1 and piece not in ranks:
        pairs = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
        if min(pairs) == 10**9:
            break
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[piece]] if piece in ranks else [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tokenizer of a checkpoint as Moonlight has it, and its ranks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = [b"ab", b"cd", b"abcd", b" t", b" th", b" the", b"xyz", b"the", b"th"]  # xyz: no merges
    ranks = {bytes([b]): b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("\n".join(lines))
    names = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3}
    added = {str(len(ranks) + number): {"content": name} for name, number in names.items()}
    settings = {"bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}, "chat_template": TEMPLATE}
    settings["added_tokens_decoder"] = added
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, ranks


@pytest.mark.parametrize(
    "text", ["abcd cdab the the xyz xy", " theabcd", "ab\n\ncd  the 12345", "é"]
)
def test_a_tiktoken_model_is_merged_by_rank(checkpoint, text):
    folder, ranks = checkpoint
    found = tokenizer.load(folder)
    # The cut into pieces, for letters, digits and spaces alone.
    pieces = re.findall(r" ?[^\W\d]+|\d{1,3}|\s*\n+|\s+(?!\S)|\s+", text)
    assert "".join(pieces) == text
    assert found.encode(text) == [n for piece in pieces for n in by_rank(piece.encode(), ranks)]
    assert found.vocab_size == len(ranks) + 256


def test_a_conversation_is_that_of_the_template_and_ends_with_its_token(checkpoint):
    found = tokenizer.load(checkpoint[0])
    assert found.conversation("a", "b") == (
        "<|im_user|>user: a<|im_end|><|im_user|>assistant: ",
        "b<|im_end|>",
    )
    [bos, eos, im_end] = (len(checkpoint[1]) + n for n in range(3))
    assert (found.begin, found.end, found.turn_end) == ((bos,), (eos,), (im_end,))


def test_a_turn_does_not_end_with_a_token_of_ordinary_text(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenizer.load(tmp_path).turn_end == ()  # here <|im_end|> is text


def test_a_saved_tokenizer_is_the_same(checkpoint, tmp_path):
    found = tokenizer.load(checkpoint[0])
    found.save(tmp_path / "a")
    again = tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    tokenizer.copy(tmp_path / "b", tmp_path / "c")
    assert tokenizer.is_same(tmp_path / "a", tmp_path / "c")
    assert again.encode("abcd the") == found.encode("abcd the")
    assert again.prompt("x") == found.prompt("x")


def test_an_import_takes_the_tokenizer_over_converted(checkpoint, tmp_path):
    ImportHF(checkpoint[0], tmp_path)._take_tokenizer()
    found = tokenizer.load(RunFolder(tmp_path).tokenizer)
    assert found.encode("abcd the") == tokenizer.load(checkpoint[0]).encode("abcd the")
    assert found.turn_end and not (tmp_path / "tokenizer" / "tiktoken.model").exists()


def test_a_template_that_refuses_is_one_sentence(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(UsageError, match="cannot be applied: no system; use --raw"):
        tokenizer.load(tmp_path).prompt("x")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot read"):
        tokenizer.load(tmp_path)


# Folders of tokens


def test_every_document_is_in_exactly_one_part_and_comes_back(folder):
    corpus = load_corpus(str(folder), 8, 300)
    found = tokenizer.load(folder)
    assert corpus.train.dtype == np.uint16  # the smallest that holds 299
    parts = [[found.decode(d) for d in split(p)] for p in (corpus.train, corpus.held_out)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS)
    assert parts[1]
    assert isinstance(corpus.train.base, np.memmap) or isinstance(corpus.train, np.memmap)


@pytest.mark.parametrize("source", ["text", "rows.parquet"])
def test_the_kind_of_file_does_not_matter(inputs, folder, tmp_path, source):
    if source.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow", reason="pip install optax-muon[parquet]")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
        parquet.write_table(table, inputs / source, row_group_size=7)
    out = made(inputs, tmp_path / "tokens", source)
    for name in ("train.npy", "held_out.npy", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_killed_job_goes_on_to_the_same_files(inputs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 1000)
    job = TokenizeJob([inputs / "rows.jsonl"], "text", tmp_path / "t", "x", lambda _: None)
    monkeypatch.setattr(TokenizeJob, "_training_texts", lambda *_: None)
    object.__setattr__(job, "make", lambda _: tokenizer.load(folder))
    for stop in (2, 3, 100):
        steps = job.run()
        seen = list(itertools.islice(steps, stop))
        # As after kill -9: nothing is closed, and a part of the next batch is in the file.
        if stop < 100:
            with (job.draft / "train.npy").open("ab") as file:
                file.write(b"rubbish")
        del steps
    assert seen[-1].done == pytest.approx(1.0, abs=0.01) and seen[-1].documents == len(TEXTS)
    for name in ("train.npy", "held_out.npy"):
        assert (job.out / name).read_bytes() == (folder / name).read_bytes()
    assert not job.draft.exists()


def test_of_few_documents_the_ends_are_held_out(trained, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(text := "".join(TEXTS))
    job = TokenizeJob([path], "text", tmp_path / "t", "x", lambda _: trained)
    list(job.run())
    corpus = load_corpus(str(job.out), 8, 300)
    [whole], [rest] = split(corpus.train), split(corpus.held_out)
    assert trained.decode(whole) + trained.decode(rest) == text
    assert len(trained.decode(rest)) == pytest.approx(0.05 * len(text), abs=1)


def test_a_long_document_is_cut_at_lines_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    pieces = tokens._pieces(text := "".join(TEXTS))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    assert sum(piece.endswith("\n") for piece in pieces) >= len(pieces) - 1
    assert tokens._pieces("x" * 250) == ["x" * 100, "x" * 100, "x" * 50]


def test_what_is_no_text_is_refused_with_its_line(tmp_path, capsys):
    out = ["--out", tmp_path / "t", "--train-vocab", "300"]
    for name, content, words in (
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("b.jsonl", b'{"body": "a"}', 'line 1 has no text "text"; --field names it'),
        ("c.txt", b"\xff", "is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refused(capsys, "tokenize", tmp_path / name, *out)
        shutil.rmtree(tmp_path / ".t.partial")
    (tmp_path / "c.txt").write_text("a")
    neither = refused(capsys, "tokenize", tmp_path / "c.txt")
    assert "either --tokenizer" in neither
    assert "--train-vocab is 3" in refused(capsys, "tokenize", "--train-vocab", "3")
    lost = refused(capsys, "tokenize", tmp_path / "c.txt", "--tokenizer", tmp_path, *out[:2])
    assert "there is no tokenizer in" in lost


# Training, fine-tuning and sampling in these tokens


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A model of these tokens."""
    runs = tmp_path_factory.mktemp("runs")
    options = ["--steps", "12", "--eval-every", "6", "--save-every", "6", "--optimizers", "adamw"]
    where = ["--data", str(folder), "--runs", str(runs), "--name", "own"]
    main(["train", "--model", "tiny", *options, *where])
    return runs / "own"


def test_a_model_has_the_vocabulary_of_its_tokens(run, folder):
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["model"]["vocab_size"] == 300
    assert tokenizer.is_same(RunFolder(run).tokenizer, folder)
    assert PretrainedSource(run).tokenizer.begin == (0,)


def test_a_model_writes_in_its_own_tokens(run, capsys):
    where = ["--runs", str(run.parent), "--run", "own", "--length", "8", "--temperature", "0"]
    main(["sample", *where, "--prompt", "def né"])
    assert capsys.readouterr().out.startswith("def né")


def test_the_turns_of_a_conversation_are_told_apart(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "chat")
    (RunFolder(tmp_path / "chat").tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    where = ["--runs", str(tmp_path), "--run", "chat", "--length", "8", "--temperature", "0"]
    main(["sample", *where, "--prompt", "Who?"])
    assert capsys.readouterr().out.startswith("user: Who?\nassistant: ")


def test_pairs_are_tokens_of_the_run_or_turns_of_its_template(run, checkpoint, tmp_path):
    path = tmp_path / "two.jsonl"
    pairs = [{"prompt": "ab", "completion": "cd"}, {"prompt": "the", "completion": "x"}]
    path.write_text("\n".join(map(json.dumps, pairs)))
    found = tokenizer.load(checkpoint[0])
    for raw in (True, False):
        loaded = prompts.load_prompts(path, 80, found, raw=raw)
        [row] = [r for r in (*loaded.train.tokens, *loaded.held_out.tokens) if 256 in r.tolist()]
        [weights] = [
            w
            for part in (loaded.train, loaded.held_out)
            for r, w in zip(part.tokens, part.weights, strict=True)
            if 256 in r.tolist()
        ]
        learned = row[1:][weights > 0].tolist()
        assert learned == [257, *(found.end if raw else found.turn_end)]
        assert row[0] == (found.begin[0] if raw else found.encode("<|im_user|>", special=True)[0])


def test_another_tokenizer_than_the_runs_is_refused(run, checkpoint, inputs, tmp_path, capsys):
    start = ["train", "--model", "tiny", "--from", run, "--runs", tmp_path, "--name", "x"]
    assert "--data is raw text; tokenize it first" in refused(capsys, *start)
    job = TokenizeJob(
        [inputs / "rows.jsonl"], "text", tmp_path / "t", "x", lambda t: tokenizer.train(t, 290)
    )
    list(job.run())
    assert "have different tokenizers" in refused(capsys, *start, "--data", job.out)


def test_a_fine_tuned_run_keeps_the_tokenizer(run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i} +", "completion": f" {i}"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    where = ["--from", str(run), "--data", str(path), "--runs", str(tmp_path), "--name", "tuned"]
    main(["finetune", *where, "--epochs", "1", "--batch", "4", "--optimizers", "adamw"])
    assert tokenizer.is_same(RunFolder(tmp_path / "tuned").tokenizer, RunFolder(run).tokenizer)
