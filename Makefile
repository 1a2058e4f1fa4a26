# make demo   the main job: data from a real film, cold start, PRPO, evaluation, report
# make ablations  the paper's tables in small, docs/RESULTS.md: many hours, can be stopped at any
#             time (make ablations ARGS=--quick: minutes, to see that all works)
# make test   the tests that are quick (make test-slow: the others)
# make test-lmms  lmms-eval on a folder of the tests (installs it: 3 GB and more)
# make base   trains the demo's base model anew (its weights are shipped)
# make docs   the documentation's site, in runs/site (make docs-serve: on this machine's port 8000)
# make notebooks  the notebooks from their sources (make notebooks-run: runs them, in short)
# make aot    compiles the large configurations for TPU slices and GPU nodes, which need not be here,
#             and says whether they fit and what a step costs (make aot-tpu, make aot-gpu: one kind)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo
ARGS ?=
# The C library's memory in huge pages, where Linux gives them: new pages are a tenth of a step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Quick tests run in so many processes; those of a file in one, for what they share.
JOBS ?= 2

.PHONY: demo test test-slow test-lmms lint base clean aot aot-tpu aot-gpu aot-chip \
	docs docs-serve notebooks notebooks-run

demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)
	$(RUN) eval.py --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)

.PHONY: ablations
ablations: $(VENV)/installed
	$(RUN) -m benchmarks.ablations $(ARGS)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow --durations=15

test-lmms: $(VENV)-lmms/installed
	$(VENV)-lmms/bin/python -m pytest tests/test_lmms_plugin.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

base: $(VENV)/installed
	$(RUN) -m videomem_jax.pretrain --out=videomem_jax/assets/tiny_base

# The site's own maker says which versions of it there will be; that is no warning about a page.
docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/python docs/config_page.py
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

docs-serve: docs
	$(RUN) -m http.server 8000 --bind 127.0.0.1 --directory runs/site

notebooks: $(VENV)-docs/installed
	$(VENV)-docs/bin/python notebooks/build.py

# In short, each in a run folder that is new: what is there already would not be run.
SMALL := "--config.prpo.batch=4", "--config.prpo.group_size=4", "--config.eval.batch=16"
TINY := "--config.hardware=any", "--config.prompt.frames=4", "--config.prompt.max_pixels=6144", \
	"--config.prompt.prefix_tokens=128", "--config.memory.slots=10", "--config.memory.budget=4", \
	"--config.prompt.answer=text", "--config.prompt.options=4", "--config.mesh.fsdp=1", \
	"--config.mesh.tensor=1"
notebooks-run: $(VENV)-docs/installed
	rm -rf runs/short-notebooks
	$(VENV)-docs/bin/python notebooks/build.py check
	$(VENV)-docs/bin/python notebooks/build.py run quickstart 'RUN = "short-notebooks/quickstart"' \
	"VIDEOS, COLDSTART_STEPS, PRPO_STEPS = 16, 3, 3"
	$(VENV)-docs/bin/python notebooks/build.py run prpo_colab_tpu \
	'RUN = "short-notebooks/colab"' 'MODEL = "videomem_jax/assets/tiny_base"' \
	"VIDEOS, COLDSTART_STEPS, PRPO_STEPS = 8, 2, 2" 'FLAGS = [$(SMALL), $(TINY)]' \
	'ASK = dict(frames=4, max_pixels=6144, slots=10, answer="text")'
	$(VENV)-docs/bin/python notebooks/build.py run evaluate \
	'RUN, QUESTIONS = "short-notebooks/evaluate", 16'

# CONFIG@TARGET, the table of what must fit.
AOT_CHIP := prpo_colab.py@v5e:1x1
AOT_TPU := $(AOT_CHIP) prpo_colab.py@v6e:1x1 \
	prpo_tpu.py@v5p:2x2x4 prpo_tpu.py@v6e:4x8 prpo_tpu.py@v5e:8x16 \
	coldstart_tpu.py@v5p:2x2x4 coldstart_tpu.py@v6e:4x8 coldstart_tpu.py@v5e:8x16
AOT_GPU := prpo_gpu.py@h100:8 prpo_gpu.py:lora@h100:1
# All lines are compiled, whether or not one does not fit.
compile = failed=0; for line in $(1); do config=$${line%@*}; \
	$(VENV)-$(2)/bin/python train.py --config=configs/$$config \
	--workdir=runs/aot/$$(echo $$config | tr : -) --aot=$${line\#*@} $(ARGS) || failed=1; \
	done; exit $$failed

aot: aot-tpu aot-gpu

aot-tpu: $(VENV)-tpu/installed
	$(call compile,$(AOT_TPU),tpu)

aot-gpu: $(VENV)-gpu/installed
	$(call compile,$(AOT_GPU),gpu)

aot-chip: $(VENV)-tpu/installed
	$(call compile,$(AOT_CHIP),tpu)

# Beside the main environment, whose packages it sees: there the compilers would be in the way.
$(VENV)-%/installed: requirements-%.txt $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-$*
	where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(RUN) -c "$$where" > $$($(VENV)-$*/bin/python -c "$$where")/main.pth
	$(VENV)-$*/bin/python -m pip install --quiet -r requirements-$*.txt
	touch $@

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
	rm -rf $(VENV) $(VENV)-lmms $(VENV)-tpu $(VENV)-gpu $(VENV)-docs runs
