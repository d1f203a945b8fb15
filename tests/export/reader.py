"""What users of transformers do with an export, against our own logits; for any interpreter.

``python reader.py DIRECTORY...`` reads each directory's export and its ``reference.npz`` (source
and target ids, our logits, -100 and 0 behind the rows' ends) and fails where they differ. It needs
torch and transformers alone; with accelerate it trains, with peft it tunes prompts.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import tempfile
import types

import numpy as np
import torch
import transformers

Reference = types.SimpleNamespace


def load(directory: pathlib.Path, **settings) -> tuple[torch.nn.Module, Reference]:
    """The model, nothing of it drawn at random, and what it must give."""
    config = json.loads((directory / "config.json").read_text())
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.get("is_encoder_decoder")
        else transformers.AutoModelForCausalLM
    )
    model, report = auto.from_pretrained(
        directory, trust_remote_code=True, dtype="float32", output_loading_info=True, **settings
    )
    report = {k: v for k, v in vars(report).items()} if not isinstance(report, dict) else report
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    if config["tie_word_embeddings"]:
        assert model.get_output_embeddings().weight is model.get_decoder().embed_tokens.weight, (
            "untied"
        )
    reference = np.load(directory / "reference.npz")
    return model, Reference(**{name: torch.tensor(x) for name, x in reference.items()})


def close(theirs: torch.Tensor, ours: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
    gap = (theirs - ours).abs().max().item()
    assert gap <= tolerance * max(1.0, ours.abs().max().item()), f"{what}: off by {gap}"


def left(rows: torch.Tensor, lengths: list[int], fill: int) -> torch.Tensor:
    """The rows with their padding in front."""
    moved = torch.full_like(rows, fill)
    for row, (values, length) in enumerate(zip(rows, lengths)):
        moved[row, rows.shape[1] - length :] = values[:length]
    return moved


def check_encoder_decoder(directory: pathlib.Path) -> None:
    """Logits and losses in every mode, no sight of the future, and generation from any padding."""
    model, r = load(directory)
    config = model.config
    stacks = [config, getattr(config, "decoder", config)]
    for one in stacks:
        assert one.pad_token_id not in (config.decoder_start_token_id, config.eos_token_id)
        assert one.pad_token_id not in r.labels
    real, mask = r.labels != -100, (r.source >= 0).long()
    source = r.source.masked_fill(mask == 0, config.pad_token_id)
    lengths = mask.sum(1).tolist()
    wanted = torch.nn.functional.cross_entropy(r.logits[real], r.labels[real])
    shifted = model.prepare_decoder_input_ids_from_labels(labels=r.labels)
    later = r.labels.clone()
    later[:, 3] = torch.where(later[:, 3] == 77, 78, 77)
    ways = [{}, {"use_cache": False}, {"decoder_attention_mask": torch.ones_like(r.labels)}]
    for training in (False, True):
        model.train(training)
        for way in [*ways, {"decoder_input_ids": shifted}]:
            name = f"training {training}, {list(way)}"
            out = model(input_ids=source, attention_mask=mask, labels=r.labels, **way)
            close(out.logits[real], r.logits[real], f"logits, {name}")
            close(out.loss, wanted, f"loss, {name}")
            if "decoder_input_ids" not in way:
                other = model(input_ids=source, attention_mask=mask, labels=later, **way).logits
                close(other[:, :4], out.logits[:, :4], f"the future, {name}", 1e-6)
    model.eval()
    moved = model(
        input_ids=left(source, lengths, config.pad_token_id),
        attention_mask=left(mask, lengths, 0),
        labels=r.labels,
    )
    close(moved.logits[real], r.logits[real], "padding on the left")
    count = r.labels.ne(-100).sum()
    for settings in ({"num_items_in_batch": count}, {"num_items_in_batch": int(count) * 4}):
        loss = model(input_ids=source, attention_mask=mask, labels=r.labels, **settings).loss
        close(loss * settings["num_items_in_batch"], wanted * count, "num_items_in_batch")
    inputs = [{"input_ids": source, "attention_mask": mask}]
    inputs += [{"input_ids": source[i : i + 1, :n]} for i, n in enumerate(lengths)]
    check_generation(model, inputs)


def check_decoder_only(directory: pathlib.Path) -> None:
    """The same of a Llama: its rows are the start token and a text."""
    model, r = load(directory)
    config, real = model.config, r.labels != -100
    assert config.pad_token_id not in (config.bos_token_id, config.eos_token_id)
    assert config.pad_token_id not in r.labels
    lengths = real.sum(1).tolist()
    start = torch.full_like(r.labels[:, :1], config.bos_token_id)
    rows = torch.cat([start, r.labels[:, :-1]], 1).masked_fill(~real, config.pad_token_id)
    mask = real.long()
    for training in (False, True):
        model.train(training)
        for way in ({}, {"use_cache": False}, {"attention_mask": mask}):
            logits = model(input_ids=rows, **way).logits
            close(logits[real], r.logits[real], f"logits, training {training}, {list(way)}")
        moved = left(rows, lengths, config.pad_token_id)
        logits = model(input_ids=moved, attention_mask=left(mask, lengths, 0)).logits
        for row, length in enumerate(lengths):
            close(logits[row, -length:], r.logits[row, :length], "padding on the left")
    model.eval()
    inputs = [{"input_ids": moved, "attention_mask": left(mask, lengths, 0)}, {"input_ids": moved}]
    inputs += [{"input_ids": rows[i : i + 1, :n]} for i, n in enumerate(lengths)]
    check_generation(model, inputs)


@torch.no_grad()
def check_generation(model: torch.nn.Module, inputs: list[dict]) -> None:
    """One answer for each row, whichever padding, mask and cache; the rows alone come last."""
    answers = []
    for one in inputs:
        for cached in (True, False):
            prompt = 1 if model.config.is_encoder_decoder else one["input_ids"].shape[1]
            made = model.generate(
                **one, do_sample=False, max_new_tokens=6, min_new_tokens=6, use_cache=cached
            )
            answers.append(made[:, prompt:])
    alone = torch.cat(answers[-2 * len(answers[0]) :: 2])
    assert len(alone) == len(answers[0])
    for answer in [x for x in answers if len(x) == len(alone)]:
        assert torch.equal(answer, alone), f"greedy: {answer.tolist()}, alone {alone.tolist()}"
    if model.config.model_type != "encdec":
        return
    beams = [
        model.generate(**inputs[0], num_beams=3, max_new_tokens=6, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*beams), "beams depend on the cache"


def check_training(directory: pathlib.Path) -> None:
    """Trainer: one loss and gradient norm for a batch and for its accumulated rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    seen = {}
    for batch, accumulated, smoothing in ((2, 1, 0.0), (1, 2, 0.0), (2, 1, 0.1)):
        model, r = load(directory)
        assert tokenizer.pad_token_id == model.config.pad_token_id
        rows = []
        for source, labels in zip(r.source, r.labels):
            ids = source[source >= 0].tolist()
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": labels[labels != -100].tolist(),
                }
            )
        with tempfile.TemporaryDirectory() as scratch:
            trainer = transformers.Seq2SeqTrainer(
                model=model,
                args=transformers.Seq2SeqTrainingArguments(
                    output_dir=scratch,
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accumulated,
                    label_smoothing_factor=smoothing,
                    max_steps=1,
                    logging_steps=1,
                    max_grad_norm=1e9,
                    report_to=[],
                    save_strategy="no",
                    use_cpu=True,
                    disable_tqdm=True,
                ),
                train_dataset=rows,
                data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
                processing_class=tokenizer,
            )
            trainer.train()
        log = trainer.state.log_history[0]
        seen[batch, smoothing] = torch.tensor([log["loss"], float(log["grad_norm"])])
    real = r.labels != -100
    wanted = torch.nn.functional.cross_entropy(r.logits[real], r.labels[real])
    close(seen[2, 0.0][0], wanted, "Trainer's loss", 1e-3)
    close(seen[1, 0.0], seen[2, 0.0], "gradient accumulation", 1e-3)
    assert seen[2, 0.1].isfinite().all()


def check_model_calls(directory: pathlib.Path) -> None:
    """What transformers' common model tests call, on the modelling file that travels along."""
    model, r = load(directory)
    model.eval()
    mask = (r.source >= 0).long()
    source = r.source.masked_fill(mask == 0, model.config.pad_token_id)
    inputs = {"attention_mask": mask, "labels": r.labels}
    plain = model(input_ids=source, **inputs)

    eager, _ = load(directory, attn_implementation="eager")
    out = eager.eval()(
        input_ids=source, **inputs, output_attentions=True, output_hidden_states=True
    )
    close(out.logits, plain.logits, "eager attention")
    layers, encoder_layers = len(out.decoder_attentions), len(out.encoder_attentions)
    assert len(out.cross_attentions) == layers and layers and encoder_layers
    assert len(out.decoder_hidden_states) == layers + 1
    assert len(out.encoder_hidden_states) == encoder_layers + 1
    sums = [one[0].sum(-1) for one in (*out.encoder_attentions, *out.decoder_attentions)]
    crossed = [one[0].sum(-1) for one in out.cross_attentions]
    if getattr(model.config, "merged_attention", False):  # one softmax over source and target
        sums[encoder_layers:] = [a + b for a, b in zip(sums[encoder_layers:], crossed)]
        crossed = []
    for one in (*sums, *crossed):
        close(one, torch.ones_like(one), "attention sums to one", 1e-5)
    assert out.cross_attentions[0].shape[-2:] == (r.labels.shape[1], source.shape[1])

    embedded = model(inputs_embeds=model.get_encoder().get_input_embeddings()(source), **inputs)
    close(embedded.logits, plain.logits, "inputs_embeds", 1e-6)
    shifted = model.prepare_decoder_input_ids_from_labels(labels=r.labels)
    decoder_embeds = model.get_decoder().get_input_embeddings()(shifted)
    out = model(input_ids=source, attention_mask=mask, decoder_inputs_embeds=decoder_embeds)
    close(out.logits, plain.logits, "decoder_inputs_embeds", 1e-6)
    encoded = model.get_encoder()(input_ids=source, attention_mask=mask)
    close(model(encoder_outputs=encoded, **inputs).logits, plain.logits, "encoder_outputs", 1e-6)
    as_tuple = model(input_ids=source, **inputs, return_dict=False)
    close(as_tuple[1], plain.logits, "a tuple", 1e-6)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="50KB")
        for file in directory.glob("*.py"):
            (pathlib.Path(folder) / file.name).write_bytes(file.read_bytes())
        again = type(model).from_pretrained(folder).eval()
    close(again(input_ids=source, **inputs).logits, plain.logits, "saved and loaded", 1e-6)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        one, _ = load(directory)
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable()
        one(input_ids=source, **inputs).loss.backward()
        return [p.grad for p in one.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        close(b, a, "gradient checkpointing", 1e-6)

    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 7)
    out = model(input_ids=source, **inputs)
    assert out.logits.shape[-1] == rows + 7
    close(out.logits[..., :rows], plain.logits, "resized tables", 1e-5)
    assert model.generate(input_ids=source, attention_mask=mask, max_new_tokens=2).shape[0] == 2
    try:
        model(input_ids=source, **inputs, no_such_argument=1)
    except TypeError as error:
        assert "no_such_argument" in str(error)
    else:
        raise AssertionError("an unknown argument was swallowed")


def check_prompt_tuning(directory: pathlib.Path) -> None:
    """peft: the virtual tokens get gradients, and the tuned model generates."""
    import peft

    model, r = load(directory)
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    )
    batch = {"input_ids": r.source[:1], "attention_mask": torch.ones_like(r.source[:1])}
    tuned(**batch, labels=r.labels[:1]).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert gradients and all(g.abs().sum() > 0 for g in gradients)
    assert tuned.eval().generate(**batch, max_new_tokens=3).shape[1] > 1


def check(directory: pathlib.Path) -> list[str]:
    """Every check that the export's kind and the installed packages allow; their names."""
    config = json.loads((directory / "config.json").read_text())
    if not config.get("is_encoder_decoder"):
        checks = [check_decoder_only]
    else:
        checks = [check_encoder_decoder]
        if config["model_type"] == "encdec":
            checks.append(check_model_calls)
        if importlib.util.find_spec("accelerate"):
            checks.append(check_training)
        if config["model_type"] == "encdec" and importlib.util.find_spec("peft"):
            checks.append(check_prompt_tuning)
    for one in checks:
        one(directory)
    return [one.__name__ for one in checks]


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        print("transformers", transformers.__version__, path.name, *check(path), flush=True)
