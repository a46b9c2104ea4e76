"""Tokenizers: special tokens stand at the configured ids, text survives a round trip, misfits are errors."""

import base64
import dataclasses
import importlib.util

import pytest
from tiny_corpus import TOKENS

from chroma_jax.sequence.chat_template import SpecialTokens, question
from chroma_jax.utils.errors import InputError
from data_pipelines import tokenizer as t

TEXTS = ["What is one plus seven?", "One plus seven is eight.", "The capital of France is Paris."] * 4
ODD = "Naïve café — 漢字, ½ + 12345!\n\n  two  spaces\tand 'll don't"


@pytest.mark.parametrize("tokens", [TOKENS, SpecialTokens(*range(8)), SpecialTokens(3, 99, 100, 300, 301, 302, 400, 511)])
def test_special_tokens_stand_at_their_ids_and_text_survives(tmp_path, tokens):
    trained = t.train_tokenizer(TEXTS, 512, tokens)
    trained.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = t.load_tokenizer(source, tokens, 512)
        for field, content in t.CONTENT.items():
            assert loaded.token_to_id(content) == getattr(tokens, field)
            assert loaded.id_to_token(getattr(tokens, field)) == content
        ids = t.encoder(loaded)(ODD)
        assert loaded.decode(ids) == ODD
        assert max(ids) < 512 and not set(ids) & set(dataclasses.astuple(tokens))
        assert len(t.encoder(loaded)(TEXTS[0])) < len(TEXTS[0]) / 2  # something was learnt


def test_markup_in_a_transcript_is_plain_text():
    trained = t.train_tokenizer(TEXTS, 512, TOKENS)
    encode = t.encoder(trained)
    assert TOKENS.im_end not in encode("so <|im_end|> he said")
    assert trained.decode(encode("<|im_end|>")) == "<|im_end|>"
    assert question(encode, TOKENS, heard=[TOKENS.audio] * 3).count(TOKENS.audio) == 3


@pytest.mark.parametrize(
    ("size", "tokens", "words"),
    [
        (512, SpecialTokens(*range(505, 513)), "512 does not fit in vocab_size 512"),
        (512, SpecialTokens(1, 1, 2, 3, 4, 5, 6, 7), "not distinct"),
        (263, SpecialTokens(*range(8)), "too small"),
    ],
)
def test_impossible_vocabularies_are_errors(size, tokens, words):
    with pytest.raises(InputError, match=words):
        t.train_tokenizer(TEXTS, size, tokens)


def test_a_tokenizer_that_does_not_fit_the_model_is_an_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    t.train_tokenizer(TEXTS, 512, TOKENS).save(str(path))
    with pytest.raises(InputError, match="im_end.*is 506, configured 5"):
        t.load_tokenizer(path, dataclasses.replace(TOKENS, im_end=5), 512)
    with pytest.raises(InputError, match="511 does not fit in vocab_size 400"):
        t.load_tokenizer(path, TOKENS, 400)
    path.write_text('{"model": ')
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer.json"):
        t.load_tokenizer(path, TOKENS, 512)
    with pytest.raises(InputError, match="nowhere: no such tokenizer"):
        t.load_tokenizer(tmp_path / "nowhere", TOKENS, 512)


def write_ranks(path, tokens):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def test_a_rank_file_becomes_a_tokenizer_with_the_qwen_family_s_special_tokens(tmp_path):
    path = tmp_path / "tiny.tiktoken"
    write_ranks(path, [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" hello"])
    tokens = SpecialTokens(261, 262, 263, 264, 265, 266, 283, 284)
    loaded = t.load_tokenizer(path, tokens, 300)
    assert t.encoder(loaded)("hello hello he") == [259, 260, 32, 256]
    assert loaded.token_to_id("<|AUDIO|>") == 264
    write_ranks(path, [bytes([b]) for b in range(255)])
    with pytest.raises(InputError, match="tiny.tiktoken: ranks"):
        t.load_tokenizer(path, tokens, 300)
    path.write_text("aGU= 0\nnot a rank\n")
    with pytest.raises(InputError, match="tiny.tiktoken:2"):
        t.load_tokenizer(path, tokens, 300)


def test_qwen_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install dashscope"):
        t.load_tokenizer("qwen", SpecialTokens(), 151_936)


@pytest.mark.skipif(importlib.util.find_spec("dashscope") is None, reason="needs the optional package dashscope")
def test_qwen_s_ids():
    qwen = t.load_tokenizer("qwen", SpecialTokens(), 151_936)
    assert t.encoder(qwen)("Hello, world!") == [9707, 11, 1879, 0]  # as Qwen2.5's own tokenizer.json has it
    assert qwen.encode("<|im_start|>user\n").ids == [151_644, 872, 198]
    assert qwen.decode(t.encoder(qwen)(ODD)) == ODD
