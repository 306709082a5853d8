"""From files in the formats that people have to tokenized rows that say which tokens are learned."""
