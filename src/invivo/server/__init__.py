"""HTTP: the OpenAI-compatible server and what it adds; written against the LM interface alone."""
