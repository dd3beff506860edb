# make quickstart    set up, then train a small Pola-Swin on real handwritten digits (minutes on two CPU cores)
# make test          set up, then run every test that does not need minutes of its own (6 to 9 minutes on two CPU cores)
# make test-slow     set up, then run the tests that do (51 minutes on two CPU cores with other work)
# make bench         set up, then time the op and two models against the literal formulation (5 minutes on two CPU cores)
# BENCH=--compile make bench    also the compiled models (10 minutes more); BENCH is passed to benchmarks.model_step
# make bench-gpu     set up, then test and time everything that needs an NVIDIA GPU (at most 8 minutes)
# make bench-input   set up, then time the input pipeline on one core (3 minutes); needs the optional simplejpeg and OpenCV,
#                    which it installs
# make bench-training  set up, then time what the training loop and its checkpoints cost (5 minutes)
# make ablation      set up, then compare kinds of attention on two small data sets (docs/ablation.md; 40 minutes); one of
#                    them is Fashion-MNIST (apt install dataset-fashion-mnist); ABLATION="--datasets digits" does without
# make bench-maps    set up, then time the attention maps of one image (1 minute)
# make bench-features  set up, then time feature pyramids against the plain forward pass (3 minutes)
# make bench-lra     set up, then time the generators of Long Range Arena and its models over their length (9 minutes)
# PYTHON=/path/to/python make …   uses that environment as it is and installs nothing

ifdef PYTHON
  RUN := $(PYTHON)
  SETUP :=
  SETUP_DEV :=
else
  RUN := .venv/bin/python
  SETUP := .venv/installed
  SETUP_DEV := .venv/installed-dev
endif

.PHONY: quickstart test test-slow lint reference bench bench-gpu bench-input bench-training ablation bench-maps bench-features bench-lra

# every call is a run of its own, and `latest` leads to the newest: made before training, so that it also finds a run that
# was interrupted
quickstart: $(SETUP)
	@set -e; runs="$${OUTPUT:-output}/quickstart" tag=$$(date +%Y%m%d-%H%M%S); \
	mkdir -p "$$runs"; ln -sfn "$$tag" "$$runs/latest"; \
	PYTHON=$(RUN) TAG=$$tag bash pretrain.sh

test: $(SETUP_DEV)
	$(RUN) -m pytest -m "not slow" -n 3 --dist worksteal

test-slow: $(SETUP_DEV)
	$(RUN) -m pytest -m slow -n 2 --dist worksteal --timeout 7200

lint: $(SETUP_DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# docs/configuration.md from config.py
reference: $(SETUP)
	$(RUN) -m tools.config_reference > docs/configuration.md

# correctness gates, tables with the bars, and files in benchmarks/results; see benchmarks/README.md
bench: $(SETUP)
	$(RUN) -m benchmarks.attention --compile first
	$(RUN) -m benchmarks.model_step $(BENCH)

bench-gpu: $(SETUP_DEV)
	$(RUN) -m benchmarks.gpu --device cuda

bench-input: $(SETUP_DEV)
	$(RUN) -m benchmarks.input_pipeline

bench-training: $(SETUP)
	$(RUN) -m benchmarks.training_loop --threads 1

ablation: $(SETUP)
	$(RUN) -m experiments.ablation $(ABLATION)

bench-maps: $(SETUP)
	$(RUN) -m benchmarks.attention_maps

bench-features: $(SETUP)
	$(RUN) -m benchmarks.features --threads 1

bench-lra: $(SETUP)
	$(RUN) -m benchmarks.lra_generators
	$(RUN) -m benchmarks.lra_speed

.venv/installed: requirements.txt
	@echo "setting up .venv (torch is large: this takes minutes on a slow line)"
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
