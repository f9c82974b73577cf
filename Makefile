# The commands of CONTRIBUTING.md by name; `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help install test slow gpu properties poison coverage lint format types bench packages builds sanitize

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 12

install: ## build in place, with what tests and linters need
	pip install -e ".[test]"

test: ## the default tests, on all processors
	pytest -n auto

slow: ## the longer tests, too
	pytest -n auto -m "slow or not slow"

gpu: ## the tests of both GPU backends
	pytest tests/gpu

properties: ## many cases of every property
	pytest tests/properties --hypothesis-profile=long

poison: ## the tests on memory that is full of NaN
	pytest -n auto --poison

coverage: ## the lines that no test runs
	pytest -n auto --cov=

lint: ## every check of a commit, on all files (needs pre-commit)
	pre-commit run --all-files

format: ## ruff format and clang-format, in place
	ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

types: ## types of the public modules
	mypy

bench: ## every figure of the README, measured here
	python -m benchmarks

packages: ## sdist and wheel in fresh environments
	.ci/packages

builds: ## wheels with and without CUDA
	.ci/builds

sanitize: ## the CPU kernels under the sanitizers
	.ci/sanitize
