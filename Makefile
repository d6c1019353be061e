# Everything a person does with this project. Targets install what they need (scripts/setup.sh): Debian or Ubuntu, root
# or sudo, make and Rust are enough.

.PHONY: help setup build install demo demo-stop example test test-unit test-e2e test-breaks lint fmt bench bench-long clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: ## install what building, testing and the demo need, and nothing else
	@scripts/setup.sh

build: ## build the extension in release mode
	@scripts/install.sh build

install: ## build it and install it into this machine's Postgres
	@scripts/install.sh

demo: ## see it work on Debian's package catalogue; KEEP=1 leaves it up to try
	@demo/run.sh

demo-stop: ## stop what make demo KEEP=1 left up
	@demo/run.sh stop

example: ## load examples/opencollective into the database that psql finds, such as $PGDATABASE
	@cd examples/opencollective && psql -X -v ON_ERROR_STOP=1 -f schema.sql -f rows.sql -f documents.sql -f attach.sql

test: ## what CI runs: lint, unit tests, tests inside the server, regress files, end-to-end tests
	@scripts/test.sh

test-unit: ## the tests that need no engine, and the ones inside the server
	@scripts/test.sh unit
	@scripts/test.sh pgrx

test-e2e: ## the end-to-end tests; ARGS='--test smoke' chooses
	@scripts/test.sh e2e $(ARGS)

test-breaks: ## show that the randomised test can fail: builds each break of tests/breaks and expects it to be found
	@scripts/test.sh breaks $(ARGS)

lint: ## rustfmt, shellcheck, clippy
	@scripts/test.sh lint

fmt: ## format the Rust code
	@cargo fmt --all

bench: ## measure speed; QUICK=1 for less, ONLY=writers,transactions,delivery,latency,documents,peer,faults for some of it
	@scripts/test.sh bench

bench-long: ## measure memory, the queue's size and growth; QUICK=1, ONLY=growth,bounds
	@scripts/test.sh bench-long

clean: ## remove what was built; downloads stay in the cache
	@rm -rf target
