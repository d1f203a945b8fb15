"""The paper's comparison by one command; the argument names it.

    encdec paper --config=configs/paper.py:codexglue --data_dir=DIR --workdir=runs/codexglue
    encdec paper --config=configs/paper.py:laptop --data_dir=DIR --workdir=runs/paper \
        --text=DIR/books.jsonl.gz --text=DIR/wikipedia.jsonl.gz

``codexglue``, ``dialogsum`` and ``refinement`` are one task each that small models can learn from
scratch; ``laptop`` and ``gpu`` are the paper's table of four columns, after pretraining. All models
read the same rows, and all students cost as many FLOPs per row as the encoder-decoder of the first
split, except those of ``by_parameters``. Set any field with --config.FIELD=VALUE. All numbers
except the splits, the tasks and the teacher's weight are our choice, because the paper does not
give them.

Time and loss: laptop took 54 CPU-minutes for 70 trainings on 2 shared cores of an AMD EPYC
(2026-11-25). In codexglue, ED 2/3-1/3 ends at 0.241 held-out bits per byte and DEC at 0.267 (seed
0, 2026-11-28), about ten minutes of processor time each; docs/results.md has the rest. gpu is not
measured.
"""

from ml_collections import ConfigDict


def get_config(size: str = "laptop") -> ConfigDict:
    scratch = {"codexglue": codexglue, "dialogsum": dialogsum, "refinement": refinement}
    sizes = scratch | {"laptop": laptop, "gpu": gpu}
    if size not in sizes:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(sizes)}")
    return sizes[size]()


def laptop() -> ConfigDict:
    """About 400,000 parameters: over an hour of one CPU core for three seeds."""
    config = ConfigDict()
    config.model = "micro-300k"  # preset of the students' reference, an encoder-decoder
    config.teacher = "quickstart-dec"  # preset, decoder-only
    config.teacher_layers = 5  # instead of the preset's; at least 4 times a student's parameters
    config.teacher_steps = 0  # of its fine-tuning; 0: a column's, as the students have
    config.teacher_dropout = -1.0  # -1: as the students
    config.splits = ("2/3", "1/2", "1/3")  # encoder's share of the layers; the first is the measure
    config.by_parameters = ()  # rows repeated with as many parameters as the first split has
    # Rows of the table that also learn from the teacher: from its stored draws (+KD), or on its
    # own answers in place of gold targets (+SeqKD).
    config.distilled = ("DEC", "ED 2/3-1/3")
    config.answers = ()
    config.one_seed = ()  # rows that have one seed only
    config.vocabulary = 4096  # ids, 259 of them for bytes; learned from all training text
    config.vocabulary_bytes = 12 << 20  # of text that it is learned from
    config.seeds = 3  # of fine-tuning; pretraining has one
    config.dropout = 0.0  # of all models, on the outputs of sublayers and on embeddings
    config.evaluations = 2  # of a run on held-out examples; the best checkpoint is scored
    config.beams = 1  # above 1: answers of beam search, too
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
    config.pretrain.inputs, config.pretrain.targets = 256, 64  # tokens per row
    config.pretrain.batch_size = 4  # rows per step
    config.pretrain.steps = 1_500  # 0: no pretraining, and no text for it
    config.pretrain.document_bytes = 12_000  # text taken from each document, so that all are seen
    config.pretrain.held_out_every = 100  # one document in this many is held out for the loss

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


def codexglue() -> ConfigDict:
    """Java to C# from scratch, a million parameters: about three hours of two quiet CPU cores."""
    config = from_scratch()
    config.columns.java2cs = column(("code_java2cs",), 192, 192, 8, 3_000, "skip", 0, 0)
    config.columns.java2cs.evaluated_inputs = 640  # the longest source has 370 tokens
    config.columns.java2cs.evaluated_targets = 400  # the longest reference has 389
    return config


def dialogsum() -> ConfigDict:
    """Dialogues to summaries from scratch; Rouge with stemming, as in DialogSum's script.

    A run of ED has 1.3 times the FLOPs of codexglue's: about 13 minutes of a quiet core, by FLOPs.
    """
    config = from_scratch()
    # 98 % of the pairs fit. Sources have 192 tokens in the median, 606 at the 99th percentile,
    # summaries 37 and 96: both sides of packed rows are full. 3 epochs.
    config.columns.dialogsum = column(("dialogsum",), 512, 96, 8, 2_000, "skip", 0, 0)
    config.columns.dialogsum.evaluated_inputs = 1024  # the longest dialogue has 786 tokens
    config.columns.dialogsum.evaluated_targets = 128  # the longest summary has 112
    return config


def refinement() -> ConfigDict:
    """Faulty Java methods to right ones (CodeXGLUE, small) from scratch; exact match tells.

    A run of ED has 0.87 times the FLOPs of codexglue's: about 9 minutes of a quiet core, by FLOPs.
    """
    config = from_scratch()
    # The text, whose names are numbered, has 2,131 pieces at most.
    config.vocabulary = 1024
    # All pairs fit: the longest source has 130 tokens, the longest target 113. 16 epochs of the
    # 5,325 pairs, a ninth of CodeXGLUE's.
    config.columns.refinement = column(("code_refine_small",), 192, 128, 8, 4_000, "skip", 0, 0)
    return config


def from_scratch() -> ConfigDict:
    """A million parameters without pretraining; the columns are still to be set."""
    config = laptop()
    config.model = "micro-1m"
    config.teacher, config.teacher_layers = "micro-3m-dec", 8
    config.by_parameters = ("DEC",)
    config.distilled = config.answers = ("ED 2/3-1/3", "DEC")
    config.one_seed = ("ED 1/2-1/2", "ED 1/3-2/3", "DEC (parameters)")
    config.dropout = 0.1
    config.evaluations, config.beams = 10, 5
    config.pretrain.steps = 0
    config.columns = ConfigDict()
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
    config.inputs, config.targets = inputs, targets  # tokens per row
    config.batch_size = batch_size  # rows per step
    config.steps = steps
    # Examples longer than a row, in training and in evaluation: "skip" leaves them out, "cut" cuts
    # their ends. Both are counted.
    config.too_long = too_long
    config.train_examples = train_examples  # of each task, evenly spread; 0: all
    config.validation_examples = validation_examples  # of each task, evenly spread; 0: all
    # Longest source and answer in evaluation, tokens; 0: as in training. With a longest source,
    # no validation example is left out.
    config.evaluated_inputs, config.evaluated_targets = 0, 0
    return config
