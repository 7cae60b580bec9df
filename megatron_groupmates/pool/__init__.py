"""The data plane: raw documents, token shards, the pool index, generations, the generation log and the sample order."""
