"""Hugging Face models as teachers: against transformers text by text, and against ours."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encdec import safetensors
from encdec.cli import main
from encdec.data.records import decode_row, open_records
from encdec.data.teacher_rows import open_teacher, read_teacher_card
from encdec.data.vocabulary import VOCABULARY_FOLDER, load_vocabulary
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.distill.torch_teacher import _by_length, torch_model
from encdec.errors import ConfigError, DataError
from encdec.interop.import_command import main as import_main
from encdec.pretrained import load_causal_model
from tests.train.conftest import random_pairs, write_records

torch = pytest.importorskip("torch", reason="needs torch: the extra hf of setup.py")
transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: the extra hf")

# Three families that encdec import does not know, each with positions of another kind.
UNKNOWN = {
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=2, n_positions=40)),
    "gpt_neox": (
        "GPTNeoX",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
        ),
    ),
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=2)),
}


def write_tokenizer(directory):
    """A byte-level tokenizer.json with an EOS, ids 0 to 257."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(["<pad>", "</s>", *alphabet])}, []
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def save_model(directory, kind, settings):
    """A random model with 264 ids and its tokenizer."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=264, bos_token_id=1, eos_token_id=1, initializer_range=0.3, **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        config
    ).eval()
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    write_tokenizer(folder)
    return write_records(
        folder / "records", random_pairs(11, 0), load_vocabulary(folder / "tokenizer.json")
    )


@pytest.mark.parametrize("family", UNKNOWN)
def test_packed_rows_are_read_as_transformers_reads_each_text(family, records, tmp_path):
    model = save_model(tmp_path / "hf", *UNKNOWN[family])
    with pytest.raises(DataError, match="supported:"):
        import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    assert (
        main(
            [
                *("distill", "logits"),
                "--backend=torch",
                f"--teacher={tmp_path / 'hf'}",
                f"--records={records}",
                f"--out={tmp_path / 'out'}",
                "--method=full",
                "--batch_rows=4",
                "--shard_rows=6",
            ]
        )
        == 0
    )
    opened = open_records(records)
    fields = open_teacher(tmp_path / "out", opened).fields(np.arange(11))
    several = 0
    for number, data in enumerate(opened.read(np.arange(11))):
        sources, targets = decode_row(data, opened.card.token_dtype)
        several += len(sources) > 1
        wanted = []
        for source, target in zip(sources, targets):
            text = torch.tensor([[1, *source.tolist(), *target.tolist()]])
            with torch.no_grad():
                logits = model(text).logits[0, len(source) : -1, : opened.card.vocabulary.size]
            wanted.append(torch.log_softmax(logits.double(), -1).numpy())
        wanted = np.concatenate(wanted)
        got = fields["teacher_log_probs"][number]
        np.testing.assert_allclose(got[: len(wanted)], wanted, atol=1e-5)
        assert (got[len(wanted) :] == 0).all()
    assert several > 3
    card = read_teacher_card(tmp_path / "out")
    assert card.tokens == opened.card.target_tokens and len(card.shards) == 2
    assert card.teacher["parameters"] == model.num_parameters()


def test_a_model_that_both_know_gives_the_same(records, tmp_path):
    """The same weights imported and run by torch: the same distributions, and the same draws but
    for those on a rounding's edge."""
    save_model(
        tmp_path / "hf",
        "Llama",
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
    )
    import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])  # with its tokenizer.json
    fields = {}
    for name, teacher, backend in (("jax", "ours", "jax"), ("torch", "hf", "torch")):
        for method in ("full", "sampled"):
            out = tmp_path / f"{name}-{method}"
            store_teacher_logits(
                teacher=tmp_path / teacher,
                records=records,
                out=out,
                method=method,
                backend=backend,
                **({"seed": 3} if method == "sampled" else {}),
            )
            fields[name, method] = open_teacher(out, open_records(records)).fields(np.arange(11))
    np.testing.assert_allclose(
        fields["torch", "full"]["teacher_log_probs"],
        fields["jax", "full"]["teacher_log_probs"],
        atol=1e-4,
    )

    def dense(found):
        weights = np.zeros((11, found["teacher_entropy"].shape[1], 264))
        for row in range(11):
            np.add.at(
                weights[row],
                (found["teacher_positions"][row], found["teacher_ids"][row]),
                found["teacher_weights"][row],
            )
        return weights

    ours, theirs = dense(fields["jax", "sampled"]), dense(fields["torch", "sampled"])
    tokens = (fields["jax", "sampled"]["teacher_entropy"] > 0).sum()
    assert np.abs(ours - theirs).sum() / 2 < 0.002 * tokens  # of 50 draws a token, one in 500


def test_what_does_not_fit_is_refused(records, tmp_path, capsys):
    save_model(tmp_path / "hf", *UNKNOWN["gpt2"])
    opened = open_records(records)
    model = torch_model(tmp_path / "hf", opened)
    assert model.start_id == 1
    assert (
        main(
            [
                *("distill", "logits"),
                "--backend=torch",
                f"--teacher={tmp_path / 'hf'}",
                "--dry_run",
                f"--records={records}",
            ]
        )
        == 0
    )
    assert "FLOPs of the teacher" in capsys.readouterr().out
    words = write_records(tmp_path / "words", random_pairs(3, 0))
    with pytest.raises(
        DataError, match=f"prepare records with --vocabulary={tmp_path}/hf/tokenizer.json"
    ):
        torch_model(tmp_path / "hf", open_records(words))
    longer = write_records(
        tmp_path / "long",
        [[("a" * 40, "b" * 20)]],
        opened.vocabulary(),
        inputs_length=60,
        targets_length=30,
    )
    with pytest.raises(DataError, match=r"has 62 tokens.*supports 40"):
        torch_model(tmp_path / "hf", open_records(longer))
    for changes, error, message in (
        ({"step": 3}, ConfigError, "--step"),
        ({"backend": "tf"}, ConfigError, "'jax' or 'torch'"),
        ({"teacher": tmp_path / "nowhere"}, DataError, "no config.json"),
        ({"backend": "jax", "vocabulary": "bytes"}, ConfigError, "holds its own"),
    ):
        arguments = {"teacher": tmp_path / "hf", "backend": "torch"} | changes
        with pytest.raises(error, match=message):
            store_teacher_logits(records=records, out=tmp_path / "out", **arguments)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 200}))
    with pytest.raises(DataError, match="the model only 200"):
        torch_model(tmp_path / "hf", opened)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="--vocabulary=FILE"):
        torch_model(tmp_path / "hf", opened)
    own = {"model_type": "ours", "auto_map": {"AutoConfig": "configuration_ours.Config"}}
    path.write_text(json.dumps(own))
    with pytest.raises(DataError, match="code that comes with it, which is not run here"):
        torch_model(tmp_path / "hf", opened)


def test_an_export_has_the_vocabulary_of_the_records(tmp_path):
    """Its tokenizer.json gives the same ids, but has another fingerprint."""
    words = write_records(tmp_path / "words", random_pairs(3, 0))
    save_model(tmp_path / "hf", *UNKNOWN["gpt2"])
    open_records(words).vocabulary().save(tmp_path / "hf" / VOCABULARY_FOLDER)
    assert torch_model(tmp_path / "hf", open_records(words)).start_id == 1


def test_weights_that_the_files_lack_are_not_drawn(tmp_path):
    """As the second teacher's, a judge's weights: transformers would warn, and continue."""
    save_model(tmp_path / "hf", *UNKNOWN["gpt2"])
    assert load_causal_model(tmp_path / "hf") is not None
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.open_file(file)
    kept = {name: x.copy() for name, x in tensors.items() if "h.1.mlp" not in name}
    file.unlink()
    (name,) = safetensors.write_directory(tmp_path / "hf", kept, metadata={"format": "pt"})
    (tmp_path / "hf" / name).rename(file)
    with pytest.raises(DataError, match=r"lack.* transformer.h.1.mlp"):
        load_causal_model(tmp_path / "hf")


def test_texts_of_like_length_go_together_within_the_bound():
    groups = _by_length([10, 3000, 12, 3000, 11, 5000])
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert groups == [[0, 4, 2], [1], [3], [5]]
