"""Retrieval: image-text pairs to a searchable knowledge base. Start reading at `index/knowledge_base.py`."""
