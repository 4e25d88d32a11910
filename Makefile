# `make demo` and `make test` work on a machine that has only Python and make: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out
# where a study keeps its runs, its page and pictures, and its checkpoints
places = --results studies/$(1)/results.jsonl --out docs/results --work $(OUT)/$(1)

.PHONY: help demo test test-slow test-oldest sdist-test types docs check comi table1 flows density graphvae-table real-models sbibm multilevel workflow psychometric clean

help:
	@echo "make demo       faithful guide for a gene network against the exact answer (tables, pictures in $(OUT)/)"
	@echo "make test       the test suite (doctests included)"
	@echo "make test-slow  the long tests"
	@echo "make test-oldest  the suite with the oldest supported versions (a virtual environment of its own)"
	@echo "make sdist-test builds sdist and wheel, runs the tests from the sdist in an empty environment"
	@echo "make check      ruff and mypy"
	@echo "make docs       the documentation site, $(OUT)/site/index.html"
	@echo "make types      pyright on a script of public calls"
	@echo "make comi       the study of the CoMI paper (restartable; writes docs/results/comi.md)"
	@echo "make table1     the study of the SIReN-VAE paper (restartable; writes docs/results/siren_vae.md)"
	@echo "make flows      speed, memory and inversion of the flows beside others (writes docs/results/flows.md)"
	@echo "make density    density-estimation study (DATA=the protein npz; restartable; docs/results/density.md)"
	@echo "make graphvae-table  the Graph VAE study (restartable; image files from DATA=...; writes docs/results/graph_vae.md)"
	@echo "make sbibm      C2ST on the tasks of sbibm (restartable; docs/results/sbibm.md)"
	@echo "make multilevel  one guide for multilevel data sets of any size (restartable; docs/results/multilevel.md)"
	@echo "make real-models DATA=...  guides on real models (the folder of posteriors; restartable; docs/results/real_models.md)"
	@echo "make workflow DATA=...  refinement, cross-validation, speed (the folder of posteriors; docs/results/workflow.md)"
	@echo "make psychometric DATA=...  one guide for 8,526 data sets (the folder of the curves; docs/results/workflow.md)"

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python >= 3.10 is needed; set PYTHON=...' if sys.version_info < (3, 10) else 0)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py --out $(OUT)/quickstart

# WORKERS: processes that share the test files, a thread each; TESTS: what to run of the suite, all by default
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=25 --durations-min=5 $(SHARED) $(TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# OLDEST_PYTHON: the oldest Python there is, 3.10 where it is installed
OLDEST_PYTHON ?= python3.10
OLDEST := $(OUT)/oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(SHARED) $(TESTS)

DIST := $(abspath $(OUT))/dist
sdist-test:
	rm -rf $(DIST) && mkdir -p $(DIST)/empty
	$(PYTHON) -m venv $(DIST)/venv
	$(DIST)/venv/bin/python -m pip install --quiet --disable-pip-version-check build
	$(DIST)/venv/bin/python -m build --outdir $(DIST) .
	tar -xzf $(DIST)/*.tar.gz -C $(DIST)/empty --strip-components 1
	rm -rf $(DIST)/empty/pyro_graphflows/__pycache__
	$(DIST)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls $(DIST)/*.whl)[test]"
	cd $(DIST)/empty && OMP_NUM_THREADS=1 $(DIST)/venv/bin/python -m pytest $(SHARED) $(TESTS)

# MathJax is one file of its npm package, at this version; pages load nothing from elsewhere
MATHJAX := 3.2.2
DOCS := $(OUT)/docs
docs:
	test -x $(DOCS)/venv/bin/python || $(PYTHON) -m venv $(DOCS)/venv
	$(DOCS)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	test -f $(DOCS)/mathjax.js || (npm install --silent --no-save --prefix $(DOCS) mathjax@$(MATHJAX) \
		&& cp $(DOCS)/node_modules/mathjax/es5/tex-svg-full.js $(DOCS)/mathjax.js)
	mkdir -p docs/_build && cp $(DOCS)/mathjax.js docs/_build/mathjax.js
	$(DOCS)/venv/bin/python -m sphinx -W --keep-going -q -b html -d $(DOCS)/doctrees docs $(OUT)/site
	@echo "$(OUT)/site/index.html"

types: $(STAMP)
	test -x $(OUT)/types/bin/pyright || ($(PYTHON) -m venv $(OUT)/types && $(OUT)/types/bin/pip install --quiet pyright)
	$(OUT)/types/bin/pyright --pythonpath $(BIN)/python tests/typed_calls.py

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

comi: $(STAMP)
	$(BIN)/python -m studies.comi.run --study $(call places,comi)

table1: $(STAMP)
	$(BIN)/python -m studies.siren_vae.run --study all $(call places,siren_vae)

graphvae-table: $(STAMP)
	$(BIN)/python -m studies.graph_vae.run --study $(if $(DATA),--data $(DATA)) $(call places,graph_vae)

flows: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt zuko
	$(BIN)/python -m benchmarks.flows --out docs/results

density: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt zuko
	$(BIN)/python -m studies.density.run --study --threads 1 --data $(or $(DATA),protein_grf.npz) $(call places,density)
	$(BIN)/python -m studies.density.run --study --causal --threads 1 $(call places,density)

real-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.real_models.run $(if $(DATA),--data $(DATA)) $(if $(WORKERS),--workers $(WORKERS))
	$(BIN)/python -m studies.real_models.report --out docs/results

sbibm: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps sbibm
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.sbibm.run --study $(call places,sbibm)
	$(BIN)/python -m studies.sbibm.report

multilevel: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.multilevel.run --study $(call places,multilevel)
	$(BIN)/python -m studies.multilevel.report

workflow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.workflow.run $(if $(DATA),--data $(DATA)) --results studies/workflow/results.jsonl
	$(BIN)/python -m studies.psychometric.report

psychometric: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.psychometric.run $(if $(DATA),--data $(DATA)) --results studies/psychometric/results.jsonl
	$(BIN)/python -m studies.psychometric.report

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
