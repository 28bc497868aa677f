"""How pairs come in: readers, ledger and the build pipeline."""
