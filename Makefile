# make demo   the main job: data from a real film, cold start, PRPO, evaluation, report
# make test   all tests
# make test-lmms  lmms-eval on a folder of the tests (installs it: 3 GB and more)
# make base   trains the demo's base model anew (its weights are shipped)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo
ARGS ?=

.PHONY: demo test test-lmms lint base clean

demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)
	$(RUN) eval.py --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/installed-dev
	$(RUN) -m pytest

test-lmms: $(VENV)-lmms/installed
	$(VENV)-lmms/bin/python -m pytest tests/test_lmms_plugin.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

base: $(VENV)/installed
	$(RUN) -m videomem_jax.pretrain --out=videomem_jax/assets/tiny_base

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "videomem_jax needs Python 3.11 or newer: set PYTHON=python3.12, for instance")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)-lmms/installed: requirements.txt requirements-lmms.txt
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet -r requirements-lmms.txt
	$(VENV)-lmms/bin/python -m pip install --quiet -r requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lmms runs
