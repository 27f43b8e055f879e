r"""Tokenizers: bytes, or one of Hugging Face's `tokenizers` (extra `tokenize`).

A tokenizer is a folder, as checkpoints have it:

    tokenizer.json           the vocabulary and its rules
    tokenizer_config.json    tokens that begin and end a text, and the chat template
    chat_template.jinja      the chat template, if it has a file of its own

Moonlight's checkpoints have `tiktoken.model` instead of the first; it is converted when it is read.
A document is the token that begins a text, the text, and the token that ends it. A tokenizer with
one of the two only has that one before every document, as bytes have `\0`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from optax_muon.errors import UsageError
from optax_muon.extras import require_extra

RULES, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TIKTOKEN = "tiktoken.model"
END_OF_TEXT = "<|endoftext|>"
"""The token between texts of a tokenizer that is trained here; its number is 0."""
MIN_VOCAB = 257
"""All bytes, so that every text has tokens, and the token between texts."""

# What Moonlight's and Kimi's own tokenizers cut a text into before they merge bytes. `&&` is an
# intersection of sets of characters.
_HAN = r"[\p{Han}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PIECES = "|".join(
    (
        _HAN,
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_RESERVED = 256
"""Tokens after the vocabulary of a `tiktoken.model`; those without a name are reserved."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def begin(self) -> tuple[int, ...]:
        """Tokens before a text: one or none."""

    @property
    def end(self) -> tuple[int, ...]:
        """Tokens after a text: one or none."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text, without those that begin and end it.

        Args:
            text: The text.
            special: Whether names of special tokens in it are these tokens, or ordinary text.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are left out."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    r"""Bytes of UTF-8; a zero byte begins a text, and ends it.

    >>> Bytes().encode("né")
    [110, 195, 169]
    """

    vocab_size: int = 256
    """Number of bytes."""
    begin: tuple[int, ...] = (0,)
    """A zero byte, which no text contains."""
    end: tuple[int, ...] = (0,)
    """The same: it begins the next text."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The bytes of a text; none is special."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes a replacement character."""
        return bytes(tokens).decode(errors="replace")


class Subwords:
    """A tokenizer of Hugging Face's `tokenizers`, with the settings of its folder.

    Args:
        rules: A `tokenizers.Tokenizer`.
        settings: The contents of `tokenizer_config.json`.
        template: The chat template; None takes that of the settings.
    """

    def __init__(
        self, rules: Any, settings: dict[str, Any] | None = None, template: str | None = None
    ):
        rules.no_padding()
        rules.no_truncation()
        self._rules, self._settings = rules, settings or {}
        self._template = template or _named_template(self._settings.get("chat_template"))
        self.vocab_size: int = rules.get_vocab_size(with_added_tokens=True)
        self.begin, self.end = self._special("bos_token"), self._special("eos_token")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; see `Tokenizer`."""
        self._rules.encode_special_tokens = not special
        tokens: list[int] = self._rules.encode(text, add_special_tokens=False).ids
        return tokens

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of several texts, on all cores; nothing in them is special."""
        self._rules.encode_special_tokens = True
        return [each.ids for each in self._rules.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are left out."""
        text: str = self._rules.decode(list(tokens), skip_special_tokens=True)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether it can write a conversation."""
        return self._template is not None

    def prompt(self, user: str) -> str:
        """What a user says as a conversation in which it is the assistant's turn.

        Raises:
            UsageError: As `conversation`.
        """
        return self._render([{"role": "user", "content": user}], True)

    def conversation(self, user: str, assistant: str) -> tuple[str, str]:
        """The `prompt` of a conversation, and all of the assistant's turn, its end included.

        Raises:
            UsageError: The template cannot write it, or not the one after the other.
        """
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
        prompt, whole = self.prompt(user), self._render(messages, False)
        if not whole.startswith(prompt):
            raise UsageError(
                "the chat template does not write the prompt before the completion as it writes "
                "the prompt alone; use --raw"
            )
        return prompt, whole.removeprefix(prompt)

    @functools.cached_property
    def turn_end(self) -> tuple[int, ...]:
        """The special token after what the assistant says; none without one."""
        if not self.has_chat_template:
            return ()
        _, turn = self.conversation("?", "!")
        after = self.encode(turn.partition("!")[2].strip(), special=True)[:1]
        special = self._rules.get_added_tokens_decoder()
        return tuple(token for token in after if token in special)

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self._rules.save(str(folder / RULES))
        (folder / SETTINGS).write_text(
            json.dumps(self._settings, indent=2) + "\n", encoding="utf-8"
        )
        if self._template is not None:
            (folder / TEMPLATE).write_text(self._template, encoding="utf-8")

    def _special(self, name: str) -> tuple[int, ...]:
        """The token of a setting, as a tuple of one or none."""
        content = _content(self._settings.get(name))
        number = None if content is None else self._rules.token_to_id(content)
        return () if number is None else (number,)

    def _render(self, messages: list[dict[str, str]], prompts: bool) -> str:
        """The messages as the chat template writes them, in Jinja's sandbox."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The environment in which transformers renders templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        names = {
            name: _content(value)
            for name, value in self._settings.items()
            if name.endswith("_token")
        }
        try:
            template = environment.from_string(self._template or "")
            return template.render(messages=messages, add_generation_prompt=prompts, **names)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template cannot be applied: {error}; use --raw") from error


def check_installed() -> None:
    """Check that the packages of the extra `tokenize` are installed.

    Raises:
        MissingExtraError: One is not.
    """
    require_extra("tokenize", "A tokenizer")


def load(path: Path) -> Subwords:
    """Read a tokenizer.

    Args:
        path: A `tokenizer.json`, or a folder with one or with a `tiktoken.model`, such as that of a
            Hugging Face checkpoint.

    Raises:
        UsageError: There is none, or it cannot be read.
        MissingExtraError: The package `tokenizers` is not installed.
    """
    check_installed()
    import tokenizers

    folder = path if path.is_dir() else path.parent
    settings = _json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    template = (
        (folder / TEMPLATE).read_text(encoding="utf-8") if (folder / TEMPLATE).exists() else None
    )
    file = path / RULES if path.is_dir() else path
    if not file.exists() and (folder / TIKTOKEN).exists():
        return Subwords(_from_tiktoken(folder / TIKTOKEN, settings), settings, template)
    if not file.is_file():
        raise UsageError(f"there is no tokenizer in {path}; it has neither {RULES} nor {TIKTOKEN}")
    try:
        rules = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no narrower class
        raise UsageError(f"cannot read {file}: {error}") from error
    return Subwords(rules, settings, template)


def copy(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer from one folder to another, which is made."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (RULES, SETTINGS, TEMPLATE):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def is_same(one: Path, other: Path) -> bool:
    """Whether the tokenizers of two folders that `Subwords.save` has written have equal rules."""
    return (one / RULES).read_bytes() == (other / RULES).read_bytes()


def is_in(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).exists() for name in (RULES, TIKTOKEN))


def train(texts: Iterable[str], vocab: int) -> Subwords:
    """Learn a vocabulary by byte-pair encoding (Sennrich et al., arXiv 1508.07909).

    Texts are cut into words as GPT-2 does. All bytes are tokens, so that nothing is unknown.

    Args:
        texts: The texts.
        vocab: Number of tokens.

    Raises:
        UsageError: `vocab` is smaller than `MIN_VOCAB`.
        MissingExtraError: The package `tokenizers` is not installed.
    """
    check_installed()
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab < MIN_VOCAB:
        raise UsageError(f"--train-vocab is {vocab}; it must be at least {MIN_VOCAB}")
    rules = tokenizers.Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator(texts, trainer)
    return Subwords(rules, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})


def _content(token: Any) -> Any:
    """The text of a token in the settings, which may be an object with more about it."""
    return token.get("content") if isinstance(token, dict) else token


def _named_template(value: Any) -> str | None:
    """The chat template of the settings: a text, or the one called `default` of several."""
    if isinstance(value, list):
        found = {each.get("name"): each.get("template") for each in value}
        value = found.get("default")
    return value if isinstance(value, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"cannot read {path}: it has no settings by name")
    return content


def _from_tiktoken(path: Path, settings: dict[str, Any]) -> Any:
    """The tokenizer of a `tiktoken.model`: bytes in base64 and their ranks, a line each.

    The merge that makes a token is the last one of those that make it from its bytes, each time
    the pair of lowest rank. Tokens after the vocabulary have names in the settings, or none.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    try:
        lines = (
            line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        )
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [pair for token in ordered if (pair := _last_merge(token, ranks))]
    rules = tokenizers.Tokenizer(
        models.BPE(
            vocab={spelled(token): rank for token, rank in ranks.items()},
            merges=[(spelled(left), spelled(right)) for left, right in merges],
            ignore_merges=True,  # a piece that is a token is that token, merged or not
        )
    )
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rules.decoder = decoders.ByteLevel()
    added = settings.get("added_tokens_decoder", {})
    named = {int(number): each["content"] for number, each in added.items()}
    special = range(len(ranks), len(ranks) + _RESERVED)
    names = [named.get(number, f"<|reserved_token_{number}|>") for number in special]
    rules.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return rules


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that a token is merged from; None if merges of lower ranks lead elsewhere."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in itertools.pairwise(parts)]
        lowest = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[lowest] >= own:
            return None
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    left, right = parts
    return left, right


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in `tokenizers`: itself where it can be printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
