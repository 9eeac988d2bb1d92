# make demo: train a tiny model at five levels and draw the dose-response; make test: all tests but slow and gpu ones.
# PYTHON=... chooses the interpreter (an installed torch is used as it is); TORCH=... what to install where there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow docs clean

demo: $(VENV)/.ready
	$(RUN) benchmarks/demo.py --output runs/demo

test: $(VENV)/.ready
	$(RUN) -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

docs: $(VENV)/.ready
	$(RUN) docs/generate.py
	$(RUN) benchmarks/render.py

$(VENV)/.ready: setup.py constraints.txt scripts/setup_env.sh
	TORCH="$(TORCH)" bash scripts/setup_env.sh "$(PYTHON)" "$(VENV)"

clean:
	rm -rf $(VENV) build *.egg-info
