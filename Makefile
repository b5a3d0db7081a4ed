# The host libraries: openmmlab (the default) or onedl, their maintained forks. The two cannot share an environment.
STACK ?= openmmlab
VENV ?= $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=

IN_VENV = "$(VENV)/bin/python"
SOURCES = find cuda_ops/csrc cuda_ops/runtimes tests/cuda_emulation tests/ops tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
site-packages = $(1) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
given = $(filter command environment,$(firstword $(origin $(1))))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow tools lint format docs kernels prove fuzz sanitize endurance runtimes deploy wheel abi matrix clean

help:
	@echo 'make demo      set up, then train, evaluate and show a small model (DEMO_ARGS, FAMILY, TASK are passed on)'
	@echo 'make test      set up, then check style and types and run all tests but the slow ones (PYTEST_ARGS are passed on)'
	@echo 'make test-slow the same with the slow tests'
	@echo 'make tools     test timm, transformers, peft, torchao and other libraries around the backbones, in an environment of its own (.venv-tools)'
	@echo 'make kernels   compile every CUDA kernel for every architecture by nvcc alone, and print what each takes (ARCHS="8.0 9.0")'
	@echo 'make runtimes  compile the scans as operators of onnxruntime and OpenVINO, into build/runtimes'
	@echo 'make deploy    run every family and task in eight runtimes, and write what agrees to build/deploy.md; in .venv-deploy and .venv-litert'
	@echo 'make prove     prove by a verifier that the threads of the CUDA kernels are ordered in every schedule; needs nvcc, takes half an hour of one core or more, in .venv-prove'
	@echo 'make fuzz      fuzz the readers of checkpoints and exported features for ten minutes (FUZZ_SECONDS=600)'
	@echo 'make sanitize  run the CPU kernels under the address, undefined-behaviour and thread sanitizers; needs g++'
	@echo 'make endurance train for two hours, and compare memory, open files and speed at its ends (MINUTES=120)'
	@echo 'make wheel     build and check dist/*.whl for every Python and every torch from 2.10 on (FORCE_CUDA=1: with CUDA kernels)'
	@echo 'make abi       compile the bindings against the headers of torch 2.1 to 2.15 (VERSIONS="2.4.1 2.13.0")'
	@echo 'make matrix    build from source beside versions of torch and test there (VERSIONS="2.4.1 2.13.0", PYTHON=python3.12)'
	@echo 'make setup     make or complete the environment alone'
	@echo 'make lint      set up, then check format, style and types alone'
	@echo 'make format    set up, then put Python, C++ and CUDA sources into the form that make lint checks'
	@echo 'make docs      build the documentation site into build/docs, in an environment of its own (.venv-docs)'
	@echo 'make clean     remove what compiling and testing left; the environment and the data stay'
	@echo 'Variables: PYTHON=python3.12 (to make the environment with), VENV=folder, STACK=openmmlab or onedl'

setup:
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found; install Python 3.10 or newer, or name it with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py --venv "$(VENV)" --stack $(STACK) $(if $(call given,PYTHON),--this-python)

demo: setup
	@$(IN_VENV) tools/demo.py $(if $(FAMILY),--family $(FAMILY)) $(if $(TASK),--task $(TASK)) $(DEMO_ARGS)

lint: setup
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) -m ruff format --check --quiet .
	@$(SOURCES) | xargs "$(VENV)/bin/clang-format" --dry-run --Werror
	@$(IN_VENV) -m mypy

format: setup
	@$(IN_VENV) -m ruff check --fix --quiet .
	@$(IN_VENV) -m ruff format --quiet .
	@$(SOURCES) | xargs "$(VENV)/bin/clang-format" -i

# $(call on-top,FOLDER,REQUIREMENTS[,own]) makes an environment on top of the project's, so that neither torch nor the host
# libraries are installed twice, and the project's stays as its own requirements say. With "own" the packages' dependencies
# may be others than those that the project's constraints pin.
define on-top
	@test -x $(1)/bin/python || $(IN_VENV) -m venv $(1)
	@{ $(call site-packages,$(IN_VENV)); pwd; } > "$$($(call site-packages,$(1)/bin/python))/project.pth"
	@$(1)/bin/python -m pip install --quiet $(if $(3),,-c requirements/constraints.txt) -r $(2)
endef

PYTEST = CI_PINS=1 $(IN_VENV) -m pytest --numprocesses auto --maxprocesses 8

test: lint
	@$(PYTEST) -m 'not slow' --dist loadfile $(PYTEST_ARGS)

test-slow: lint
	@$(PYTEST) --dist loadfile $(PYTEST_ARGS)

tools: setup
	$(call on-top,.venv-tools,requirements/tools.txt)
	@.venv-tools/bin/python -m pytest tests/timm tests/integrations tests/pytorch_tools tests/benchmark/test_rivals.py $(PYTEST_ARGS)
	@.venv-tools/bin/python -m pytest tests/docs -k 'scripts and timm' $(PYTEST_ARGS)

docs:
	@test -x .venv-docs/bin/mkdocs || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet -r requirements/docs.txt
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo 'docs: build/docs/index.html'

kernels:
	@$(PYTHON) tools/kernel_report.py $(if $(ARCHS),--archs "$(ARCHS)")

fuzz: setup
	$(call on-top,.venv-fuzz,requirements/fuzz.txt)
	@.venv-fuzz/bin/python -W ignore tests/fuzzing/fuzz_readers.py -max_total_time=$(or $(FUZZ_SECONDS),600) -artifact_prefix=build/

sanitize: setup
	@$(IN_VENV) -m pytest tests/ops/test_sanitized_kernels.py $(PYTEST_ARGS)

endurance: setup
	@$(IN_VENV) tests/endurance/long_run.py $(if $(MINUTES),--minutes $(MINUTES))

runtimes: setup
	@$(IN_VENV) tools/make_runtimes.py

deploy: setup
	$(call on-top,.venv-deploy,requirements/deploy.txt)
	$(call on-top,.venv-litert,requirements/litert.txt,own)
	@.venv-deploy/bin/python tests/deploy/runtimes.py $(DEPLOY_ARGS)

prove: setup
	$(call on-top,.venv-prove,requirements/prove.txt)
	@.venv-prove/bin/python -m pytest tests/ptx/test_proofs.py $(PYTEST_ARGS)
	@echo 'verdicts: build/proofs.md'

wheel: setup
	@$(IN_VENV) -m pip install --quiet -r requirements/wheel.txt
	@$(IN_VENV) tools/make_wheel.py

abi:
	@$(PYTHON) tools/abi_check.py $(VERSIONS)

matrix:
	@$(PYTHON) tools/matrix.py $(VERSIONS) $(MATRIX_ARGS)

clean:
	rm -rf build dist *.egg-info cuda_ops/_C.so* cuda_ops/_build_info.json* .mypy_cache .pytest_cache .ruff_cache
	find cuda_ops ssm_backbones tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
