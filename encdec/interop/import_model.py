"""Another project's model as a work directory."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from encdec import hub, safetensors
from encdec.data.chat_template import TEMPLATE_FILE, chat_template_of
from encdec.data.vocabulary import Vocabulary, load_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.interop import huggingface_import, llama2c, mu, own, t5gemma, t5gemma2
from encdec.interop.framing import Framing, other_ends, read_eos_ids, read_framing, read_vocabulary
from encdec.interop.importing import free_bytes, write_model
from encdec.model import ModelConfig
from encdec.storage import as_path, directory_name, on_this_machine, user_place

if TYPE_CHECKING:
    from etils import epath

ImportFormat = Literal["hf", "mu", "llama2c"]


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        model: its configuration, as stored.
        family: the format's name of its architecture.
        max_length: the most tokens that it was trained to read.
        remarks: lines for people on what was read otherwise than written, or not at all.
    """

    model: ModelConfig
    family: str
    max_length: int
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Found:
    """A model as its format's reader gives it."""

    model: ModelConfig
    params: Any
    family: str
    max_length: int
    framing: Framing
    vocabulary: Vocabulary | None = None
    template: str | None = None
    remarks: tuple[str, ...] = ()


def import_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: ImportFormat = "hf",
    vocabulary: str | None = None,
    head_dim: int | None = None,
    param_dtype: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Writes another project's model as a work directory, weights and vocabulary checked.

    Args:
        source: directory with config.json and *.safetensors, or ``ORG/NAME[@REVISION]`` of the
            Hugging Face Hub (hf), the paper's model.pt (mu), or a .bin file (llama2c).
        out: directory to write, new or empty unless ``overwrite``.
        format: of ``source``.
        vocabulary: as for ``prepare``, or llama2.c's ``tokenizer.bin``; None: the one in
            ``source`` or next to it, if there is one.
        head_dim: width of a head, for mu's files without model_config; None: 64.
        param_dtype: of the stored parameters; None: unchanged, but float16 becomes float32.
        name: of the model in cards; None: the last part of ``source``.
        overwrite: whether a model in ``out`` is replaced.

    Raises:
        ConfigError: the output directory is in use, or the model has an unsupported setting.
        DataError: files are missing, truncated or do not belong together, or the Hub refuses.
    """
    out = as_path(out)
    if head_dim is not None and format != "mu":
        raise ConfigError(
            f"head_dim={head_dim} is for format mu (--format=mu); the other formats state it"
        )
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f"head_dim is {head_dim}; expected 1 or more (the width of a head)")
    if format == "hf" and (found_on_hub := hub.repository(source)):
        name = name or found_on_hub[0]
        source = hub.download(*found_on_hub)
    if not as_path(source).exists():
        raise DataError(f"{source} does not exist; give the downloaded file or directory")
    place, source = as_path(source), on_this_machine(source)
    given = _given_vocabulary(vocabulary, format) if vocabulary else None
    if format == "hf":
        found = _read_huggingface(source, out, given)
    elif format == "mu":
        found = _read_mu(source, head_dim)
    else:
        found = _read_llama2c(source, place, given)
    vocabulary_found = given or found.vocabulary
    stored = write_model(
        out,
        found.model,
        found.params,
        source={"format": format, "family": found.family, "name": name or directory_name(place)},
        vocabulary=vocabulary_found,
        framing=found.framing,
        max_length=found.max_length,
        param_dtype=param_dtype,
        overwrite=overwrite,
        texts={} if found.template is None else {TEMPLATE_FILE: found.template},
    )
    remarks = list(found.remarks)
    if vocabulary_found and not found.framing.adds_start:
        remarks.append(
            f"Its tokenizer adds no start token; here every text begins with "
            f"{vocabulary_found.piece(found.framing.start_id)} (id {found.framing.start_id})"
        )
    if vocabulary_found is None:
        remarks.append(
            "The model's vocabulary could not be read, so it cannot teach or generate "
            f"text; import it again with --vocabulary=FILE --overwrite --out={out}"
        )
    return ImportReport(stored, found.family, found.max_length, tuple(remarks))


def _given_vocabulary(vocabulary: str, format: ImportFormat) -> Vocabulary:
    path = as_path(user_place("the vocabulary", vocabulary))
    if format == "llama2c" and path.suffix == ".bin" and path.is_file():
        return llama2c.read_tokenizer(on_this_machine(path))
    return load_vocabulary(vocabulary)


def _read_llama2c(
    source: pathlib.Path, place: pathlib.Path | epath.Path, given: Vocabulary | None
) -> _Found:
    """``place`` is where the user has the model, ``source`` its copy on this machine."""
    model, params, longest = llama2c.read_model(source)
    vocabulary, remarks = None, []
    found = [] if given else llama2c.find_tokenizers(place, model.vocab_size)
    if len(found) == 1:
        vocabulary = llama2c.read_tokenizer(found[0])
        remarks.append(f"The vocabulary is {found[0].name}, next to the model; texts end at <s>")
    elif found:
        names = ", ".join(path.name for path in found)
        remarks.append(
            f"{len(found)} different tokenizers next to the model have its {model.vocab_size:,} "
            f"pieces, so none is taken: {names}; name the right one with --vocabulary"
        )
    if given is not None and given.eos_id != llama2c.START_ID:
        remarks.append(
            f"Texts end at {given.piece(given.eos_id)} (id {given.eos_id}); models that llama2.c "
            "itself trained end them with id 1. For these give its tokenizer.bin"
        )
    framing = Framing(llama2c.START_ID)
    return _Found(
        model, params, "llama2.c", longest, framing, vocabulary=vocabulary, remarks=tuple(remarks)
    )


def _read_huggingface(
    source: pathlib.Path, out: pathlib.Path, vocabulary: Vocabulary | None
) -> _Found:
    family = huggingface_import.model_type(source)
    seq2seq = {one.MODEL_TYPE: one for one in (t5gemma, t5gemma2, own)}.get(family)
    try:
        found = (seq2seq or huggingface_import).read_config(source)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(
            f"{source / 'config.json'} has a value of another kind than its key needs: {error}; "
            "download the file again"
        ) from error
    tensors = safetensors.open_directory(source)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if (free := free_bytes(out)) < needed:
        raise DataError(f"{out} has {free:,} bytes free; the model needs about {needed:,}")
    if seq2seq:
        model, params = seq2seq.convert(found.model, tensors)
    else:
        model = found.model
        params = huggingface_import.convert(
            model, found.family, tensors, found.rotated, found.multipliers
        )
    remarks = []
    if vocabulary is None:
        eos_ids = read_eos_ids(source, found.eos_ids)
        vocabulary = read_vocabulary(source, eos_ids, model.vocab_size)
        if vocabulary and (remark := other_ends(vocabulary, eos_ids)):
            remarks.append(remark)
    if found.unread:
        remarks.append(f"Unknown keys of config.json, ignored: {', '.join(found.unread)}")
    framing = read_framing(
        source,
        found.start_id,
        vocabulary.eos_id if vocabulary else None,
        encoder_decoder=seq2seq is not None,
    )
    return _Found(
        model,
        params,
        found.family,
        found.max_length,
        framing,
        vocabulary,
        chat_template_of(source),
        tuple(remarks),
    )


def _read_mu(source: pathlib.Path, head_dim: int | None) -> _Found:
    tensors, settings = mu.read_checkpoint(source)
    model, longest = mu.read_config(tensors, settings, head_dim)
    return _Found(model, mu.convert(model, tensors), "mu", longest, Framing(mu.START_ID))
