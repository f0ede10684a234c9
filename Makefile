# SPDX-License-Identifier: LGPL-2.1-or-later
# Each target does its own set-up (Debian 12 or 13, as root). `make` alone lists them.

PYTHON ?= python3
TESTBED = $(PYTHON) -m remus_colo.testbed
# The interpreter that has what the tests need; set-up makes one where the machine's has not.
TEST_PYTHON = "$$($(TESTBED) python)"
PYTEST_E2E = $(TEST_PYTHON) -m pytest -v -ra --durations=0 --durations-min=1

# Of soak.  How many failovers, or checkpoints; empty for the default of the kind
N ?=
# what dies: primary, backup, mixed; memory: nothing; clock: each host in turn, with a look at the guest's clocks
KIND ?= primary
# how the guest is protected: colo or remus
MODE ?= colo
# what it is: pvh or, for remus, also pv or hvm
GUEST ?= pvh
# transparent, cooperative or auto
CHECKPOINT ?=
# Debian's release in the hosts: debian-13 or debian-12
RELEASE ?= debian-13
# the hypervisor: debian, patched or a file
XEN ?= $(if $(filter clock,$(KIND)),patched,debian)
# how many seconds backup's Xen time is ahead of primary's
SKEW ?= $(if $(filter clock,$(KIND)),600,0)

FUZZ_SECONDS ?= 600

.PHONY: help setup demo test test-here test-e2e test-long check-patches soak bench bench-compare verdicts fuzz lint clean

help:
	@echo 'make demo     a guest survives the death of its host, in a test bed of two Xen hosts (5 to 10 minutes)'
	@echo 'make test     the tests (30 to 60 minutes)'
	@echo 'make test-long'
	@echo '              the end-to-end tests that this leaves out (two hours)'
	@echo 'make soak     many failovers in a row: N=10 KIND=primary|backup|mixed|memory|clock MODE=colo|remus'
	@echo '              GUEST=pvh|pv|hvm CHECKPOINT=auto RELEASE=debian-13|debian-12'
	@echo 'make bench    what protection costs'
	@echo 'make bench-compare'
	@echo '              what the comparison costs, beside QEMU and a bare packet queue (minutes, no Xen)'
	@echo 'make verdicts what leaves without a checkpoint, and what checkpoints are made for (10 minutes)'
	@echo 'make check-patches'
	@echo '              apply and build what is in patches/ (about 10 minutes)'
	@echo 'make fuzz     attack the receiving daemon, without Xen: FUZZ_SECONDS=600'
	@echo 'make lint     ruff: rules and format'
	@echo 'make clean    remove what was built in this tree'

setup:
	@command -v $(PYTHON) > /dev/null || apt-get install -q -y --no-install-recommends python3
	@$(TESTBED) setup

demo:
	@command -v $(PYTHON) > /dev/null || apt-get install -q -y --no-install-recommends python3
	@$(PYTHON) -m remus_colo.testbed.demo

test: test-here test-e2e

# What needs no Xen: the network tests use real namespaces and queues, as far as this kernel has them.
test-here: setup
	$(TEST_PYTHON) -m pytest -q -ra tests/unit tests/property tests/fuzz tests/netns

test-e2e: setup
	$(PYTEST_E2E) tests/e2e

test-long: setup
	$(PYTEST_E2E) -m long tests/e2e

check-patches:
	@command -v $(PYTHON) > /dev/null || apt-get install -q -y --no-install-recommends python3
	@$(PYTHON) -m remus_colo.testbed.xen_build

soak: setup
	@$(TEST_PYTHON) -m remus_colo.testbed.soak --kind $(KIND) --mode $(MODE) --guest $(GUEST) $(if $(N),-n $(N)) \
		$(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) --xen $(XEN) --skew $(SKEW) --release $(RELEASE)

bench: setup
	@$(TEST_PYTHON) -m remus_colo.testbed.bench

bench-compare: setup
	@$(TEST_PYTHON) -m remus_colo.bench

verdicts: setup
	@$(TEST_PYTHON) -m remus_colo.testbed.verdicts

# no crash, no leak, no hang: its last line has the figures
fuzz: setup
	PYTHONPATH=. $(TEST_PYTHON) tests/fuzz/fuzz_receiver.py --seconds $(FUZZ_SECONDS)

lint:
	ruff check .
	ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find remus_colo tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f remus_colo/_native/_xen.c remus_colo/_native/_compare.c remus_colo/_native/*.o remus_colo/_native/*.so
