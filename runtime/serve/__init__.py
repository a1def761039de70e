"""Pictures over HTTP: OpenAI's images API, the API of AUTOMATIC1111's web UI, a page, metrics."""
