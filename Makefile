# make demo: train a tiny model at five levels and draw the dose-response; make test: all tests but slow and gpu ones,
# WORKERS=2 at a time (0: one process).
# make reproduce-quick, make reproduce: the headline sweep, its evaluation and its report. TEXT=a.txt,b.txt trains on those
# files instead of the built-in prose; a broken run is taken up where it stopped.
# make bench: step time and memory relative to plain DeepSpeed, 70 minutes on two idle cores with AMX, as two cases are in bf16
# (docs/performance.md).
# make faults: 30 seeded kills of a rank, each run started again and compared (docs/reliability.md).
# make coverage: how often the harness's 95 % intervals hold the truth, by simulation, 4 minutes (docs/evaluation.md).
# make test-no-fp16: tests with fp16 in them as on a CPU that has none (DS_STABILITY_TEST_NO_FP16=1): its cases are skipped, the others run.
# PYTHON=... chooses the interpreter (an installed torch is used as it is); TORCH=... what to install where there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
RUN = $(VENV)/bin/python

TEXT ?=
ON_TEXT = $(if $(TEXT),--set dataset_name=null --set train_file=$(TEXT) --set unwrap=true)

.PHONY: demo test test-slow test-no-fp16 reproduce reproduce-quick faults soak bench coverage docs clean

demo: $(VENV)/.ready
	$(RUN) benchmarks/demo.py --output runs/demo

test: $(VENV)/.ready
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

test-no-fp16: $(VENV)/.ready
	DS_STABILITY_TEST_NO_FP16=1 $(RUN) -m pytest tests/invariants/test_non_finite.py tests/unit/test_precision_support.py

reproduce-quick: $(VENV)/.ready
	$(VENV)/bin/ds-stability sweep reproduce_quick $(ON_TEXT)
	$(VENV)/bin/ds-stability report evals/reproduce_quick --predictions eval/predictions_quick.yaml

reproduce: $(VENV)/.ready
	$(VENV)/bin/ds-stability sweep reproduce $(ON_TEXT)
	$(VENV)/bin/ds-stability report evals/reproduce --predictions eval/predictions.yaml

soak: $(VENV)/.ready
	$(RUN) benchmarks/soak.py --output runs/soak

bench: $(VENV)/.ready
	$(RUN) benchmarks/performance.py --output runs/performance

coverage: $(VENV)/.ready
	$(RUN) benchmarks/interval_coverage.py

faults: $(VENV)/.ready
	$(RUN) tests/faults/driver.py --trials 30 --output runs/faults

docs: $(VENV)/.ready
	$(RUN) docs/generate.py
	$(RUN) benchmarks/render.py
	$(RUN) benchmarks/performance.py --render
	$(RUN) tests/faults/driver.py --render docs/reliability.md

$(VENV)/.ready: setup.py constraints.txt scripts/setup_env.sh
	TORCH="$(TORCH)" bash scripts/setup_env.sh "$(PYTHON)" "$(VENV)"

clean:
	rm -rf $(VENV) build *.egg-info
