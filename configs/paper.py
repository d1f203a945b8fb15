"""The paper's table by one command; the argument names the size: laptop or gpu.

    encdec paper --config=configs/paper.py:laptop --data_dir=DIR --work=runs/paper \
        --text=DIR/books.jsonl.gz --text=DIR/wikipedia.jsonl.gz

All models read the same rows, and all students cost as many FLOPs to pretrain as the
encoder-decoder of the first split. Set any field with --config.FIELD=VALUE. All numbers except the
splits, the tasks and the teacher's weight are our choice, because the paper does not give them.
"""

from ml_collections import ConfigDict


def get_config(size: str = "laptop") -> ConfigDict:
    sizes = {"laptop": laptop, "gpu": gpu}
    if size not in sizes:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(sizes)}")
    return sizes[size]()


def laptop() -> ConfigDict:
    """About 400,000 parameters: over an hour of one CPU core for three seeds."""
    config = ConfigDict()
    config.model = "micro-300k"  # preset of the students' reference, an encoder-decoder
    config.teacher = "quickstart-dec"  # preset, decoder-only
    config.teacher_layers = 5  # in place of the preset's; at least 4 times a student's parameters
    config.splits = ("2/3", "1/2", "1/3")  # encoder's share of the layers; the first is the measure
    config.distilled = ("DEC", "ED 2/3-1/3")  # rows of the table that also learn from the teacher
    config.vocabulary = 4096  # ids, 259 of them for bytes; learned from all training text
    config.vocabulary_bytes = 12 << 20  # of text that it is learned from
    config.seeds = 3  # of fine-tuning; pretraining has one
    config.optimizer = ConfigDict(
        dict(
            name="muon",
            learning_rate=1e-2,
            weight_decay=0.1,
            b2=0.95,
            warmup_fraction=0.1,
            z_loss=1e-4,
        )
    )
    config.distill = ConfigDict(dict(alpha=0.9, draws=50))  # teacher's weight (paper's), draws

    config.pretrain = ConfigDict()
    config.pretrain.inputs, config.pretrain.targets = 256, 64  # tokens of a row
    config.pretrain.batch_size = 4  # rows of a step
    config.pretrain.steps = 1_500
    config.pretrain.document_bytes = 12_000  # text taken of each document: all of them are met
    config.pretrain.held_out_every = 100  # documents; one of so many is for the held-out loss

    config.columns = ConfigDict()
    config.columns.code = column(("code_java2cs",), 128, 128, 8, 120, "skip", 3_500, 250)
    config.columns.summaries = column(("xsum", "dialogsum"), 256, 64, 4, 120, "cut", 1_200, 200)
    config.columns.ielts = column(
        ("ielts_feedback", "ielts_band"), 512, 128, 2, 160, "cut", 400, 200
    )
    config.columns.squad = column(("squad_v2",), 256, 64, 4, 120, "skip", 1_200, 300)
    return config


def gpu() -> ConfigDict:
    """A hundred million parameters and whole tasks, for one accelerator."""
    config = laptop()
    config.model = "330m"
    config.teacher, config.teacher_layers = "1b-dec", 52
    config.vocabulary, config.vocabulary_bytes = 32_000, 100 << 20
    config.optimizer.update(dict(name="adamw", learning_rate=3e-4))
    config.pretrain.inputs, config.pretrain.targets = 1024, 256
    config.pretrain.batch_size, config.pretrain.steps = 64, 20_000
    config.pretrain.document_bytes = 1 << 30
    config.columns.code = column(("code_java2cs",), 512, 512, 32, 3_000, "skip", 0, 0)
    config.columns.summaries = column(("xsum", "dialogsum"), 1024, 128, 32, 3_000, "cut", 0, 0)
    config.columns.ielts = column(
        ("ielts_feedback", "ielts_band"), 1024, 768, 16, 1_000, "cut", 0, 0
    )
    config.columns.squad = column(("squad_v2",), 512, 64, 64, 5_000, "skip", 0, 0)
    return config


def column(
    tasks: tuple,
    inputs: int,
    targets: int,
    batch_size: int,
    steps: int,
    too_long: str,
    train_examples: int,
    validation_examples: int,
) -> ConfigDict:
    """One fine-tuning, on all its tasks together; each task is scored by itself."""
    config = ConfigDict()
    config.tasks = tasks
    config.train_file = ""  # below data_dir, in place of the (only) task's own training file
    config.inputs, config.targets = inputs, targets  # tokens of a row
    config.batch_size = batch_size  # rows of a step
    config.steps = steps
    # Examples longer than a row, in training and in evaluation: "skip" leaves them out, "cut" cuts
    # their ends. Both are counted.
    config.too_long = too_long
    config.train_examples = train_examples  # of each task, evenly spread; 0: all
    config.validation_examples = validation_examples  # of each task, evenly spread; 0: all
    return config
