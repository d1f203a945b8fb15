"""The documentation: its links lead somewhere; its code is run, checked or marked why not."""

from __future__ import annotations

import re

import pytest

from encdec.metrics.metric_registry import METRICS
from tests.pages import (
    CHECKED,
    PAGES,
    ROOT,
    SHELL,
    SOURCES,
    Block,
    Unchecked,
    blocks,
    check_python,
    check_shell,
    check_span,
    source_examples,
    spans,
)

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    """Examples name files of a checkout; metrics that they register are taken back."""
    monkeypatch.chdir(ROOT)
    kept = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(kept)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


def check(block: Block) -> None:
    """A block is text, run, as its command or Python takes it, or marked as none of these."""
    if block.mark == "run":
        test = ROOT / block.about
        taken = test.is_file() and "run_by(__file__)" in test.read_text()
        assert taken, f"{block.place}: {block.about} runs none of the pages' blocks"
    elif block.mark == CHECKED and block.language in SHELL:
        check_shell(block)
    elif block.mark == CHECKED and block.language == "python":
        check_python(block)
    elif block.language != "text" and block.mark != "not run":
        raise Unchecked(
            f"{block.place}: a block of {block.language or 'no language'} is neither run nor "
            "checked: give it a language (output is `text`) and a mark (tests/pages.py)"
        )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page):
        check(block)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_examples_in_docstrings_are_taken(path):
    check(source_examples(path))


def test_commands_and_flags_in_prose_help_and_messages_exist():
    code = [
        path for name in ("encdec", "configs", "launch") for path in (ROOT / name).rglob("*.py")
    ]
    found = {span for path in [*PAGES, *code] for span in spans(path)}
    assert len(found) > 100
    for span in sorted(found):
        check_span(span)


def test_what_is_wrong_is_named():
    def wrong(text: str, language: str = "sh", mark: str = CHECKED, about: str = "") -> str:
        with pytest.raises(AssertionError) as caught:
            check(Block("page.md", 7, language, text, mark, about))
        return str(caught.value)

    assert wrong("cd x\n").startswith("page.md:7: `cd x` is neither run nor checked")
    train = "encdec train --config=configs/pretrain.py:test --workdir=w"
    assert "page.md:8: " in wrong(f"make test\n{train} --wrkdir=x") and "--wrkdir" in wrong(
        f"{train} --wrkdir=x"
    )
    assert "did you mean 'steps'" in wrong(f"for x in a b; do\n  {train} --config.stepps=1; done")
    assert "batch_size" in wrong(f"{train} \\\n  --config.batch_size=many | head")
    assert "required: --out" in wrong("encdec export --checkpoint=x --format=hf")
    check(Block("page.md", 1, "sh", "encdec export --checkpoint=x …", CHECKED, ""))
    assert "no command" in wrong("encdec trian")
    assert "ladder" in wrong("encdec scaling plan --ladder=configs/scaling.py:micro --ladder.x=1")
    assert "did you mean" in wrong(
        "python -m launch.local --processes=2 -- --config=configs/pretrain.py:test --workdir=w "
        "--config.stepps=1"
    )
    assert "nonesuch" in wrong("make nonesuch") and "NONE" in wrong("make test NONE=1")
    assert "encdec" in wrong("pip install encdec") and "nonesuch" in wrong(
        "pip install .[nonesuch]"
    )
    assert "/v2" in wrong("curl http://127.0.0.1:8000/v2")
    assert "unexpected keyword" in wrong("from encdec import api\napi.load('a', stp=3)", "python")
    assert "tmeperature" in wrong(
        "from encdec import api\napi.generate('a', ['b'], tmeperature=3)", "python"
    )
    assert "stepps" in wrong(
        "from encdec import api\napi.train('configs/pretrain.py:test', 'w', {'stepps': 1})",
        "python",
    )
    assert "no language" in wrong("output", "")
    assert "neither run nor checked" in wrong("encdec train --help", mark="")
    assert "runs none" in wrong("encdec train", mark="run", about="tests/test_cli.py")
    with pytest.raises(AssertionError, match="--nonesuch"):
        check_span("encdec scaling fit --nonesuch=3")
    page = ROOT / "docs" / "pod.md"
    marked = [block for block in blocks(page) if block.mark not in ("", CHECKED)]
    assert [(b.mark, b.text.split()[0]) for b in marked] == [("not run", "gcloud")]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_nothing_is_installed_by_a_name_of_others(page):
    assert not re.search(r"pip install (-U |--upgrade )?[\"']?encdec\b(?!-)", page.read_text())
