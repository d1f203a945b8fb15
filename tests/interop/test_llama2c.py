"""A real model, small as it is: its documented text comes out word for word."""

from __future__ import annotations

import itertools
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.data.vocabulary import load_vocabulary
from encdec.errors import DataError
from encdec.inference.drafting import Paces
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import TextGenerator
from encdec.inference.text_io import PromptFormat
from encdec.interop.import_command import main
from encdec.interop.llama2c import find_tokenizers, read_tokenizer
from encdec.model import ModelConfig, build_model, init_cache
from encdec.saved.saved_params import load_params_for_inference


def greedy(directory, tokens: int) -> list[int]:
    """Ids of the likeliest continuation of BOS, with the key-value cache."""
    config, params, _ = load_params_for_inference(directory)
    model = build_model(config)

    @jax.jit
    def step(token, position, cache):
        hidden, cache = model.apply(
            {"params": params},
            token[None, None],
            position[None, None],
            cache,
            method="decode_cached",
        )
        logits = model.apply({"params": params}, hidden[0, 0], method="logits")
        return jnp.argmax(logits), cache

    token, cache, ids = jnp.int32(1), init_cache(config, 1, tokens), []
    for position in range(tokens):
        token, cache = step(token, jnp.int32(position), cache)
        ids.append(int(token))
    return ids


@pytest.mark.corpora
def test_the_tiny_story_teller_tells_its_golden_story(corpora, tmp_path):
    folder = corpora / "stories260k"
    main([str(folder / "stories260K.bin"), "--format=llama2c", f"--out={tmp_path / 'ours'}"])
    golden = next(
        line.removeprefix("greedy: ")
        for line in (folder / "GOLDEN.txt").read_text().splitlines()
        if line.startswith("greedy: ")
    )
    # Its tokenizer, tok512.bin, was found next to it.
    text = load_vocabulary(tmp_path / "ours").decode(greedy(tmp_path / "ours", 80))
    assert text.strip().startswith(golden.strip()[:150])


def test_halves_and_neighbours_rotate_alike(tmp_path, capsys):
    """A random model against a plain forward pass in llama2.c's own layout."""
    random = np.random.default_rng(0)
    M, F, L, H, K, V, longest = 16, 24, 2, 4, 2, 11, 20
    D = M // H
    shapes = [
        (V, M),
        (L, M),
        (L, M, M),
        (L, K * D, M),
        (L, K * D, M),
        (L, M, M),
        (L, M),
        (L, F, M),
        (L, M, F),
        (L, F, M),
        (M,),
        (longest, D // 2),
        (longest, D // 2),
        (V, M),
    ]
    weights = [random.normal(0, 0.5, shape).astype(np.float32) for shape in shapes]
    path = tmp_path / "model.bin"
    header = np.array([M, F, L, H, K, -V, longest], "<i4").tobytes()
    path.write_bytes(header + b"".join(w.tobytes() for w in weights))
    pieces = [(0.0, b"<unk>"), (0.0, b"<s>"), (0.0, b"</s>"), *((0.0, b"%d" % i) for i in range(8))]
    for name, one in (("tok_a", pieces), ("tok_b", pieces), ("token", [*pieces[:-1], (1.0, b"9")])):
        (tmp_path / f"{name}.bin").write_bytes(tokenizer_bytes(one))
    main([str(path), "--format=llama2c", f"--out={tmp_path / 'ours'}"])
    # Two that differ, and a copy: which is the model's, nobody knows.
    said = capsys.readouterr().out
    assert "2 different tokenizers" in said and "tok_a.bin, token.bin" in said
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    tokens = random.integers(0, V, 7)
    batch = {
        "decoder_input_tokens": tokens[None],
        "decoder_segment_ids": np.ones((1, 7), int),
        "decoder_positions": np.arange(7)[None],
    }
    got = build_model(config).apply({"params": params}, batch)[0]

    embedding, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, last, _, _, head = weights
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w
    turns = np.arange(7)[:, None] * 10_000.0 ** (-np.arange(0, D, 2) / D)

    def rotate(x):  # [T, heads, D], neighbours as complex numbers
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * turns)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = embedding[tokens].astype(np.float64)
    for layer in range(L):
        y = rms(x, norm1[layer])
        q = rotate((y @ wq[layer].T).reshape(7, H, D))
        k = rotate((y @ wk[layer].T).reshape(7, K, D)).repeat(H // K, 1)
        v = (y @ wv[layer].T).reshape(7, K, D).repeat(H // K, 1)
        attention = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
        attention = np.where(np.tri(7, dtype=bool), attention, -np.inf)
        attention = np.exp(attention - attention.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", attention, v).reshape(7, M) @ wo[layer].T
        y = rms(x, norm2[layer])
        gate = y @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[layer].T)) @ w2[layer].T
    np.testing.assert_allclose(got, rms(x, last) @ head.T, rtol=1e-4, atol=1e-4)


def tokenizer_bytes(pieces) -> bytes:
    """llama2.c's tokenizer.bin: longest piece, then score, size and text of each."""
    parts = [struct.pack("<i", max(len(text) for _, text in pieces))]
    return b"".join(parts + [struct.pack("<fi", s, len(text)) + text for s, text in pieces])


def merged(text: str, pieces) -> list[int]:
    """run.c's encode(): characters, else bytes; then the best-scored pair again and again."""
    scores = {text: (score, token) for token, (score, text) in enumerate(pieces)}
    parts = []
    for character in " " + text if text else "":
        data = character.encode()
        parts += [data] if data in scores else [b"<0x%02X>" % byte for byte in data]
    while True:
        found = enumerate(itertools.pairwise(parts))
        pairs = [(scores[a + b][0], -i) for i, (a, b) in found if a + b in scores]
        if not pairs:
            return [scores[part][1] for part in parts]
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_the_tokenizer_next_to_a_model_is_read_as_run_c_reads_it(tmp_path):
    learned = [" t", "he", " the", "  ", " a", "an", " an", "é"]
    letters = sorted(set(" thean.nx"))
    pieces = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    pieces += [(0.0, b"<0x%02X>" % byte) for byte in range(256)]
    pieces += [(-float(i), piece.encode()) for i, piece in enumerate(learned + letters)]
    (tmp_path / "tok.bin").write_bytes(tokenizer_bytes(pieces))
    assert find_tokenizers(tmp_path / "model.bin", len(pieces) + 1) == []
    [found] = find_tokenizers(tmp_path / "model.bin", len(pieces))
    vocabulary = read_tokenizer(found)
    assert (vocabulary.eos_id, vocabulary.unk_id, vocabulary.size) == (1, 0, len(pieces))
    for text in ("the hen", " an ant  ate\nthé ", "x<s>", "日", "", "a.a"):
        assert vocabulary.encode(text) == merged(text, pieces), text
        assert vocabulary.decode(vocabulary.encode(text)) == text
    for data in (b"", tokenizer_bytes(pieces)[:-1], tokenizer_bytes(pieces[3:]), b"\xff" * 99):
        (tmp_path / "tok.bin").write_bytes(data)
        assert find_tokenizers(tmp_path / "model.bin", len(pieces)) == []
        with pytest.raises(DataError, match="not a tokenizer of llama2.c"):
            read_tokenizer(tmp_path / "tok.bin")


class FixedRows:
    """A row decoder whose every answer is the same."""

    rows_at_once, paces = 0, Paces("off", pays=False)
    config = ModelConfig(architecture="decoder_only", vocab_size=512, encoder_layers=0)

    def __init__(self, tokens):
        self.tokens = tokens

    def run(self, inputs, settings, *_):
        tokens = np.array([self.tokens] * len(inputs) * settings.samples)
        counts, zeros = np.full(len(tokens), tokens.shape[1]), np.zeros(tokens.shape)
        done = np.ones(len(tokens), bool)
        yield SimpleNamespace(
            tokens_RxN=tokens, counts_R=counts, log_probs_RxN=zeros, finished_R=done
        )


def test_an_answer_keeps_the_space_before_it(tmp_path):
    """The text of a decoder-only model's answer continues where the prompt ends."""
    pieces = [(0.0, b"<unk>"), (0.0, b"<s>"), (0.0, b"</s>"), (0.0, b" a"), (0.0, b"b")]
    pieces += [(-1.0, letter) for letter in (b" ", b"a")]
    (tmp_path / "tok.bin").write_bytes(tokenizer_bytes(pieces))
    vocabulary = read_tokenizer(tmp_path / "tok.bin")
    for inputs_eos, answer in ((False, " ab a"), (True, "ab a")):
        prompts = PromptFormat(vocabulary, inputs_eos=inputs_eos)
        generator = TextGenerator(FixedRows([3, 4, 3]), prompts, max_tokens=3, batch_rows=2)
        [[made]] = generator.generate(["ab"])
        assert made.text == "".join(generator.stream("ab")) == answer
        [[made]] = generator.generate(["ab"], GenerationSettings(stop=(" a",)))
        assert made.text == ("" if answer[0] == " " else "ab")
        if not inputs_eos:
            [[made]] = generator.generate_from_tokens([[4, 1]])
            assert made.text == "ab a"


def test_a_file_that_is_no_such_model_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    for data, message in (
        (b"", "is empty"),
        (b"\1" * 20, "header"),
        (b"\0" * 64, "header"),
        (np.array([8, 8, 1, 2, 1, 9, 4], "<i4").tobytes() + b"\0" * 40, "implies"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            main([str(path), "--format=llama2c", f"--out={tmp_path / 'ours'}"])
