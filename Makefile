# make quickstart   environment, installation, then the whole workflow on this machine
# make test         environment with the test tools, then every test
# make test-light   the same for an environment without TensorFlow, with its own tests
# make check        style (ruff.toml), types (pyproject.toml), sizes of functions and of the core
# make guard        compiles the paper's model for TPUs (EXTRAS=test,tpu): is it slower or larger
#                   than tests/hardware/recorded.json says? Other steps are guarded by every test
# make coverage     every test, then the share of each package's lines that they ran
# make mutants      puts known faults into a copy, one at a time: do the tests notice?
#                   (PACKAGE=train: those of one package; ARGS: flags of tests/mutants.py)
# make docs         the documentation as a site in site/, every link and anchor checked
# make lm-eval      lm-evaluation-harness in a separate environment, against `encdec serve`
# make launcher-parsers   xpk in a separate environment: does it accept the launchers' lines?
#                   (make xpk: that environment alone, whose tests every `make test` then runs)
# make transformers-4.57   an environment in ENV with that version, whose test is skipped without it
#
# PYTHON=...        the interpreter to build .venv with (Python 3.11 to 3.14)
# ENV=...           where the environment is (default .venv)
# EXTRAS=...        what is installed for tests (default: test); with test,hf,tpu also those run
#                   that compare with PyTorch's transformers and that compile for TPUs
# TESTS="..."       arguments for pytest instead of the whole suite
# ARGS="..."        arguments for `encdec quickstart`

ENV     ?= .venv
EXTRAS  ?= test
TESTS   ?=
ARGS    ?=
PACKAGE ?=
WORKERS ?= 2

BIN := $(ENV)/bin

# The other major version of transformers that exports are read with. It shares the packages of ENV,
# torch among them, and so is made in seconds; accelerate and peft are for training what is read.
OTHER   := $(ENV)/transformers-4.57
OTHER_PACKAGES := transformers==4.57.3 accelerate==1.15.0 peft==0.21.2

# One stamp for each choice of extras, so that another choice installs what it lacks.
comma := ,
TESTED := $(ENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# Names may exist and yet not run (version managers install such shims), so each is tried.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$name" -c '$(FITS)' >/dev/null 2>&1 && { echo "$$name"; exit; }; done)

.PHONY: quickstart install test test-light check guard coverage mutants docs lm-eval \
	launcher-parsers xpk transformers-4.57 clean
.DEFAULT_GOAL := quickstart

quickstart: $(ENV)/.installed
	$(BIN)/encdec quickstart $(ARGS)

install: $(ENV)/.installed

test: $(TESTED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=40 --durations-min=2 $(TESTS)

test-light:
	$(MAKE) test ENV=$(ENV)-light EXTRAS=light WORKERS=0 TESTS="tests/test_without_tensorflow.py $(TESTS)"

check: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --noconftest -p no:cacheprovider tests/test_function_sizes.py

guard: $(TESTED)
	ENCDEC_GUARD_ALL=1 $(BIN)/python -m pytest tests/hardware/test_guard.py -k 330m

coverage: $(TESTED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=encdec --cov-report= $(TESTS)
	@for package in encdec/*/; do \
		printf '%-24s %3s %%\n' "$$package" \
			"$$($(BIN)/coverage report --include="$$package*" --format=total || true)"; \
	done
	@printf '%-24s %3s %%\n' all "$$($(BIN)/coverage report --format=total)"

mutants: $(TESTED)
	$(BIN)/python -m tests.mutants --package=$(PACKAGE) $(ARGS)

# Only its own packages: the reference is read from the sources, which are not imported.
docs: $(ENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(ENV)-docs/bin/mkdocs build --quiet

$(ENV)-docs/.installed:
	$(PYTHON) -m venv $(ENV)-docs
	$(ENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check \
		"mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.30,<2"
	@touch $@

lm-eval: $(TESTED) $(ENV)-lm-eval/.installed
	ENCDEC_LM_EVAL=$(ENV)-lm-eval/bin/python $(BIN)/python -m pytest tests/serving/test_harness.py

# Its hundred packages and their versions are not ours to pin.
$(ENV)-lm-eval/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(ENV)-lm-eval
	$(ENV)-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check \
		"lm-eval[api]>=0.4.9,<0.5"
	@touch $@

launcher-parsers: xpk
	ENCDEC_XPK=$(ENV)-xpk/bin/xpk $(BIN)/python -m pytest tests/launch

xpk: $(ENV)-xpk/.installed

# What xpk's parser and manifests import, without its other 50 packages; it shares those of ENV.
XPK_PACKAGES := "xpk>=1.16,<1.17" argcomplete cloud-accelerator-diagnostics docker durationpy \
	google-cloud-common google-cloud-filestore google-cloud-resource-manager grpc-google-iam-v1 \
	kubernetes==35.0.0 oauthlib requests-oauthlib ruamel.yaml==0.18.10 setuptools-scm tabulate \
	vcs-versioning websocket-client

$(ENV)-xpk/.installed: | $(TESTED)
	$(BIN)/python -m venv $(ENV)-xpk
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(ENV)-xpk/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/env.pth"
	$(ENV)-xpk/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
		$(XPK_PACKAGES)
	@touch $@

transformers-4.57: $(OTHER)/.installed

$(OTHER)/.installed: | $(TESTED)
	$(BIN)/python -m venv $(OTHER)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(OTHER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/env.pth"
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check $(OTHER_PACKAGES)
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(FITS)'; then \
		echo "encdec needs Python 3.11 to 3.14 with the venv module; found: '$(PYTHON)'." >&2; \
		echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)," >&2; \
		echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
		exit 1; fi
	"$(PYTHON)" -m venv $(ENV)

# The test installation holds everything that the plain one does.
$(ENV)/.installed: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

$(TESTED): setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt
	@touch $@ $(ENV)/.installed
