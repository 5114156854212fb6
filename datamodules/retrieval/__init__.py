"""Collections that are searched: documents, queries, and judgements of what is relevant."""
