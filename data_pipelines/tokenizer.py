"""Tokenizers: byte-level BPE with Qwen2.5's pre-tokenisation, trained on a small corpus or taken from Qwen.

Special tokens are found by id, as `SpecialTokens` has it; the text of a transcript never turns into one.
"""

import base64
import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chroma_jax.sequence.chat_template import Encode, SpecialTokens
from chroma_jax.utils.errors import InputError

# Qwen2.5's pattern: contractions, words with the character before them, single digits, punctuation, line ends, spaces
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CONTENT = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_start": "<|audio_bos|>",
    "audio_end": "<|audio_eos|>",
    "text_start": "<|voice_text_start|>",
    "text_end": "<|voice_text_end|>",
}

# Qwen2.5-Omni's added tokens in the order of their ids, from 151643 on; then the two of the voice prompt
QWEN_ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", CONTENT["text_start"], CONTENT["text_end"]),
)


def assembled(model: models.BPE) -> Tokenizer:
    """A tokenizer around a BPE model, with Qwen2.5's normalisation, pre-tokenisation and byte alphabet."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def added(content: str) -> AddedToken:
    return AddedToken(content, normalized=False, special=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, tokens: SpecialTokens) -> Tokenizer:
    """Learns a tokenizer. Special tokens get the ids of ``tokens``; ordinary ones fill the other ids from 0 on.

    A corpus too small for ``vocab_size`` leaves ids unused. Raises InputError when a special id is not below
    ``vocab_size``, two are equal, or there is no room for the 256 bytes.
    """
    special = {getattr(tokens, field): content for field, content in CONTENT.items()}
    if len(special) < len(CONTENT):
        raise InputError(f"special token ids are not distinct: {dataclasses.asdict(tokens)}")
    if max(special) >= vocab_size:
        raise InputError(f"special token id {max(special)} does not fit in vocab_size {vocab_size}")
    room = vocab_size - len(special)
    if room < 256:
        raise InputError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens need room")
    tokenizer = assembled(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = read_bpe(tokenizer)
    ordinary = sorted(model["vocab"], key=model["vocab"].get)
    free = (i for i in range(vocab_size) if i not in special)
    # the special tokens are entries of the model too: that is what puts an added token at an id of one's choice
    vocab = dict(zip(ordinary, free, strict=False)) | {content: i for i, content in special.items()}
    tokenizer = assembled(models.BPE(vocab=vocab, merges=[tuple(m) for m in model["merges"]]))
    tokenizer.add_special_tokens([added(special[i]) for i in sorted(special)])
    return tokenizer


def read_bpe(tokenizer: Tokenizer) -> Mapping:
    """The vocabulary and merges of a BPE tokenizer."""
    return json.loads(tokenizer.to_str())["model"]


def read_ranks(path: Path) -> dict[bytes, int]:
    """A ``.tiktoken`` file: a base64 token and its rank on each line. Raises InputError naming the line."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a token and its rank ({error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"{path}: ranks are not 0 … {len(ranks) - 1} with all 256 bytes among them")
    return ranks


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE with the ranks below ``token``'s own leaves of it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise InputError(f"token {token!r} of rank {ranks[token]} is not a merge of two tokens of lower rank")
    return parts[0], parts[1]


def from_ranks(path: Path) -> Tokenizer:
    """A ``.tiktoken`` rank file of the Qwen family as a Tokenizer, with Qwen2.5-Omni's added tokens after the ranks."""
    ranks = read_ranks(path)
    alphabet = byte_alphabet()

    def shown(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    merges = [tuple(map(shown, last_merge(t, ranks))) for t in sorted(ranks, key=ranks.get) if len(t) > 1]
    tokenizer = assembled(models.BPE(vocab={shown(t): r for t, r in ranks.items()}, merges=merges))
    for content in QWEN_ADDED:
        # the two tool tags are added but not special in Qwen's own file
        token = added(content) if content.startswith("<|") else AddedToken(content, normalized=False, special=False)
        tokenizer.add_tokens([token])
    return tokenizer


def qwen_ranks() -> Path:
    """Qwen's rank file inside the optional package ``dashscope`` (Apache-2.0). Raises InputError when it is not there."""
    spec = importlib.util.find_spec("dashscope")  # found, not imported: importing it opens network clients
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError('tokenizer "qwen" needs the package dashscope, which carries qwen.tiktoken: pip install dashscope')
    return path


def read_tokenizer(source: Path | str) -> Tokenizer:
    """Reads a tokenizer without checking it against a configuration; see `load_tokenizer`."""
    if str(source) == "qwen":
        return from_ranks(qwen_ranks())
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f'{path}: no such tokenizer; give a tokenizer.json, a folder that has one, a .tiktoken file or "qwen"')
    if path.suffix == ".tiktoken":
        return from_ranks(path)
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer.json ({error})") from error


def load_tokenizer(source: Path | str, tokens: SpecialTokens, vocab_size: int) -> Tokenizer:
    """Loads a tokenizer and checks that it fits the model.

    source: a tokenizer.json, a folder that contains one, a ``.tiktoken`` rank file, or "qwen". Raises InputError when it
    is missing or broken, when an ordinary token has an id at or past ``vocab_size``, when a special token is known to it
    under another id than in ``tokens``, or when such an id is an ordinary token there.
    """
    tokenizer = read_tokenizer(source)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"tokenizer {source}: token id {largest} does not fit in vocab_size {vocab_size}")
    known = tokenizer.get_added_tokens_decoder()
    wrong = []
    for field, content in CONTENT.items():
        expected, actual = getattr(tokens, field), tokenizer.token_to_id(content)
        if actual is not None and actual != expected:
            wrong.append(f"{field} {content} is {actual}, configured {expected}")
        elif actual is None and expected not in known and tokenizer.id_to_token(expected) is not None:
            wrong.append(f"{field} is configured as {expected}, which is the word {tokenizer.id_to_token(expected)!r}")
    if wrong:
        raise InputError(f"tokenizer {source}: special tokens differ from the configuration: {'; '.join(wrong)}")
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Encode:
    """text → ids without special tokens: markup in a transcript, such as "<|im_end|>", is encoded as plain characters."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return lambda text: plain.encode(text, add_special_tokens=False).ids
