"""Serving a model: a server with OpenAI's API, a page in the browser, and the plugin of vLLM."""
