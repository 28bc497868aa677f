"""How pairs are found: searchers, lexical search, fusion and the retriever."""
