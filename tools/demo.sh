#!/usr/bin/env bash
# The whole path once: environment, corpus, knowledge base, query, generation with and without retrieval.
# Ends by naming a picture to open. Everything it makes lies in ./demo and is used again the next time.
source "$(dirname "$0")/environment.sh"

make_environment
install_radt ""
need_font

say "radt demo"
.venv/bin/radt demo --out demo "$@"
